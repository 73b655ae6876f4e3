"""Does the gauge matter? `python benchmarks/gauge.py` trains generators on LoRAs of one seed and of many.

LoRAs of the same tasks, A and B both trained: once all from one seed, and once each from a seed of its own, as
adapters of different origin are. `train_generator` reads those of the seen tasks, without its second stage, and what
it makes is scored on seen and unseen tasks by mean recovered gain, with the zoo's own LoRAs as the oracle:

    one seed             the error of A and B as the loss
    mixed, raw           the same
    mixed, raw products  the error of B @ A as the loss: what is done by default

Collecting is resumable, and so are the runs, which are kept in the output. It also keeps three arms of a form that is
gone, since `mixed, raw products` was as good without it: `balanced`, factors in the form of a singular value
decomposition; `canonical`, those rotated towards the mean of all adapters; `products`, that with the error of B @ A.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from suite.bench import FINE_TUNING, LORA, SPEC, SPLITS, Bench, options_of, run_arms, with_lora, write
from suite.page import gauge

from hf_icm_lora import (
    CollectionArguments,
    LoraGeneratorModel,
    LoraZoo,
    RecipeArguments,
    Task,
    TaskVectorExtractor,
    collect_zoo,
    import_zoo,
    train_generator,
)

WORK = Path("build/gauge")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "basis_size": 32}


@dataclass
class GaugeOptions:
    num_seen: int = field(default=16, metadata={"help": "Tasks to train on."})
    num_unseen: int = field(default=8, metadata={"help": "Validation tasks to score."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = field(default=100, metadata={"help": "Of reconstruction."})
    output: str = field(default="benchmarks/results/gauge.json", metadata={"help": "Where the figures go."})


def collect(path: Path, base, tokenizer, tasks, seed: int) -> LoraZoo:
    arguments = CollectionArguments(
        str(WORK / "collection"), **FINE_TUNING, num_snapshots=1, seed=seed, freeze_a=False, learning_rate=5e-3
    )
    return collect_zoo(path, base, tokenizer, tasks, LORA, arguments)


def make_zoos(base, tokenizer, tasks) -> dict[str, LoraZoo]:
    """Collect all LoRAs, and put those of mixed seeds into one zoo."""
    zoos, folders = {"one seed": collect(WORK / "one-seed", base, tokenizer, tasks, seed=0)}, {}
    for seed, task in enumerate(tasks, start=1):
        own = collect(WORK / "mixed" / str(seed), base, tokenizer, [task], seed)
        folders[task.name] = own.task_folder(task.name) / f"step-{own.records[task.name]['best_step']}"
    zoos["mixed, raw"], _ = import_zoo(WORK / "imported", folders, base)
    return zoos


def train(bench: Bench, tasks: list[Task], steps: int, seed: int, **config) -> LoraGeneratorModel:
    """Train a generator on the LoRAs that the bench's zoo has of the tasks, and on nothing else."""
    arguments = RecipeArguments(
        str(WORK / "generator"), reconstruction_steps=steps, max_steps=0, seed=seed, report_to="none",
        save_strategy="no", logging_steps=50, disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    return train_generator(bench.zoo, bench.base, bench.tokenizer, tasks, arguments, **SIZES, **config)


def main() -> None:
    options, bench = options_of(GaugeOptions), Bench()
    names = {"seen": with_lora("seen")[: options.num_seen], "unseen": SPLITS["validation"][: options.num_unseen]}
    tasks = [bench.suite[name] for split in names.values() for name in split]
    zoos = make_zoos(bench.base, bench.tokenizer, tasks)
    extractor = TaskVectorExtractor(SPEC)
    vectors = extractor.extract(bench.base, bench.tokenizer, tasks)
    read = {task.name: extractor.vector(bench.base, bench.tokenizer, task.demo[:12]) for task in tasks}
    bench.base.requires_grad_(False)
    benches = {name: bench.beside(zoo) for name, zoo in zoos.items()}
    arms = {name: (own, {"reconstruction": "weights"}) for name, own in benches.items()}
    arms["mixed, raw products"] = (benches["mixed, raw"], {"reconstruction": "products"})

    def run(arm: tuple[Bench, dict], seed: int) -> dict:
        own, changes = arm
        own.zoo.add_task_vectors(vectors)
        start = time.perf_counter()
        generator = train(own, tasks[: len(names["seen"])], options.steps, seed, **changes)
        figures: dict = {"seconds": round(time.perf_counter() - start)}
        for split, scored in names.items():
            rows = own.gains(scored, lambda name: {"generated": generator.decode_task_vector(read[name])}, split)
            figures[split] = rows["generated"]
        return figures

    about = {"steps": options.steps}
    runs = run_arms(options.output, arms, options.seeds, run, about)
    summary = {}
    for arm, own in runs.items():
        means = {split: [statistics.mean(run[split].values()) for run in own] for split in names}
        summary[arm] = {
            split: {"mean": statistics.mean(values), "spread": max(values) - min(values)}
            for split, values in means.items()
        }
    share = {arm: row["seen"]["mean"] / summary["one seed"]["seen"]["mean"] for arm, row in summary.items()}
    about |= {"summary": summary, "shares": share}
    write(options.output, about | {"arms": runs})
    print(gauge(about))


if __name__ == "__main__":
    main()
