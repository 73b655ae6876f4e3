"""From a writer that train.py made to the generator that ships: `python -m benchmarks.real.generator --tasks DATA/real`.

The closed form is the writer's, in the package's own terms. The network on top of it, the conditional VAE, is trained
here, on adapters that the closed form writes from many samples of training tasks: from a task's description it learns
to write the whole adapter, and from twelve examples what their closed form lacks. The adapters are kept, so that an
interrupted call goes on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from benchmarks.real.prepare import suite_tasks
from benchmarks.real.run import chosen
from hf_icm_lora import (
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraGeneratorTrainingArguments,
    Task,
    TaskVectorExtractor,
    TaskVectorSpec,
    load_tasks,
)
from hf_icm_lora.base_model import frozen_base, load_base_model
from hf_icm_lora.files import sha256_of
from hf_icm_lora.learned_closed_form import MATRICES, closed_form_config, read_examples

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SPEC = TaskVectorSpec(num_draws=2, layers=(14, 22, 30))
PARTS = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
         "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}  # fmt: skip


def load_writer(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a writer in fp32."""
    stored = load_file(path)
    scales = {name: stored.pop(name) for name in list(stored) if name.endswith(".row_scale")}
    return {name: t * scales[f"{name}.row_scale"] if t.dtype == torch.int8 else t for name, t in stored.items()}


def generator_of(path: str | Path, base_model: torch.nn.Module, **sizes) -> LoraGeneratorModel:
    """Return a generator whose closed form computes what a writer computes. Its network was not trained yet.

    Args:
        path (`str` or `Path`): A writer.safetensors of train.py.
        base_model (`PreTrainedModel`): The base that it was trained for.
        sizes: Further fields of the configuration, of the network for instance.
    """
    stored = load_writer(path)
    config = closed_form_config(
        base_model,
        rank=stored["keys"].shape[1],
        reader_rank=stored["reader_a.down"].shape[1],
        state_rank=stored["state_in"].shape[2],
        label_rank=stored["label_in"].shape[2],
        base_model_name_or_path=BASE_MODEL,
        **sizes,
    )
    generator = LoraGeneratorModel(config)
    closed_form = generator.closed_form
    outs = {module.name.split(".", 3)[3]: module.out_features for module in closed_form.reader_layout.modules}

    factors: dict[tuple[str, str], torch.Tensor] = {}
    for joined, parts in PARTS.items():
        sizes_of_parts = [outs[part] for part in parts]
        for part, b in zip(parts, stored[f"reader_b.{joined}"].split(sizes_of_parts, dim=1), strict=True):
            factors[f"model.layers.*.{part}", "lora_A"] = stored[f"reader_a.{joined}"]
            factors[f"model.layers.*.{part}", "lora_B"] = b.mT
    matrices = {f"{name}.weight" if name in MATRICES else name: t for name, t in stored.items() if "reader_" not in name}
    matrices |= {f"reader.{i}.weight": factors[block.kind, block.factor] for i, block in enumerate(closed_form.reader_layout.blocks)}
    closed_form.load_state_dict(matrices)
    return generator.eval()


@dataclass
class GeneratorOptions:
    tasks: str = field(metadata={"help": "Folder with train.jsonl.gz."})
    writer: str = field(default="benchmarks/real/runs/h200-8min.safetensors", metadata={"help": "Of train.py."})
    per_kind: int = field(default=2, metadata={"help": "Training tasks of each kind."})
    num_samples: int = field(default=16, metadata={"help": "Samples of each for the adapter to be learned."})
    num_examples: int = field(default=12, metadata={"help": "Examples for the adapter to be corrected."})
    steps: int = field(default=1000, metadata={"help": "Of the network's training."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of the network's training."})
    adapters: str = field(default="build/real/adapters", metadata={"help": "Where the adapters are kept."})
    output_dir: str = field(default="build/real/generator", metadata={"help": "Where the generator goes."})


class Corrections(Dataset):
    """Task vectors, each with what the network is to add to the closed form.

    Args:
        parts: Per task: `whole` and `few` `(num_weights,)`, adapters from many samples and from few;
            `described` and `shown` `(draws, num_task_vectors, task_vector_size)`, vectors of descriptions and examples.
        shared_weights (`torch.Tensor`): A.
    """

    def __init__(self, parts: list[dict[str, torch.Tensor]], shared_weights: torch.Tensor):
        self.parts, self.shared_weights = parts, shared_weights
        self.pairs = [(task, kind, draw) for task, part in enumerate(parts) for kind in ("described", "shown")
                      for draw in range(len(part[kind]))]  # fmt: skip
        self.task_vectors = torch.cat([part[kind] for part in parts for kind in ("described", "shown")])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        task, kind, draw = self.pairs[index]
        part = self.parts[task]
        return {"lora_weights": self._target(part, kind), "task_vector": part[kind][draw]}

    def each_adapter(self) -> Iterator[torch.Tensor]:
        """Yield every target once."""
        for part in self.parts:
            yield from (self._target(part, kind) for kind in ("described", "shown"))

    def _target(self, part: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        whole = part["whole"].float()
        return whole if kind == "described" else whole - part["few"].float()


@torch.no_grad()
def adapters_of(task: Task, generator: LoraGeneratorModel, base, tokenizer, options: GeneratorOptions) -> dict:
    """Return what [`Corrections`] needs of a task."""
    few = task.demo[: options.num_examples]
    extractor, descriptions = TaskVectorExtractor(SPEC), (task.description, *task.descriptions)
    parts = {
        "shown": extractor.vector(base, tokenizer, few),
        "described": torch.cat([extractor.vector(base, tokenizer, None, text) for text in descriptions]),
    }
    with frozen_base(base) as model:
        for name, samples in (("whole", task.train[: options.num_samples]), ("few", few)):
            reading = read_examples(tokenizer, samples, generator.config.template)
            parts[name] = generator.closed_form(model, reading).bfloat16()
    return parts


def main() -> None:
    (options,) = HfArgumentParser(GeneratorOptions).parse_args_into_dataclasses()
    base, tokenizer = load_base_model("smollm2")
    tasks = load_tasks(Path(options.tasks) / "train.jsonl.gz")
    generator = generator_of(
        options.writer, base, task_vector_spec=SPEC.to_dict(), num_task_vectors=len(SPEC.layers) * len(SPEC.pooling),
        training_tasks=[task.name for task in tasks] + [task["name"] for task in suite_tasks()],
        hidden_size=64, intermediate_size=128, basis_size=4, latent_size=16, condition_size=128,
    )  # fmt: skip
    folder = Path(options.adapters)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for task in tqdm(chosen(tasks, options.per_kind), desc="Writing adapters"):
        path = folder / f"{sha256_of(task.name)[:16]}.safetensors"
        if not path.exists():
            save_file(adapters_of(task, generator, base, tokenizer, options), path)
        parts.append(load_file(path))
    generator.closed_form.requires_grad_(False)
    args = LoraGeneratorTrainingArguments(
        options.output_dir, max_steps=options.steps, learning_rate=options.learning_rate,
        per_device_train_batch_size=32, report_to="none", save_strategy="no", logging_steps=20,
    )  # fmt: skip
    LoraGeneratorTrainer(generator, args, train_dataset=Corrections(parts, generator.shared_weights)).train()
    generator.without_encoder().to_int8().save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
