"""Score a generator on the suite: `python benchmarks/suite/score.py`, after `collect.py` and `train.py`.

Every split of `splits.json` is a split of the report, with those of its tasks whose LoRA is in the zoo. What the
output has of the same generator is kept, and only rows that it lacks are added, so that an interrupted call goes on.
While settings are still being chosen, score `--splits validation validation_family` only, into another file.
"""

from dataclasses import dataclass, field
from hashlib import sha256

from bench import Bench, kept, options_of

from hf_icm_lora import LoraGeneratorModel, TaskVectorExtractor, evaluate_generator, format_report
from hf_icm_lora.evaluation import MORE_ROWS, ROWS
from hf_icm_lora.files import write_json
from hf_icm_lora.plots import write_plots

OF_SEEN = ("description", "both", "scaled")


@dataclass
class ScoreOptions:
    generator: str | None = field(default=None, metadata={"help": "By default what train.py made."})
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py."})
    splits: list[str] = field(default_factory=lambda: ["seen", "unseen", "unseen_family"])
    more_rows: list[str] = field(default_factory=lambda: list(MORE_ROWS))
    paper: str | None = field(default=None, metadata={"help": "A generator for the row paper_cvae."})
    refine_steps: int = field(default=20, metadata={"help": "Of the rows refined and fine_tuned."})
    output: str = field(default="benchmarks/results/suite.json", metadata={"help": "Where the report goes."})
    plots: str | None = field(default=None, metadata={"help": "A folder for pictures of the report (PNG)."})


def main() -> None:
    options = options_of(ScoreOptions)
    bench = Bench(options.zoo, options.generator)
    base, tokenizer, zoo, generator = bench.base, bench.tokenizer, bench.zoo, bench.generator
    others = {"paper_cvae": LoraGeneratorModel.from_pretrained(options.paper)} if options.paper else {}
    report = {"generator": sha256(bench.generator_path.joinpath("model.safetensors").read_bytes()).hexdigest()}
    before = kept(options.output, {})
    report = before if before.get("generator") == report["generator"] else report
    for split in options.splits:
        # Nobody refines an adapter, or chooses among several, for a task that has a LoRA.
        more_rows = [row for row in options.more_rows if split != "seen" or row in OF_SEEN]
        known = report.get("splits", {}).get(split, {})
        missing = [row for row in more_rows if row not in known]
        new = {name: other for name, other in others.items() if name not in known}
        if known and not missing and not new:
            continue
        # New rows are of the tasks of the old ones.
        names = known["base"]["tasks"] if known else bench.names(split)
        tasks = [bench.suite[name] for name in names]
        scored = evaluate_generator(
            generator, base, tokenizer, zoo, tasks, more_rows=missing, refine_steps=options.refine_steps,
            other_generators=new,
        )  # fmt: skip
        (rows,) = scored["splits"].values()
        rows |= known
        ordered = {row: rows[row] for row in dict.fromkeys((*ROWS, *MORE_ROWS, *rows)) if row in rows}
        known_rows, known_splits = report.get("rows", {}), report.get("splits", {})
        report = scored | report | {"rows": scored["rows"] | known_rows, "splits": {**known_splits, split: ordered}}
        write_json(options.output, report)
    print(format_report(report))
    if options.plots:
        # Those of seen tasks are there; with these, the map shows where the others lie.
        scored = [name for rows in report["splits"].values() for name in rows["base"]["tasks"]]
        extractor = TaskVectorExtractor(zoo.task_vectors.spec)
        zoo.subset(scored).add_task_vectors(extractor.extract(base, tokenizer, [bench.suite[name] for name in scored]))
        write_plots(options.plots, generator, zoo, report)


if __name__ == "__main__":
    main()
