"""One LoRA for all training tasks together: `python -m benchmarks.real.multi_task --tasks DATA/real`.

It knows no task by its condition: what a generator is worth must show above it. Kinds of task are drawn alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from benchmarks.real.bench import MULTI_TASK, train_lora
from hf_icm_lora import Sample, Task, load_tasks
from hf_icm_lora.base_model import load_base_model
from hf_icm_lora.completion import DEFAULT_TEMPLATE


@dataclass
class MultiTaskOptions:
    tasks: str = field(metadata={"help": "Folder with train.jsonl.gz."})
    steps: int = field(default=600, metadata={"help": "Of training."})
    batch_size: int = field(default=16, metadata={"help": "Samples of a step, each of another task."})
    learning_rate: float = field(default=5e-4, metadata={"help": "At the beginning."})
    longest: int = field(default=200, metadata={"help": "Characters of a sample; longer ones are left out."})
    output_dir: str = field(default=MULTI_TASK, metadata={"help": "Where the adapter goes."})


def batches(tasks: list[Task], size: int, longest: int) -> Iterator[list[Sample]]:
    """Yield batches without end: a kind, a task of it and a sample of that for each place."""
    generator = torch.Generator().manual_seed(0)
    kinds: dict[str | None, list[list[Sample]]] = {}
    for task in tasks:
        if samples := [sample for sample in task.train if len(sample.prompt + sample.completion) <= longest]:
            kinds.setdefault(task.family, []).append(samples)
    by_kind = list(kinds.values())

    def one_of(choices: list):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    while True:
        yield [one_of(one_of(one_of(by_kind))) for _ in range(size)]


def main() -> None:
    (options,) = HfArgumentParser(MultiTaskOptions).parse_args_into_dataclasses()
    base, tokenizer = load_base_model("smollm2")
    tasks = load_tasks(Path(options.tasks) / "train.jsonl.gz")
    drawn = batches(tasks, options.batch_size, options.longest)
    model = train_lora(base, tokenizer, DEFAULT_TEMPLATE, drawn, options.steps, options.learning_rate)
    model.save_pretrained(options.output_dir, save_embedding_layers=False)


if __name__ == "__main__":
    main()
