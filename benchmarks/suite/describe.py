"""Adapters from a sentence: `python benchmarks/suite/describe.py` scores descriptions, other words for them, and both.

Mean recovered gain of adapters generated from the suite's description of each task, from the same description in other
words (fixed rules, below), from 12 examples, and from 12 examples and the description together; the last two also with
`fit_scale`. While settings are still being chosen, score `--splits validation` only, into another file.
"""

import re
from dataclasses import dataclass, field

import torch
from bench import Bench, options_of, summary, write
from page import describe

# The first rule that matches is used once.
RULES = (
    (r"^Translate the (.+) from (\w+) into (\w+)\.$", r"You get the \1 in \2. What is it called in \3?"),
    (r"^Translate (.+) into (\w+)\.$", r"What is \1 in \2?"),
    (r"^Say whether (.+)\.$", r"Answer the question whether \1."),
    (r"^Say that (.+)\.$", r"Make a phrase which tells that \1."),
    (r"^Write (the \w+) in (\w+) words\.$", r"Spell out \1 in \2."),
    (r"^(?:Give|Name) (.+)\.$", r"What is \1?"),
    (r"^Write (.+)\.$", r"Your answer should be \1."),
    (r"^(\w)(.*)\.$", r"I want you to do this: \1\2."),
)


@dataclass
class DescribeOptions:
    generator: str | None = field(default=None, metadata={"help": "By default what train.py made."})
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py, for the oracles."})
    splits: list[str] = field(
        default_factory=lambda: ["validation", "seen", "unseen", "unseen_family"], metadata={"help": "Of splits.json."}
    )
    output: str = field(default="benchmarks/results/describe.json", metadata={"help": "Where the figures go."})


def reword(description: str) -> str:
    """Say a description of the suite in other words.

    Example:
        >>> reword("Translate the name of the country into Slovak.")
        'What is the name of the country in Slovak?'
    """
    for pattern, replacement in RULES:
        if re.match(pattern, description):
            return re.sub(pattern, replacement, description)
    raise ValueError(f"No rule for {description!r}.")


@torch.no_grad()
def main() -> None:
    options = options_of(DescribeOptions)
    bench = Bench(options.zoo, options.generator)

    def adapters(name: str) -> dict[str, torch.Tensor]:
        task = bench.suite[name]
        examples, made = task.demo[:12], {}
        for row, given in {
            "description": {"description": task.description},
            "reworded": {"description": reword(task.description)},
            "examples": {"examples": examples},
            "both": {"examples": examples, "description": task.description},
        }.items():
            made[row] = bench.generator.decode_task_vector(bench.vector(**given))
            if "examples" in given:
                losses = bench.example_loss(examples).at_scales(made[row])
                made[f"{row}, scaled"] = bench.zoo.layout.scaled(made[row], min(losses, key=losses.get))
        return made

    report: dict = {"splits": {}}
    for split in options.splits:
        rows = bench.gains(bench.names(split), adapters, split)
        report["splits"][split] = {
            row: {**summary(gains.values(), "mean", "median", "min"), "tasks": gains} for row, gains in rows.items()
        }
        write(options.output, report)
    print(describe(report))


if __name__ == "__main__":
    main()
