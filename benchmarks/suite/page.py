"""Put the tables of `benchmarks/results` into the pages that show them: `python benchmarks/suite/page.py`.

In a page, the table of the report `benchmarks/results/NAME.json` stands between `<!-- NAME -->` and `<!-- end -->`.
The benchmarks print the same tables.
"""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard

from hf_icm_lora.report import score_table, share

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/source/benchmark.md",
    "docs/source/evaluation.md",
    "docs/source/measurements.md",
    "docs/source/real_tasks.md",
)
CARD = ROOT / "hf_icm_lora" / "smollm2_generator" / "README.md"
REAL_LEGEND = (
    "12 examples of each task, 32 other samples to answer, kinds with equal weight. Right answers: exact ones, of "
    "greedy decoding; in brackets 95 % of a bootstrap over kinds. Seconds are those of making the adapter, and MB its "
    "size in 16 bits."
)
TITLES = {
    "seen": "seen tasks",
    "unseen": "unseen tasks of known families",
    "unseen_family": "unseen families",
    "validation": "validation tasks",
    "validation_family": "validation family",
    "test_unseen": "test tasks",
}
Report = Mapping[str, Any]


def number(value: float | None, digits: int = 2, sign: str = "-") -> str:
    """Format a figure, without a sign before nothing. With `sign="+"` it has one also where it is positive."""
    return "-" if value is None else re.sub(r"^[-+](0\.0+)$", r"\1", f"{value:{sign}.{digits}f}")


