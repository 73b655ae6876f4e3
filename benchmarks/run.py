"""Speed, memory and growth: `python -m benchmarks.run`, or with `--quick` in ten minutes on 2 cores.

Measures the parts of `speed.py` and `growth.py`, `--parts generation vectors` some of them, prints their tables, and
writes `benchmarks/results/performance.json`; with `--quick` at small size, into `build/performance.json`. Parts that
are not measured stay as they are in the file. On a machine that does nothing else, please.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from benchmarks import growth, speed
from benchmarks.suite import page
from benchmarks.suite.bench import kept, options_of, write

SMALLEST = "SmolLM2, q and v, rank 8"  # of the sizes of adapters


@dataclass
class RunOptions:
    quick: bool = field(default=False, metadata={"help": "Small sizes and few rounds."})
    parts: list[str] = field(default_factory=lambda: ["generation", "vectors", "training", "collection", "growth"])
    output: str | None = field(default=None, metadata={"help": "Where the figures go."})


def ratios(report: dict) -> dict:
    """Return the figures that the project aims at, out of the parts that were measured."""
    told = {}
    if "generation" in report:
        seconds = report["generation"]["seconds"]
        for kind, label in (("", ""), ("compiled_", ", compiled")):
            ratio = seconds[f"generate into a slot{label}"] / seconds["PeftModel.load_adapter"]
            told[f"{kind}in_place_generation_over_disk_load"] = ratio
    if "training" in report:
        told["training_speed_over_paper_cvae"] = report["training"][SMALLEST]["ratio"]
    if "collection" in report:
        speeds = report["collection"]["tokens_per_second"]
        plain = speeds["plain Trainer, 1 process"]
        told["collection_speed_over_plain_trainer"] = speeds["collect_zoo, 2 processes"] / plain
        told["collection_speed_over_plain_trainer_in_one_process"] = speeds["collect_zoo, 1 process"] / plain
    if "vectors" in report:
        plain, one, batched = report["vectors"]["prompts_per_second"].values()
        told["task_vectors_speed_over_one_by_one"] = batched / one
        told["task_vectors_speed_over_plain_transformers"] = batched / plain
    return told


def streaming(report: dict) -> dict:
    """Return what the largest zoo took: all of it above what the same steps take on a small one."""
    first, *_, largest = report["growth"]["tables"]["tasks"]
    return {
        "tasks": largest["size"],
        "apparent_gib": largest["apparent_gib"],
        "extra_memory_gib": largest["gib_more"] - first["gib_more"],
        f"open_{largest['size']}_adapters_seconds": largest["open"],
    }


def main() -> None:
    options = options_of(RunOptions)
    logging.disable_progress_bar()
    output = Path(options.output or f"{'build' if options.quick else 'benchmarks/results'}/performance.json")
    report = kept(output, {})
    quick = options.quick
    parts = {
        "generation": lambda: speed.generation(rounds=3 if quick else 15),
        "vectors": lambda: speed.vectors(rounds=1 if quick else 5),
        "training": lambda: speed.training(rounds=1 if quick else 5, names=[SMALLEST] if quick else None),
        "collection": lambda: speed.collection(rounds=1 if quick else 5, steps=4 if quick else 16),
        "growth": lambda: growth.growth(
            tasks=[10, 300] if quick else [10, 100, 1000, 10000],
            millions=[0.1, 0.5] if quick else [0.1, 0.5, 2.5, 10, 20],
            ranks=[1, 8] if quick else [1, 4, 16, 64],
        ),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.parts:
        report[name] = parts[name]()
        report["ratios"] = ratios(report)
        report |= {"streaming": streaming(report)} if "growth" in report else {}
        write(output, report)
        print(page.performance({name: report[name]}), flush=True)
    print(json.dumps({key: report[key] for key in ("ratios", "streaming") if key in report}, indent=2))


if __name__ == "__main__":
    main()
