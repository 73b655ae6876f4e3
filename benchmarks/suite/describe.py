"""Adapters from a sentence: `python benchmarks/suite/describe.py` scores descriptions, other words for them, and both.

Mean recovered gain of adapters generated from the suite's description of each task, from the same description in other
words (fixed rules, below), from 12 examples, and from 12 examples and the description together; the last two also with
`fit_scale`. While settings are still being chosen, score `--splits validation` only, into another file.
"""

import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from collect import with_lora
from page import describe
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import (
    CompletionCollator,
    LoraGeneratorModel,
    LoraZoo,
    TaskVectorExtractor,
    TaskVectorSpec,
    built_in_tasks,
    fast_dtype,
    recovered_gain,
    smollm2_generator_path,
    smollm2_path,
)
from hf_icm_lora.behaviour import ExampleLoss, behavioural_loss
from hf_icm_lora.files import write_json
from hf_icm_lora.model_card import run_metadata

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
    generator: str | None = field(default=None, metadata={"help": "By default the shipped one."})
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
    (options,) = HfArgumentParser(DescribeOptions).parse_args_into_dataclasses()
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype()).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    suite = {task.name: task for task in built_in_tasks()}
    generator = LoraGeneratorModel.from_pretrained(options.generator or smollm2_generator_path())
    zoo = LoraZoo(options.zoo)
    extractor = TaskVectorExtractor(TaskVectorSpec(**generator.config.task_vector_spec))
    collate = CompletionCollator(tokenizer, template=zoo.template, row_length=64)
    report: dict = {**run_metadata(0), "splits": {}}
    for split in options.splits:
        rows: dict[str, dict[str, float]] = {}
        for name in tqdm([name for name in with_lora(split) if name in zoo], desc=split, leave=False):
            task = suite[name]
            batch, examples = collate(task.test), task.demo[:12]

            def loss(lora_weights: torch.Tensor, batch=batch) -> float:
                return behavioural_loss(base, zoo.layout, lora_weights[None], zoo.shared_weights, batch).item()

            bounds = loss(torch.zeros(zoo.layout.num_weights)), loss(zoo.lora_weights(name))
            for row, given in {
                "description": {"description": task.description},
                "reworded": {"description": reword(task.description)},
                "examples": {"examples": examples},
                "both": {"examples": examples, "description": task.description},
            }.items():
                weights = generator.decode_task_vector(extractor.vector(base, tokenizer, **given))
                made = {row: weights}
                if "examples" in given:
                    losses = ExampleLoss(
                        base, tokenizer, zoo.layout, zoo.shared_weights, examples, zoo.template
                    ).at_scales(weights)
                    made[f"{row}, scaled"] = zoo.layout.scaled(weights, min(losses, key=losses.get))
                for label, own in made.items():
                    gain = recovered_gain(bounds[0], loss(own), bounds[1])
                    if gain is not None:
                        rows.setdefault(label, {})[name] = gain
        report["splits"][split] = {
            row: {
                "mean_recovered_gain": statistics.mean(gains.values()),
                "median_recovered_gain": statistics.median(gains.values()),
                "min_recovered_gain": min(gains.values()),
                "tasks": gains,
            }
            for row, gains in rows.items()
        }
        write_json(Path(options.output), report)
    print(describe(report))


if __name__ == "__main__":
    main()
