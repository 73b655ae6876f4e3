"""Score the arms of bench.py on real tasks: `python -m benchmarks.real.run --tasks DATA/real`.

What the output has is kept, and only what it lacks is added, task by task: an interrupted call goes on. `--arms` and
`--splits` choose some. While anything is still being chosen, score `validation` only.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from benchmarks.real.bench import ARMS, Given, score
from hf_icm_lora import LoraGeneratorModel, Task, load_tasks, smollm2_generator_path
from hf_icm_lora.base_model import load_base_model
from hf_icm_lora.files import read_json, write_json
from hf_icm_lora.provenance import run_metadata
from hf_icm_lora.report import summarize


@dataclass
class RunOptions:
    tasks: str = field(metadata={"help": "Folder with validation.jsonl.gz and test_unseen.jsonl.gz."})
    splits: list[str] = field(default_factory=lambda: ["validation"], metadata={"help": "validation, test_unseen."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Of {', '.join(ARMS)}."})
    per_kind: int = field(default=1, metadata={"help": "Tasks of each kind: some kinds have many."})
    num_examples: int = field(default=12, metadata={"help": "Examples that each arm is given."})
    num_test: int = field(default=32, metadata={"help": "Test samples of each task."})
    by_label: bool = field(default=True, metadata={"help": "Classifications also by their most probable label."})
    generator: str | None = field(default=None, metadata={"help": "A folder; by default the shipped one."})
    output: str = field(default="benchmarks/results/real.json", metadata={"help": "Where the scores go."})


def chosen(tasks: list[Task], per_kind: int) -> list[Task]:
    """Return some tasks of each kind, the first ones of the file."""
    counts: dict[str | None, int] = {}
    kept = []
    for task in tasks:
        counts[task.family] = counts.get(task.family, 0) + 1
        if counts[task.family] <= per_kind:
            kept.append(task)
    return kept


def summaries(scores: dict[str, dict[str, dict]], tasks: list[Task]) -> dict[str, dict]:
    """Return the summary of each arm over kinds of equal weight, with the scores of each task."""
    names = [task.name for task in tasks]
    whole = {arm: {name: own[name] for name in names} for arm, own in scores.items() if all(n in own for n in names)}
    found = {arm: {"tasks": own} for arm, own in scores.items()}
    if "base" in whole:
        found |= summarize(whole, {task.name: task.family for task in tasks})
    return found


def run(options: RunOptions, base, tokenizer, generator: LoraGeneratorModel) -> None:
    """Score what the output lacks."""
    output = Path(options.output)
    report = read_json(output) if output.exists() else {"splits": {}}
    for split in options.splits:
        tasks = chosen(load_tasks(Path(options.tasks) / f"{split}.jsonl.gz"), options.per_kind)
        arms = {arm: known["tasks"] for arm, known in report["splits"].get(split, {}).items()}
        for index, task in enumerate(progress := tqdm(tasks, desc=split)):
            wrong = tasks[(index + len(tasks) // 2) % len(tasks)]
            given = Given(task, wrong, base, tokenizer, generator, num_examples=options.num_examples)
            for name in options.arms:
                progress.set_postfix_str(f"{task.name}, {name}")
                known = arms.setdefault(name, {})
                if task.name not in known:
                    known[task.name] = score(given, ARMS[name], task.test[: options.num_test], options.by_label)
            report["splits"][split] = summaries(arms, tasks)
            about = {"num_examples": options.num_examples, "by_family": True}
            rows = {arm: str(ARMS[arm]) for arm in arms}
            write_json(output, {**run_metadata(seed=0), **about, "rows": rows, "splits": report["splits"]})
        for name in options.arms:
            right = [scores["exact_match"] for scores in arms[name].values()]
            print(f"{split}, {name}: {sum(right) / len(right):.3f} of {len(right)} tasks")


def main() -> None:
    (options,) = HfArgumentParser(RunOptions).parse_args_into_dataclasses()
    generator = LoraGeneratorModel.from_pretrained(options.generator or smollm2_generator_path())
    run(options, *load_base_model("smollm2"), generator)


if __name__ == "__main__":
    main()
