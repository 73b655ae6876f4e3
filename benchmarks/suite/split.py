"""Which task of the built-in suite is for what, fixed before the first experiment: `python benchmarks/suite/split.py`.

Writes `benchmarks/suite/splits.json`. Inside a family the order of tasks is that of the hashes of their names, so that
nobody chose them. Development looks at `validation` only; the `unseen` splits are scored for the final table.

    unseen_family   all tasks of two families that no training touches
    unseen          one task of each other family, two of the largest ones
    validation      one task of every other family, and a family that no training touches
    seen            up to five tasks of each family, with a LoRA in the zoo
    samples         all that is left: its samples are trained on, and it has no LoRA
"""

import json
from hashlib import sha256
from pathlib import Path

from hf_icm_lora import built_in_tasks

SPLITS = Path(__file__).parent / "splits.json"
UNSEEN_FAMILIES = ("cities", "phrases")
VALIDATION_FAMILY = "amounts"
LARGEST = 60  # tasks of a family from which on two are unseen


def make_splits() -> dict[str, list[str]]:
    families: dict[str, list[str]] = {}
    for task in built_in_tasks():
        families.setdefault(task.family, []).append(task.name)
    splits: dict[str, list[str]] = {
        name: [] for name in ("unseen_family", "unseen", "validation_family", "validation", "seen", "samples")
    }
    for index, (family, names) in enumerate(sorted(families.items())):
        names = sorted(names, key=lambda name: sha256(name.encode()).digest())
        if family in UNSEEN_FAMILIES:
            splits["unseen_family"] += names
        elif family == VALIDATION_FAMILY:
            splits["validation_family"] += names
        else:
            for split, count in (
                ("unseen", 1 + (len(names) >= LARGEST)),
                ("validation", 1 - index % 2),
                ("seen", 5),
                ("samples", len(names)),
            ):
                splits[split] += names[:count]
                names = names[count:]
    return splits


if __name__ == "__main__":
    splits = make_splits()
    SPLITS.write_text(json.dumps(splits, indent=1) + "\n", encoding="utf-8")
    print({split: len(names) for split, names in splits.items()})
