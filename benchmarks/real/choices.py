"""What was chosen on validation tasks, and what tells a good adapter.

    python -m benchmarks.real.choices --tasks DATA/real

Of the shipped generator's closed form, per task: right answers when the examples are read in one order and in two, and
at three strengths of the adapter; and of what is known without test samples: the gain in loss and the right answers on
the adapter's own examples, and on the half of them that an adapter from the other half never saw. What the output has
is kept.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_icm_lora import LoraGeneratorModel, Sample, Task, load_tasks, smollm2_generator_path
from hf_icm_lora.base_model import frozen_base, load_base_model
from hf_icm_lora.behaviour import batched_lora
from hf_icm_lora.completion import CompletionCollator, score_completions
from hf_icm_lora.files import read_json, write_json
from hf_icm_lora.provenance import run_metadata
from hf_icm_lora.reading import read_examples
from hf_icm_lora.report import bootstrap_interval, rank_correlation

ARMS = ("one_order", "two_orders", "strength_0.75", "strength_1.25")
SIGNS = ("gain_on_examples", "right_on_examples", "gain_on_left_out", "right_on_left_out")


@dataclass
class ChoiceOptions:
    tasks: str = field(metadata={"help": "Folder with validation.jsonl.gz."})
    num_tasks: int = field(default=40, metadata={"help": "Those with the shortest examples."})
    output: str = field(default="benchmarks/results/real_choices.json", metadata={"help": "Where the figures go."})


class Writer:
    """The generator's closed form on its base model."""

    def __init__(self, generator: LoraGeneratorModel, base, tokenizer):
        self.base, self.tokenizer, self.template = base, tokenizer, generator.config.template
        self.closed_form = generator.closed_form.requires_grad_(False)
        self.shared_weights = self.closed_form.shared_weights

    def write(self, examples, num_orders: int = 2) -> torch.Tensor:
        reading = read_examples(self.tokenizer, examples, self.template, num_orders=num_orders)
        with frozen_base(self.base) as base:
            return self.closed_form(base, reading)

    @torch.no_grad()
    def score(self, adapters: list[torch.Tensor], samples: tuple[Sample, ...]) -> list[tuple[float, float]]:
        """Return each adapter's share of right answers, and its loss per token."""
        batch = CompletionCollator(self.tokenizer, template=self.template)(list(samples) * len(adapters))
        with batched_lora(self.base, self.closed_form.layout, torch.stack(adapters), self.shared_weights):
            scores = score_completions(self.base, batch)
        parts = [part.unflatten(0, (len(adapters), -1)).sum(1) for part in scores]
        loss, num_tokens, exact = (part.double() for part in parts)
        return list(zip((exact / len(samples)).tolist(), (loss / num_tokens).tolist(), strict=True))


def figures(writer: Writer, task: Task, num_examples: int = 12, num_test: int = 32) -> dict[str, float]:
    """Return the figures of one task."""
    examples, half = task.demo[:num_examples], num_examples // 2
    one, whole = writer.write(examples, 1), writer.write(examples)
    nothing = torch.zeros_like(whole)
    tested = writer.score([one, whole, 0.75 * whole, 1.25 * whole], task.test[:num_test])
    own = writer.score([nothing, whole], examples)
    left_out = []
    for shown, hidden in ((examples[:half], examples[half:]), (examples[half:], examples[:half])):
        left_out.append(writer.score([nothing, writer.write(shown)], hidden))
    right, before, after = (
        statistics.mean(pair[adapter][what] for pair in left_out) for adapter, what in ((1, 0), (0, 1), (1, 1))
    )
    found = dict(zip(ARMS, (score[0] for score in tested), strict=True))
    found |= zip(SIGNS, (1 - own[1][1] / own[0][1], own[1][0], 1 - after / before, right), strict=True)
    return {name: round(value, 4) for name, value in found.items()}


def summary(tasks: dict[str, dict[str, float]]) -> dict[str, dict]:
    """Return each arm's right answers, and how well each sign ranks the tasks by them."""
    columns = {name: [task[name] for task in tasks.values()] for name in (*ARMS, *SIGNS)}
    right = {
        arm: {"right": statistics.mean(columns[arm]), "interval": bootstrap_interval(columns[arm])} for arm in ARMS
    }
    return right | {
        sign: {"rank_correlation": rank_correlation(columns[sign], columns["two_orders"])} for sign in SIGNS
    }


def run(options: ChoiceOptions, base, tokenizer, generator: LoraGeneratorModel) -> dict:
    """Add what the output lacks, and return the report."""
    output = Path(options.output)
    known = read_json(output)["tasks"] if output.exists() else {}
    writer = Writer(generator, base, tokenizer)
    tasks = load_tasks(Path(options.tasks) / "validation.jsonl.gz")
    tasks.sort(key=lambda task: sum(len(s.prompt + s.completion) for s in task.demo[:12]))
    for task in tqdm(tasks[: options.num_tasks]):
        if task.name not in known:
            known[task.name] = figures(writer, task)
        write_json(output, {**run_metadata(seed=0), "summary": summary(known), "tasks": known})
    return read_json(output)


def main() -> None:
    (options,) = HfArgumentParser(ChoiceOptions).parse_args_into_dataclasses()
    generator = LoraGeneratorModel.from_pretrained(smollm2_generator_path())
    for name, figure in run(options, *load_base_model("smollm2"), generator)["summary"].items():
        print(name, figure)


if __name__ == "__main__":
    main()
