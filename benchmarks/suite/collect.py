"""The suite's zoo on SmolLM2-135M: `python benchmarks/suite/collect.py`, resumable, for all experiments to read.

Fine-tunes a LoRA for each task of `splits.json` that is scored or seen, 12 tasks of each whole family.
`--splits unseen seen --per_split 20` starts with some of them. `--every 3 --seed 1 --zoo build/suite/zoo-seed-1` makes
another zoo, of a third of them, from another seed; `--train_a` trains A, too, for the ablation.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import CollectionArguments, built_in_tasks, collect_zoo, fast_dtype, smollm2_path

SPLITS: dict[str, list[str]] = json.loads((Path(__file__).parent / "splits.json").read_text(encoding="utf-8"))
PER_FAMILY = 12  # tasks of a family that no training touches


def with_lora(split: str) -> list[str]:
    """Return the tasks of a split that get a LoRA, in an order that takes from all families alike."""
    families: dict[str, list[str]] = {}
    for name in SPLITS[split]:
        families.setdefault(name.split("/")[0], []).append(name)
    if split.endswith("family"):
        families = {family: names[:PER_FAMILY] for family, names in families.items()}
    ranked = [(rank, family, name) for family, names in families.items() for rank, name in enumerate(names)]
    return [name for *_, name in sorted(ranked)]


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
    (options,) = HfArgumentParser(CollectOptions).parse_args_into_dataclasses()
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype())
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    suite = {task.name: task for task in built_in_tasks()}
    tasks = [
        suite[name] for split in options.splits for name in with_lora(split)[:: options.every][: options.per_split]
    ]
    lora_config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments = CollectionArguments(
        output_dir="build/suite/collection",
        max_steps=48,
        eval_steps=12,
        per_device_train_batch_size=8,
        num_snapshots=2,
        seed=options.seed,
        freeze_a=not options.train_a,
    )
    collect_zoo(options.zoo, base, tokenizer, tasks, lora_config, arguments)


if __name__ == "__main__":
    main()
