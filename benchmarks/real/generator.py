"""From what train.py made to the generator that ships: `python -m benchmarks.real.generator --tasks DATA/real`.

The closed form is the writer's, in the package's own terms. With memory tokens it also writes from a description, and
that is all. Without them the network, the conditional VAE, writes where there are no examples. It is trained here: on
adapters that the closed form wrote for training tasks, and on vectors of their descriptions. The adapters are kept, so
that an interrupted call goes on.
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
from benchmarks.real.writer import stored_sizes
from hf_icm_lora import (
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraGeneratorTrainingArguments,
    Task,
    TaskVectorExtractor,
    TaskVectorSpec,
    load_tasks,
)
from hf_icm_lora.base_model import load_base_model
from hf_icm_lora.files import read_json, sha256_of
from hf_icm_lora.generation import write_adapter
from hf_icm_lora.learned_closed_form import MATRICES, OF_MEMORY, closed_form_config

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SPEC = TaskVectorSpec(layers=(14, 22, 30))
NETWORK = {"hidden_size": 64, "intermediate_size": 128, "basis_size": 4, "latent_size": 16, "condition_size": 128}
UNUSED_NETWORK = NETWORK | {"basis_size": 1, "num_decoder_layers": 1, "condition_size": 1}
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
        num_memory=len(stored.get("memory", ())),
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
    matrices = {
        f"{name}.weight" if name in MATRICES + OF_MEMORY else name: tensor
        for name, tensor in stored.items()
        if "reader_" not in name
    }
    matrices |= {
        f"reader.{i}.weight": factors[block.kind, block.factor]
        for i, block in enumerate(closed_form.reader_layout.blocks)
    }
    closed_form.load_state_dict(matrices)
    return generator.eval()


@dataclass
class GeneratorOptions:
    tasks: str = field(metadata={"help": "Folder with train.jsonl.gz."})
    writer: str = field(default="benchmarks/real/runs/h200-8min.safetensors", metadata={"help": "Of train.py."})
    per_kind: int = field(default=2, metadata={"help": "Training tasks of each kind."})
    most: int = field(default=60, metadata={"help": "Characters of a sample, on average; longer tasks are left out."})
    num_samples: int = field(default=16, metadata={"help": "Samples that each adapter is written from."})
    steps: int = field(default=1000, metadata={"help": "Of the network's training."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of the network's training."})
    adapters: str = field(default="build/real/adapters", metadata={"help": "Where the adapters are kept."})
    output_dir: str = field(default="build/real/generator", metadata={"help": "Where the generator goes."})


class DescribedAdapters(Dataset):
    """Adapters, each with the vectors of its task's descriptions.

    Args:
        parts: Per task: `adapter` `(num_weights,)`, and `described` `(draws, num_task_vectors, task_vector_size)`.
        shared_weights (`torch.Tensor` of shape `(num_shared_weights,)`): A.
    """

    def __init__(self, parts: list[dict[str, torch.Tensor]], shared_weights: torch.Tensor):
        self.parts, self.shared_weights = parts, shared_weights
        self.task_vectors = torch.cat([part["described"] for part in parts])
        self.owners = [task for task, part in enumerate(parts) for _ in part["described"]]

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"lora_weights": self._adapter(self.owners[index]), "task_vector": self.task_vectors[index]}

    def each_adapter(self) -> Iterator[torch.Tensor]:
        """Yield every adapter once, `(num_weights,)`."""
        yield from map(self._adapter, range(len(self.parts)))

    def _adapter(self, task: int) -> torch.Tensor:
        return self.parts[task]["adapter"].float()


@torch.no_grad()
def adapter_of(task: Task, generator: LoraGeneratorModel, base, tokenizer, num_samples: int) -> dict:
    """Return what [`DescribedAdapters`] needs of a task."""
    extractor, descriptions = TaskVectorExtractor(SPEC), (task.description, *task.descriptions)
    weights = write_adapter(generator, base, tokenizer, task.train[:num_samples])
    vectors = [extractor.vector(base, tokenizer, None, text) for text in descriptions]
    return {"adapter": weights.bfloat16(), "described": torch.cat(vectors)}


def short(tasks: list[Task], most: int) -> list[Task]:
    """Return the tasks whose samples are short: reading is what takes the time."""
    return [t for t in tasks if sum(len(s.prompt + s.completion) for s in t.train[:16]) <= 16 * most]


def main() -> None:
    (options,) = HfArgumentParser(GeneratorOptions).parse_args_into_dataclasses()
    base, tokenizer = load_base_model("smollm2")
    tasks = load_tasks(Path(options.tasks) / "train.jsonl.gz")
    generator = generator_of(
        options.writer, base, task_vector_spec=SPEC.to_dict(), num_task_vectors=len(SPEC.layers) * len(SPEC.pooling),
        training_tasks=[task.name for task in tasks] + [task["name"] for task in suite_tasks()],
        **(UNUSED_NETWORK if stored_sizes(options.writer)["num_memory"] else NETWORK),
    )  # fmt: skip
    if not generator.closed_form.num_memory:
        train_network(generator, tasks, base, tokenizer, options)
    generator.without_encoder().to_int8().save_pretrained(options.output_dir)


def train_network(
    generator: LoraGeneratorModel, tasks: list[Task], base, tokenizer, options: GeneratorOptions
) -> None:
    """Train the network to write from descriptions what the closed form writes from examples."""
    folder = Path(options.adapters)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for task in tqdm(chosen(short(tasks, options.most), options.per_kind), desc="Writing adapters"):
        path = folder / f"{sha256_of(task.name)[:16]}.safetensors"
        if not path.exists():
            save_file(adapter_of(task, generator, base, tokenizer, options.num_samples), path)
        parts.append(load_file(path))
    generator.closed_form.requires_grad_(False)
    generator.config.training_runs = [read_json(Path(options.writer).with_suffix(".json"))]
    args = LoraGeneratorTrainingArguments(
        options.output_dir, max_steps=options.steps, learning_rate=options.learning_rate,
        per_device_train_batch_size=32, report_to="none", save_strategy="no", logging_steps=20,
    )  # fmt: skip
    LoraGeneratorTrainer(generator, args, train_dataset=DescribedAdapters(parts, generator.shared_weights)).train()


if __name__ == "__main__":
    main()
