"""How fast each job is, part by part; `run.py` runs and keeps it.

    generation   an adapter from a known task vector into a live model, against `PeftModel.load_adapter` and a copy
    training     samples per second and memory of the generator and of the paper's network, at three sizes of adapters
    collection   tokens per second of fine-tuning LoRAs, against a plain `Trainer` with PEFT
    vectors      task vectors in batches, against one call of the base model per prompt

What is compared runs by turns, so that a busy machine slows all of it alike; medians are told. No timing is a test.
"""

import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.suite.bench import load_base, load_tokenizer
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
)
from hf_icm_lora.completion import render, score_completions
from hf_icm_lora.layout import LoraModule
from hf_icm_lora.task_vectors import MODES

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def by_turns(
    work: dict[str, Callable[[], object]], rounds: int, repeats: int = 1, after=lambda: None
) -> dict[str, float]:
    """Return the median seconds of each, all of them run in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, function in work.items():
            for _ in range(repeats):
                start = time.perf_counter()
                function()
                if number:
                    times[name].append(time.perf_counter() - start)
                after()
    return {name: statistics.median(values) for name, values in times.items()}


def in_own_process(function: Callable[..., dict], *arguments) -> dict:
    """Run a function where nothing is in memory yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_gib() -> float:
    """Return the most memory that this process had so far; `ru_maxrss` would count its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


@torch.no_grad()
def generation(rounds: int) -> dict:
    base = load_base()
    generator = LoraGeneratorModel.from_pretrained(smollm2_generator_path()).to_float()
    vector = generator.zoo_normalizer.vector_mean[None]
    slot = generator.adapter_slot(base, "slot")
    weights = generator.decode_task_vector(vector)
    copy, compiled = torch.empty_like(weights), torch.compile(generator.decode_task_vector)
    many = vector.expand(32, -1, -1)

    def as_before() -> None:  # loading takes longer, the more adapters there are
        for name in set(slot.model.peft_config) - {"slot"}:
            slot.model.delete_adapter(name)

    with tempfile.TemporaryDirectory() as folder:
        generator.export_adapter(Path(folder) / "adapter", vector, dtype=fast_dtype())
        seconds = by_turns(
            {
                "generate into a slot": lambda: slot.write(generator.decode_task_vector(vector)),
                "generate into a slot, compiled": lambda: slot.write(compiled(vector)),
                "decode": lambda: generator.decode_task_vector(vector),
                "write into the slot": lambda: slot.write(weights),
                "memory copy of the same numbers": lambda: copy.copy_(weights),
                "32 adapters decoded in a batch": lambda: generator(task_vector=many, return_dict=True),
                "generate_adapter in place": lambda: generator.generate_adapter(
                    slot.model, task_vector=vector, adapter_name="slot"
                ),
                "generate_adapter under a new name": lambda: generator.generate_adapter(
                    slot.model, task_vector=vector, adapter_name="new"
                ),
                "PeftModel.load_adapter": lambda: slot.model.load_adapter(f"{folder}/adapter", "new"),
            },
            rounds,
            repeats=5,
            after=as_before,
        )
    return {"seconds": seconds, "bytes": weights.numel() * weights.element_size()}


class RandomAdapters(Dataset):
    """As from a zoo, with numbers that mean nothing."""

    def __init__(self, layout: LoraLayout, size: int):
        rng = torch.Generator().manual_seed(0)
        self.lora_weights = torch.randn(size, layout.num_weights, generator=rng)
        self.task_vectors = torch.randn(size, 2, 576, generator=rng)
        self.shared_weights = torch.randn(layout.num_shared_weights, generator=rng)

    def each_adapter(self):
        return iter(self.lora_weights)


def layouts() -> dict[str, tuple[LoraLayout, int]]:
    """Return three sizes of adapters, each with the samples of a batch."""

    def layers(count: int, rank: int, shapes: dict[str, tuple[int, int]], gauge: str) -> LoraLayout:
        names = ((f"model.layers.{i}.{name}", *sizes, rank) for i in range(count) for name, sizes in shapes.items())
        return LoraLayout(tuple(LoraModule(*fields) for fields in names), gauge)

    q, v, mlp = {"self_attn.q_proj": (576, 576)}, {"self_attn.v_proj": (576, 192)}, (576, 1536)
    linear = {**q, **v, "self_attn.k_proj": (576, 192), "self_attn.o_proj": (576, 576)}
    linear |= {"mlp.gate_proj": mlp, "mlp.up_proj": mlp, "mlp.down_proj": mlp[::-1]}
    llama = {"self_attn.q_proj": (4096, 4096), "self_attn.v_proj": (4096, 1024)}
    return {
        "SmolLM2, q and v, rank 8": (layers(30, 8, q | v, "shared_init"), 8),
        "SmolLM2, all linear, rank 8": (layers(30, 8, linear, "shared_init"), 2),
        "Llama-3-8B, q and v, rank 16": (layers(32, 16, llama, "shared_init"), 1),
    }


def training_step(name: str, architecture: str) -> tuple[Callable[[], None], int]:
    """Return a step of training on adapters, forward, backward and AdamW, and the number of parameters."""
    layout, batch_size = layouts()[name]
    dataset = RandomAdapters(layout, batch_size)
    batch = {"lora_weights": dataset.lora_weights, "task_vector": dataset.task_vectors}
    config = LoraGeneratorConfig(
        layout=layout.to_dict(), lora_config=LORA, task_vector_spec=TaskVectorSpec().to_dict(),
        architecture=architecture, num_task_vectors=2, condition_size=64,
    )  # fmt: skip
    model = LoraGeneratorModel(config).train()
    model.fit_normalizer(dataset)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # as the Trainer does

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in model.parameters())


def training_times(name: str, rounds: int) -> dict:
    steps = {architecture: training_step(name, architecture) for architecture in ("transformer", "conv1d")}
    seconds = by_turns({architecture: step for architecture, (step, _) in steps.items()}, rounds)
    return {"seconds": seconds, "parameters": {architecture: size for architecture, (_, size) in steps.items()}}


def training_memory(name: str, architecture: str) -> float:
    before = peak_gib()
    step, _ = training_step(name, architecture)
    step(), step()
    return peak_gib() - before


def training(rounds: int, names: list[str] | None = None) -> dict:
    report = {}
    for name in names or layouts():
        layout, batch_size = layouts()[name]
        measured = in_own_process(training_times, name, rounds)
        seconds = measured.pop("seconds")
        report[name] = {
            "num_weights": layout.num_weights,
            "batch_size": batch_size,
            **measured,
            "samples_per_second": {network: batch_size / value for network, value in seconds.items()},
            "gib": {network: in_own_process(training_memory, name, network) for network in seconds},
            "ratio": seconds["conv1d"] / seconds["transformer"],
        }
    return report


class Workers:
    """Processes that have the base model and fine-tune LoRAs, with all of the machine's threads between them."""

    def __init__(self, processes: int):
        threads = max(1, torch.get_num_threads() // processes)
        self.pool = multiprocessing.get_context("spawn").Pool(processes, self.start, (threads,))

    @staticmethod
    def start(threads: int) -> None:
        torch.set_num_threads(threads)
        Workers.base, Workers.tokenizer = load_base(), load_tokenizer()

    def run(self, function: Callable, names: list[str], steps: int) -> list[float]:
        return self.pool.starmap(function, [(name, steps) for name in names], chunksize=1)


BATCH_SIZE, TEMPLATE = 16, CollectionArguments("unused").template
COMMON = {"per_device_train_batch_size": BATCH_SIZE, "learning_rate": 1e-2, "warmup_steps": 4, "seed": 0}


def task_of(name: str):
    return next(task for task in built_in_tasks([name.split("/")[0]]) if task.name == name)


def plain_trainer(name: str, steps: int) -> float:
    """What one would write with transformers and PEFT alone: padded batches, and logits at every token."""
    task, collate = task_of(name), CompletionCollator(Workers.tokenizer, template=TEMPLATE)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=steps, report_to="none", save_strategy="no", disable_tqdm=True,
                                 remove_unused_columns=False, dataloader_pin_memory=False, **COMMON)  # fmt: skip
        model = get_peft_model(Workers.base, LoraConfig(**LORA))
        trainer = Trainer(model, args, data_collator=collate, train_dataset=list(task.train))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    with torch.no_grad():
        scores = score_completions(model.eval(), collate(task.demo))
    Workers.base = model.unload()
    return (scores.loss.sum() / scores.num_tokens.sum()).item()


