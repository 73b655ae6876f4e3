"""The suite's zoo on SmolLM2-135M: `python benchmarks/suite/collect.py`, resumable, for all experiments to read.

Fine-tunes a LoRA for each task of `splits.json` that is scored or seen, 12 tasks of each whole family.
`--splits unseen seen --per_split 20` starts with some of them. `--every 3 --seed 1 --zoo build/suite/zoo-seed-1` makes
another zoo, of a third of them, from another seed; `--train_a` trains A, too, for the ablation.
"""

from dataclasses import dataclass, field

from bench import FINE_TUNING, LORA, Bench, options_of, with_lora

from hf_icm_lora import CollectionArguments, collect_zoo


@dataclass
class CollectOptions:
    zoo: str = field(default="build/suite/zoo", metadata={"help": "Where the zoo is."})
    splits: list[str] = field(
        default_factory=lambda: ["validation", "unseen", "seen", "validation_family", "unseen_family"],
        metadata={"help": "Of splits.json, in this order."},
    )
    per_split: int | None = field(default=None, metadata={"help": "Tasks of each split, by default all."})
    every: int = field(default=1, metadata={"help": "Take every n-th task of each split."})
    seed: int = field(default=42, metadata={"help": "Of A and of the order of samples."})
    train_a: bool = field(default=False, metadata={"help": "Whether A is trained instead of shared."})


def main() -> None:
    options, bench = options_of(CollectOptions), Bench()
    tasks = [
        bench.suite[name]
        for split in options.splits
        for name in with_lora(split)[:: options.every][: options.per_split]
    ]
    arguments = CollectionArguments(
        "build/suite/collection", **FINE_TUNING, num_snapshots=2, seed=options.seed, freeze_a=not options.train_a
    )
    collect_zoo(options.zoo, bench.base, bench.tokenizer, tasks, LORA, arguments)


if __name__ == "__main__":
    main()