def lines(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def evaluation(report: Report) -> str:
    """A table of every row for each split, right answers first."""
    return "\n\n".join(
        f"**{TITLES[split].capitalize()} ({len(rows['base']['tasks'])})**\n\n{score_table(rows)}"
        for split, rows in report["splits"].items()
    )


def ablations(report: Report) -> str:
    """Each arm's mean over seeds; and how far it is from the default's, on average and seed by seed."""

    def gains(runs: list[dict]) -> dict[int, float]:
        return {run["seed"]: statistics.mean(run["recovered_gains"].values()) for run in runs}

    rows, variances, default = [], [], gains(report["arms"].get("default", []))
    for arm, runs in report["arms"].items():
        own = gains(runs)
        apart = [gain - default[seed] for seed, gain in own.items() if seed in default and arm != "default"]
        loss = statistics.mean(statistics.mean(run["losses"].values()) for run in runs)
        variances += [statistics.variance(apart)] if len(apart) > 1 else []
        differences = (statistics.mean(apart), min(apart), max(apart)) if apart else (None,) * 3
        signed = [number(value, 3, "+") for value in differences]
        rows.append([arm, number(statistics.mean(own.values()), 3), *signed, number(loss, 3), str(len(runs))])
    table = lines(["arm", "mean G", "less the default's", "least seed", "largest seed", "loss", "seeds"], rows)
    if not variances:
        return table
    deviation = statistics.mean(variances) ** 0.5
    return (
        f"{table}\n\nStandard deviation of a difference over seeds, pooled over all arms: {number(deviation, 3)}; of "
        f"the mean of three: {number(deviation / 3**0.5, 3)}."
    )


def seeds(report: Report) -> str:
    """G of the same recipe from several seeds, their mean, G of their adapters' mean, and G of fine-tuning again."""
    splits, kinds = report["splits"], ("mean", "median", "min")
    figures = {
        row: [rows[row][kind] for rows in splits.values() for kind in kinds] for row in next(iter(splits.values()))
    }
    again, averaged = figures.pop("task_lora"), figures.pop("averaged")
    num_again = sum(len(rows["task_lora"]["recovered_gains"]) for rows in splits.values())
    rows = {f"generator, seed {seed}": values for seed, values in figures.items()}
    rows["*mean of these*"] = [statistics.mean(values) for values in zip(*figures.values(), strict=True)]
    rows |= {"their adapters averaged": averaged, f"fine-tuned again ({num_again} tasks)": again}
    head = ["adapters", *(f"{TITLES[s]}: mean G" if kind == "mean" else kind for s in splits for kind in kinds)]
    return lines(head, [[name, *map(number, values)] for name, values in rows.items()])


def refine(report: Report) -> str:
    """Both curves of G against gradient steps."""
    curves = report["curves"]
    head = ["steps", *(f"{row}: {kind}" for row in curves for kind in ("mean G", "min G", "seconds"))]
    rows = []
    for steps in next(iter(curves.values())):
        points = [curve[steps] for curve in curves.values()]
        figures = [(p["mean_recovered_gain"], p["min_recovered_gain"], p["median_seconds"]) for p in points]
        rows.append([str(steps), *(number(value) for point in figures for value in point)])
    return lines(head, rows)


def describe(report: Report) -> str:
    """What each kind of condition gives."""
    head = ["split", "from", "mean G", "median", "min"]
    return lines(head, [
        [f"{TITLES[split]} ({len(summary['tasks'])})", row,
         *(number(summary[f"{kind}_recovered_gain"]) for kind in ("mean", "median", "min"))]
        for split, rows in report["splits"].items() for row, summary in rows.items()
    ])  # fmt: skip


def examples(report: Report) -> str:
    """G against the number of examples, and against how many of them are wrong."""
    rows = ("generated", "few_shot_prompt")
    head = ["examples", "wrong ones", *(f"{row}: {kind} G" for row in rows for kind in ("mean", "min"))]
    return lines(head, [
        [str(setting["num_examples"]), str(setting["num_wrong"]),
         *(number(setting[row][f"{kind}_recovered_gain"]) for row in rows for kind in ("mean", "min"))]
        for setting in report["settings"]
    ])  # fmt: skip


def storage(report: Report) -> str:
    """Bytes of all seen adapters, and what they are worth after it."""
    head = [f"{report['num_tasks']} adapters as", "MB", "mean G", "min G"]
    return lines(head, [
        [label, number(row["bytes"] / 1e6), *(number(row[f"{kind}_recovered_gain"], 3) for kind in ("mean", "min"))]
        for label, row in report["rows"].items()
    ])  # fmt: skip


def cost(report: Report) -> str:
    """Tokens and milliseconds of one query."""
    head = ["a query with", "tokens", "milliseconds"]
    return lines(head, [[row, f"{v['tokens']:g}", number(v["milliseconds"], 1)] for row, v in report["rows"].items()])


def gauge(report: Report) -> str:
    """G of the generators that were trained on one set of LoRAs in several coordinates."""
    head = ["zoo", "seen: mean G", "largest difference of seeds", "unseen: mean G", "largest difference of seeds"]
    return lines(head, [
        [arm, *(number(row[split][kind], 3) for split in ("seen", "unseen") for kind in ("mean", "spread"))]
        for arm, row in report["summary"].items()
    ])  # fmt: skip


def llama_cpp(report: Report) -> str:
    """Agreement of llama.cpp and PEFT, without and with an adapter."""
    rows = (
        ("base model: llama.cpp and PEFT", "top1_agreement_base", "kl_base"),
        ("with the adapter: llama.cpp and PEFT", "top1_agreement_adapter", "kl_adapter"),
        ("PEFT: base model and adapter", "top1_effect_of_adapter", "kl_effect_of_adapter"),
    )
    head = ["compared", "positions with the same most likely token", "KL, nats"]
    return lines(head, [[label, number(report[top1], 3), number(report[kl], 4)] for label, top1, kl in rows])


def many_adapters(report: Report) -> str:
    """Milliseconds of each way to get an adapter into a model."""
    head = ["what", "milliseconds"]
    rows = [[name.replace("_", " "), number(value)] for name, value in report["milliseconds"].items()]
    return lines(head, rows)


def composition(report: Report) -> str:
    """G on a task against its part in a mixture of two; and by an analogy, without an example of the task."""
    head, rows = ["pairs, mixed"], []
    for kind, spaces in report["mixtures"].items():
        for space, curve in spaces.items():
            head = ["pairs, mixed", *(f"part {float(t):g}" for t in curve)]
            rows.append([f"{kind}, {space}", *map(number, curve.values())])
    analogies = [
        [
            target,
            "{} + {} - {}".format(*row["parts"]),
            *(number(value) for key, value in row.items() if key != "parts"),
        ]
        for target, row in report["analogies"].items()
    ]
    columns = ["task", "a + b - c", "own examples", "a alone", "b alone", "a + b - c"]
    return f"{lines(head, rows)}\n\n{lines(columns, analogies)}"


def growth(report: Report) -> str:
    """Time and memory against the number of tasks, and of weights in two ways."""
    parts = []
    for name, rows in report["tables"].items():
        columns = [key for key in rows[0] if key != "size"]
        cells = [[f"{x:,}" if isinstance(x, int) else f"{x:.3g}" for x in row.values()] for row in rows]
        cells.append(["*exponent*", *(number(report["exponents"][name].get(key)) for key in columns)])
        parts.append(
            lines(["tasks" if name == "tasks" else "weights", *(key.replace("_", " ") for key in columns)], cells)
        )
    return "\n\n".join(parts)


def generation(report: Report) -> str:
    """Milliseconds of each way to get one adapter into a live model."""
    head = ["an adapter from a known task vector", "milliseconds"]
    return lines(head, [[label, number(1000 * value)] for label, value in report["seconds"].items()])


def training(report: Report) -> str:
    """Speed and memory of both networks at each size of adapters."""
    rows = []
    for name, row in report.items():
        size = f"{row['num_weights'] / 1e6:.2f} million"
        speeds, memory = ([number(row[kind][n]) for n in row["gib"]] for kind in ("samples_per_second", "gib"))
        rows.append([name, size, str(row["batch_size"]), *speeds, number(row["ratio"], 1), *memory])
    paper = "the paper's network"
    return lines(["adapters", "weights", "batch", "samples / s", paper, "ratio", "GiB", paper], rows)


def collection(report: Report) -> str:
    """Speed of fine-tuning LoRAs, and the loss that it ends at."""
    return lines(["fine-tuning LoRAs by", "tokens / s", "loss at the end"], [
        [name, number(value, 0), number(report["losses"][name])] for name, value in report["tokens_per_second"].items()
    ])  # fmt: skip


def vectors(report: Report) -> str:
    """Speed of making task vectors."""
    rows = [[name, number(value, 1)] for name, value in report["prompts_per_second"].items()]
    return lines(["task vectors by", "prompts / s"], rows)


def performance(report: Report) -> str:
    """All tables of speed, memory and growth that a report has."""
    parts = (generation, vectors, training, collection, growth)
    return "\n\n".join(part(report[part.__name__]) for part in parts if part.__name__ in report)


def real(report: Report) -> str:
    """Right answers of each arm on real tasks, with what it takes to make: a table for each split."""
    return "\n\n".join(
        f"**{TITLES[split].capitalize()} ({len(arms['base']['tasks'])})**\n\n{real_table(arms)}"
        for split, arms in report["splits"].items()
    )


def real_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    whole = {name: arm for name, arm in arms.items() if "exact_match" in arm}  # the others lack tasks
    by_label = [what for what in ("label_accuracy",) if all(what in arm for arm in whole.values())]
    rows = []
    for name, arm in whole.items():
        seconds, size = (
            statistics.median(task[what] for task in arm["tasks"].values()) for what in ("seconds", "bytes")
        )
        made = [f"{seconds:.1f}", f"{size / 1e6:.1f}"] if size else ["-", "-"]
        rows.append([name, share(arm, "exact_match"), *(share(arm, what) for what in by_label), *made])
    return lines(["", "right answers", *("by label" for _ in by_label), "seconds", "MB"], rows)


def real_short(report: Report) -> str:
    """Right answers of the arms that decide, in the plain and in the chat template."""
    arms = report["splits"]["validation"]
    names = {
        "the base model alone": "base",
        "the examples in its prompt": "few_shot_prompt",
        "`in_context_adapter`": "closed_form",
        "**the shipped generator's adapter**": "generated",
        "the same from another task's examples": "wrong_condition",
        "an ordinary LoRA after 20 gradient steps on the examples": "peft_lora_examples_20",
    }
    rows = [
        [told, *(share(arms.get(f"{name}{chat}", {}), "exact_match") for chat in ("", "_chat"))]
        for told, name in names.items()
    ]
    return lines(["", "plain template", "chat template"], rows)


def real_ratios(report: Report) -> str:
    """Right answers of adapters over those of the prompt with the same examples; resampled over kinds, in pairs."""
    arms = report["splits"]["validation"]
    count = len(arms["base"]["tasks"])
    drawn = torch.randint(count, (4000, count), generator=torch.Generator().manual_seed(0))
    rows = []
    for name in ("generated", "closed_form"):
        cells = []
        for chat in ("", "_chat"):
            adapter, prompt = (
                torch.tensor([task["exact_match"] for task in arms[arm + chat]["tasks"].values()])
                for arm in (name, "few_shot_prompt")
            )
            ends = (adapter[drawn].mean(1) / prompt[drawn].mean(1)).quantile(torch.tensor([0.025, 0.975])).tolist()
            cells.append(f"{number((adapter.mean() / prompt.mean()).item())} [{number(ends[0])}, {number(ends[1])}]")
        rows.append([name, *cells])
    return lines(["right answers, of the prompt's", "plain template", "chat template"], rows)


def real_choices(report: Report) -> str:
    """What was chosen for the closed form, and what tells a good adapter without test samples."""
    names = {
        "examples read in one order": "one_order",
        "in two: forwards and backwards (chosen)": "two_orders",
        "in two, strength 0.75": "strength_0.75",
        "in two, strength 1.25": "strength_1.25",
    }
    rows = []
    for told, name in names.items():
        arm = report["summary"][name]
        rows.append([told, share({"right": arm["right"], "right_interval": arm["interval"]}, "right"), "-"])
    for sign in ("gain_on_examples", "right_on_examples", "gain_on_left_out", "right_on_left_out"):
        rows.append([sign.replace("_", " "), "-", number(report["summary"][sign]["rank_correlation"])])
    return lines([f"{len(report['tasks'])} tasks", "right answers", "rank correlation with them"], rows)


def real_rows(report: Report) -> str:
    """What each arm is."""
    return "\n".join(f"- `{arm}`: {text}" for arm, text in report["rows"].items())


TABLES = {
    function.__name__: function
    for function in (
        ablations,
        seeds,
        refine,
        describe,
        examples,
        storage,
        cost,
        gauge,
        llama_cpp,
        many_adapters,
        composition,
        performance,
        real,
        real_choices,
        real_ratios,
        real_rows,
        real_short,
    )
}


def report_of(name: str) -> Report:
    """Return a report in `benchmarks/results`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(name: str) -> str:
    """Return the table of a report."""
    report = "real" if name in ("real_rows", "real_ratios", "real_short") else name
    return TABLES.get(name, evaluation)(report_of(report))


def evaluated(card: str) -> str:
    """Return the shipped generator's card with its right answers on real tasks, which are also in its metadata."""
    report = report_of("real")
    made = f"Made by `{report['command']}` on {report['date'][:10]}."
    start, end = "<!-- evaluation -->", "<!-- end evaluation -->"
    shown = "\n\n".join((start, real(report), REAL_LEGEND, real_rows(report), made, end))
    renewed = ModelCard(re.sub(f"{start}.*?{end}", lambda _: shown, card, flags=re.DOTALL))
    data: Any = renewed.data
    data.model_name = "Generator of LoRA adapters for SmolLM2-135M-Instruct"
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            task_name="LoRA generation",
            dataset_type="tasks",
            dataset_name=f"{split} tasks of {len(arm['tasks'])} kinds",
            dataset_split=split,
            metric_type="exact_match",
            metric_name=f"right answers, {name}",
            metric_value=round(arm["exact_match"], 4),
        )
        for split, arms in report["splits"].items()
        for name, arm in arms.items()
        if "exact_match" in arm
    ]
    return str(renewed)


def filled(page: str) -> str:
    """Return a page with its tables as the results say."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda match: f"<!-- {match[1]} -->\n\n{table(match[1])}\n\n<!-- end -->",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    CARD.write_text(evaluated(CARD.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