def collected(name: str, steps: int) -> float:
    """The same with `collect_zoo`, which evaluates the task once more and writes it into a zoo."""
    with tempfile.TemporaryDirectory() as folder:
        args = CollectionArguments(folder, max_steps=steps, eval_steps=steps, **COMMON)
        zoo = collect_zoo(f"{folder}/zoo", Workers.base, Workers.tokenizer, [task_of(name)], LoraConfig(**LORA), args)
        return zoo.records[name]["validation_losses"][str(steps)]


def collection(rounds: int, steps: int = 16) -> dict:
    """The same number of steps on the same tasks, by one process with all threads and by two with half of them."""
    names = ["country_facts/capital", "country_facts/continent"]
    tokenizer, losses, work = load_tokenizer(), {}, {}
    texts = ["".join(render(sample, TEMPLATE, tokenizer)) for name in names for sample in task_of(name).train]
    tokens = sum(map(len, tokenizer(texts)["input_ids"])) / len(texts) * BATCH_SIZE * steps * len(names)
    for processes in (1, 2):
        workers = Workers(processes)
        for label, function in (("plain Trainer", plain_trainer), ("collect_zoo", collected)):
            label = f"{label}, {processes} process{'es' * (processes > 1)}"

            def run(label=label, workers=workers, function=function) -> None:
                losses[label] = statistics.mean(workers.run(function, names, steps))

            work[label] = run
    seconds = by_turns(work, rounds)
    return {
        "steps": steps,
        "tokens_per_second": {label: tokens / value for label, value in seconds.items()},
        "losses": losses,
    }


