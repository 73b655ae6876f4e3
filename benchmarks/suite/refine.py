"""A head start against none: `python benchmarks/suite/refine.py` fine-tunes on a few examples, from two beginnings.

For each task and number of steps: recovered gain and seconds of the generated adapter after so many steps on the
examples, and of as many steps from B = 0. Each number of steps is a run of its own, whose learning rate falls to zero.
While settings are still being chosen, leave `--split validation` as it is.
"""

import statistics
import time
from dataclasses import dataclass, field

import torch
from bench import Bench, options_of, summary, write
from page import refine
from tqdm import tqdm

from hf_icm_lora.evaluation import FINE_TUNE_RATE


@dataclass
class RefineOptions:
    generator: str | None = field(default=None, metadata={"help": "By default what train.py made."})
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py, for the oracles."})
    split: str = field(default="validation", metadata={"help": "Of splits.json."})
    num_examples: int = field(default=16, metadata={"help": "Examples per task."})
    steps: list[int] = field(default_factory=lambda: [0, 5, 10, 20, 40])
    num_tasks: int | None = field(default=None, metadata={"help": "Of the split, by default all."})
    output: str = field(default="benchmarks/results/refine.json", metadata={"help": "Where the figures go."})


@torch.no_grad()
def main() -> None:
    options = options_of(RefineOptions)
    bench = Bench(options.zoo, options.generator)
    read, decode = bench.extractor.vector, bench.generator.decode_task_vector  # loaded before anything is timed
    table: dict[str, dict[str, dict[int, dict[str, float]]]] = {"refined": {}, "fine_tuned": {}}
    for name in tqdm(bench.names(options.split)[: options.num_tasks], desc="Tasks"):
        examples = bench.suite[name].demo[: options.num_examples]
        start = time.perf_counter()
        generated = decode(read(bench.base, bench.tokenizer, examples))
        generation = time.perf_counter() - start
        example_loss = bench.example_loss(examples)
        for row, beginning, before, rate in (
            ("refined", generated, generation, {}),
            ("fine_tuned", torch.zeros_like(generated), 0.0, {"learning_rate": FINE_TUNE_RATE}),
        ):
            table[row][name] = {}
            for steps in options.steps:
                start = time.perf_counter()
                weights = example_loss.refine(beginning, steps, **rate)
                seconds = before + time.perf_counter() - start
                table[row][name][steps] = {"recovered_gain": bench.gain(weights, name), "seconds": seconds}

    curves = {
        row: {
            steps: {
                **summary((task[steps]["recovered_gain"] for task in tasks.values()), "mean", "min"),
                "median_seconds": statistics.median(task[steps]["seconds"] for task in tasks.values()),
            }
            for steps in options.steps
        }
        for row, tasks in table.items()
    }
    report = {"split": options.split, "num_examples": options.num_examples, "curves": curves, "tasks": table}
    write(options.output, report)
    print(refine(report))


if __name__ == "__main__":
    main()
