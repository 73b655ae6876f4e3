"""How fast each job is: `python benchmarks/speed.py`, or some parts of it: `--parts generation vectors`.

    generation   an adapter from a known task vector into a live model, against `PeftModel.load_adapter` and a copy
    training     samples per second of the generator and of the paper's network, at three sizes of adapters
    collection   tokens per second of fine-tuning a LoRA, against a plain `Trainer` with PEFT
    vectors      task vectors in batches, against one by one

What is compared runs by turns in one process, so that a busy machine slows all of it alike; medians are told. No
timing is a test. Written to `benchmarks/results/speed.json`, part by part.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments
from transformers.utils import logging

from hf_icm_lora import (
    CollectionArguments,
    CompletionCollator,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraLayout,
    TaskVectorExtractor,
    TaskVectorSpec,
    built_in_tasks,
    collect_zoo,
    fast_dtype,
    smollm2_generator_path,
    smollm2_path,
)
from hf_icm_lora.completion import fill_template
from hf_icm_lora.files import write_json
from hf_icm_lora.layout import LoraModule
from hf_icm_lora.model_card import run_metadata

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@dataclass
class SpeedOptions:
    parts: list[str] = field(default_factory=lambda: ["generation", "training", "collection", "vectors"])
    rounds: int = field(default=7, metadata={"help": "Turns of the short measurements; the long ones take 3."})
    output: str = field(default="benchmarks/results/speed.json", metadata={"help": "Where the figures go."})


def by_turns(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, all of them run once in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def generation(rounds: int) -> dict:
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype()).eval()
    generator = LoraGeneratorModel.from_pretrained(smollm2_generator_path()).to_float()
    vector = generator.zoo_normalizer.vector_mean[None]
    slot = generator.adapter_slot(base, "slot")
    weights, loaded = generator.decode_task_vector(vector), iter(range(10**6))
    copy = torch.empty_like(weights)
    many = vector.expand(32, -1, -1)
    with tempfile.TemporaryDirectory() as folder:
        generator.export_adapter(Path(folder) / "adapter", vector, dtype=fast_dtype())
        seconds = by_turns(
            {
                "generate into a slot": lambda: slot.write(generator.decode_task_vector(vector)),
                "of that, decode": lambda: generator.decode_task_vector(vector),
                "of that, write": lambda: slot.write(weights),
                "memory copy of the same numbers": lambda: copy.copy_(weights),
                "32 adapters decoded in a batch": lambda: generator(task_vector=many, return_dict=True),
                "generate_adapter in place": lambda: generator.generate_adapter(
                    slot.model, task_vector=vector, adapter_name="slot"
                ),
                "generate_adapter under a new name": lambda: generator.generate_adapter(
                    slot.model, task_vector=vector, adapter_name=f"new-{next(loaded)}"
                ),
                "PeftModel.load_adapter": lambda: slot.model.load_adapter(f"{folder}/adapter", f"new-{next(loaded)}"),
            },
            rounds,
        )
    ratio = seconds["PeftModel.load_adapter"] / seconds["generate into a slot"]
    return {"seconds": seconds, "load_adapter_over_slot": ratio}


class RandomAdapters(Dataset):
    """As from a zoo, with numbers that mean nothing."""

    def __init__(self, layout: LoraLayout, size: int):
        rng = torch.Generator().manual_seed(0)
        self.lora_weights = torch.randn(size, layout.num_weights, generator=rng)
        self.task_vectors = torch.randn(size, 2, 576, generator=rng)
        self.shared_weights = torch.randn(layout.num_shared_weights, generator=rng)

    def each_adapter(self):
        return iter(self.lora_weights)


def training(rounds: int) -> dict:
    """Steps of training on adapters, forward, backward and AdamW, with the same batch for both networks."""

    def layers(count: int, rank: int, shapes: dict[str, tuple[int, int]], gauge: str) -> LoraLayout:
        names = ((f"model.layers.{i}.{name}", *sizes, rank) for i in range(count) for name, sizes in shapes.items())
        return LoraLayout(tuple(LoraModule(*fields) for fields in names), gauge)

    q, v, mlp = {"self_attn.q_proj": (576, 576)}, {"self_attn.v_proj": (576, 192)}, (576, 1536)
    linear = {**q, **v, "self_attn.k_proj": (576, 192), "self_attn.o_proj": (576, 576)}
    linear |= {"mlp.gate_proj": mlp, "mlp.up_proj": mlp, "mlp.down_proj": mlp[::-1]}
    llama = {"self_attn.q_proj": (4096, 4096), "self_attn.v_proj": (4096, 1024)}
    layouts = {
        "SmolLM2, q and v, rank 8": (layers(30, 8, q | v, "frozen_a"), 8),
        "SmolLM2, all linear, rank 4": (layers(30, 4, linear, "shared_init"), 4),
        "Llama-3-8B, q and v, rank 16": (layers(32, 16, llama, "shared_init"), 2),
    }
    report = {}
    for name, (layout, batch_size) in layouts.items():
        dataset = RandomAdapters(layout, batch_size)
        batch = {"lora_weights": dataset.lora_weights, "task_vector": dataset.task_vectors}
        work, sizes = {}, {}
        for architecture in ("transformer", "conv1d"):
            config = LoraGeneratorConfig(
                layout=layout.to_dict(), lora_config=LORA, task_vector_spec=TaskVectorSpec().to_dict(),
                architecture=architecture, num_task_vectors=2, condition_size=64,
            )  # fmt: skip
            model = LoraGeneratorModel(config).train()
            model.fit_normalizer(dataset)
            optimizer = torch.optim.AdamW(model.parameters())
            sizes[architecture] = sum(parameter.numel() for parameter in model.parameters())

            def step(model=model, optimizer=optimizer) -> None:
                model(**batch).loss.backward()  # noqa: B023
                optimizer.step()
                optimizer.zero_grad()

            work[architecture] = step
        seconds = by_turns(work, min(rounds, 3))
        report[name] = {
            "num_weights": layout.num_weights,
            "batch_size": batch_size,
            "parameters": sizes,
            "samples_per_second": {network: batch_size / value for network, value in seconds.items()},
            "ratio": seconds["conv1d"] / seconds["transformer"],
        }
    return report


def collection(rounds: int) -> dict:
    """The same steps on the same samples; the plain loop pads, and computes logits at every token."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    task = next(task for task in built_in_tasks(["country_facts"]) if task.name == "country_facts/capital")
    steps, batch_size, template = 16, 16, CollectionArguments("unused").template
    samples = list(task.train[: steps * batch_size])
    texts = ["".join(fill_template(sample, template)) for sample in samples]
    num_tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    common = {"max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": 1e-2, "seed": 0}
    losses: dict[str, float] = {}

    def load():
        return AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype())

    plain_base, own_base = load(), load()

    def plain() -> None:
        encode = CompletionCollator(tokenizer, template=template)  # labels on the completion, as in ours
        model = get_peft_model(plain_base, LoraConfig(**LORA))
        args = TrainingArguments("build/speed", report_to="none", save_strategy="no", disable_tqdm=True,
                                 remove_unused_columns=False, logging_strategy="no", **common)  # fmt: skip
        trainer = Trainer(model, args, data_collator=encode, train_dataset=samples)
        losses["plain"] = trainer.train().training_loss
        model.unload()

    def ours() -> None:
        args = CollectionArguments("build/speed", eval_steps=steps, **common)
        with tempfile.TemporaryDirectory() as folder:
            zoo = collect_zoo(f"{folder}/zoo", own_base, tokenizer, [task], LoraConfig(**LORA), args)
            losses["collect_zoo"] = zoo.records[task.name]["validation_losses"][str(steps)]

    seconds = by_turns({"plain Trainer": plain, "collect_zoo": ours}, min(rounds, 3))
    return {
        "steps": steps,
        "tokens_per_second": {name: num_tokens / value for name, value in seconds.items()},
        "ratio": seconds["plain Trainer"] / seconds["collect_zoo"],
        "losses": losses,
    }


def vectors(rounds: int) -> dict:
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype()).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    tasks = built_in_tasks(["country_facts"])[:4]
    spec = TaskVectorSpec(num_draws=8)
    one_by_one, batched = TaskVectorExtractor(spec, batch_size=1), TaskVectorExtractor(spec)
    seconds = by_turns(
        {
            "one by one": lambda: one_by_one.extract(base, tokenizer, tasks),
            "in batches": lambda: batched.extract(base, tokenizer, tasks),
        },
        min(rounds, 3),
    )
    return {"seconds": seconds, "ratio": seconds["one by one"] / seconds["in batches"]}


PARTS = {"generation": generation, "training": training, "collection": collection, "vectors": vectors}


def main() -> None:
    (options,) = HfArgumentParser(SpeedOptions).parse_args_into_dataclasses()
    logging.disable_progress_bar()
    output = Path(options.output)
    report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for part in options.parts:
        report[part] = PARTS[part](options.rounds)
        write_json(output, {**report, **run_metadata(0)})
        print(json.dumps({part: report[part]}, indent=2))


if __name__ == "__main__":
    main()