@torch.no_grad()
def plain_vectors(base: torch.nn.Module, tokenizer, prompts: list[str], layer: int) -> torch.Tensor:
    """What one would write with transformers alone, here for the last token: a call per prompt."""
    states = (base(**tokenizer(text, return_tensors="pt"), output_hidden_states=True) for text in prompts)
    return torch.stack([state.hidden_states[layer][0, -1] for state in states])


def vectors(rounds: int) -> dict:
    base, tokenizer = load_base(), load_tokenizer()
    tasks, spec = built_in_tasks(["country_facts"])[:4], TaskVectorSpec(num_draws=8)
    one_by_one, batched = TaskVectorExtractor(spec, batch_size=1), TaskVectorExtractor(spec)
    texts = [
        p.text
        for t in tasks
        for mode in MODES
        for p in batched.prompts(tokenizer, t.demo, t.description, mode, t.name)
    ]
    seconds = by_turns(
        {
            "plain transformers, a call per prompt": lambda: plain_vectors(base, tokenizer, texts, -1),
            "TaskVectorExtractor, one by one": lambda: one_by_one.extract(base, tokenizer, tasks),
            "TaskVectorExtractor, in batches of 16": lambda: batched.extract(base, tokenizer, tasks),
        },
        rounds,
    )
    return {"prompts": len(texts), "prompts_per_second": {name: len(texts) / value for name, value in seconds.items()}}


PARTS = {"generation": generation, "training": training, "collection": collection, "vectors": vectors}
