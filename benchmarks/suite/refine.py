"""A head start against none: `python benchmarks/suite/refine.py` fine-tunes on a few examples, from two beginnings.

For each task and number of steps: recovered gain and seconds of the generated adapter after so many steps on the
examples, and of as many steps from B = 0. Each number of steps is a run of its own, whose learning rate falls to zero.
While settings are still being chosen, leave `--split validation` as it is.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from collect import with_lora
from page import refine
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
from hf_icm_lora.evaluation import FINE_TUNE_RATE
from hf_icm_lora.files import write_json
from hf_icm_lora.model_card import run_metadata


@dataclass
class RefineOptions:
    generator: str | None = field(default=None, metadata={"help": "By default the shipped one."})
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py, for the oracles."})
    split: str = field(default="validation", metadata={"help": "Of splits.json."})
    num_examples: int = field(default=16, metadata={"help": "Examples per task."})
    steps: list[int] = field(default_factory=lambda: [0, 5, 10, 20, 40])
    num_tasks: int | None = field(default=None, metadata={"help": "Of the split, by default all."})
    output: str = field(default="benchmarks/results/refine.json", metadata={"help": "Where the figures go."})


@torch.no_grad()
def main() -> None:
    (options,) = HfArgumentParser(RefineOptions).parse_args_into_dataclasses()
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype()).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    suite = {task.name: task for task in built_in_tasks()}
    generator = LoraGeneratorModel.from_pretrained(options.generator or smollm2_generator_path())
    zoo = LoraZoo(options.zoo)
    extractor = TaskVectorExtractor(TaskVectorSpec(**generator.config.task_vector_spec))
    collate = CompletionCollator(tokenizer, template=zoo.template, row_length=64)
    names = [name for name in with_lora(options.split) if name in zoo][: options.num_tasks]
    table: dict[str, dict[str, dict[int, dict[str, float]]]] = {"refined": {}, "fine_tuned": {}}
    for name in tqdm(names, desc="Tasks"):
        task = suite[name]
        examples, batch = task.demo[: options.num_examples], collate(task.test)

        def loss(lora_weights: torch.Tensor, batch=batch) -> float:
            return behavioural_loss(base, zoo.layout, lora_weights[None], zoo.shared_weights, batch).item()

        start = time.perf_counter()
        generated = generator.decode_task_vector(extractor.vector(base, tokenizer, examples))
        generation = time.perf_counter() - start
        zero = torch.zeros_like(generated)
        example_loss = ExampleLoss(base, tokenizer, zoo.layout, zoo.shared_weights, examples, zoo.template)
        bounds = loss(zero), loss(zoo.lora_weights(name))
        for row, beginning, before, rate in (
            ("refined", generated, generation, {}),
            ("fine_tuned", zero, 0.0, {"learning_rate": FINE_TUNE_RATE}),
        ):
            table[row][name] = {}
            for steps in options.steps:
                start = time.perf_counter()
                weights = example_loss.refine(beginning, steps, **rate)
                seconds = before + time.perf_counter() - start
                gain = recovered_gain(bounds[0], loss(weights), bounds[1])
                table[row][name][steps] = {"recovered_gain": gain, "seconds": seconds}

    curves = {
        row: {
            steps: {
                "mean_recovered_gain": statistics.mean(task[steps]["recovered_gain"] for task in tasks.values()),
                "min_recovered_gain": min(task[steps]["recovered_gain"] for task in tasks.values()),
                "median_seconds": statistics.median(task[steps]["seconds"] for task in tasks.values()),
            }
            for steps in options.steps
        }
        for row, tasks in table.items()
    }
    report = {**run_metadata(0), "split": options.split, "num_examples": options.num_examples, "curves": curves}
    write_json(Path(options.output), report | {"tasks": table})
    print(refine(report))


if __name__ == "__main__":
    main()
