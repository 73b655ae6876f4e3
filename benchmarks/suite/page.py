"""Put the figures of `benchmarks/results` into the pages that show them: `python benchmarks/suite/page.py`.

In a page, a table stands between `<!-- NAME -->` and `<!-- end -->`; NAME is one of the functions below.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/benchmark.md", "docs/evaluation.md", "hf_icm_lora/smollm2_generator/README.md")
TITLES = {
    "seen": "seen tasks",
    "unseen": "unseen tasks of known families",
    "unseen_family": "unseen families",
    "validation": "validation tasks",
    "validation_family": "validation family",
}
PLAIN_RIVALS = ("mean_lora", "nearest_lora", "top_k_merge", "ridge")


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def number(value: float | None, digits: int = 2) -> str:
    """Format a figure, without a minus before nothing."""
    return "-" if value is None else re.sub(r"^-(0\.?0*)$", r"\1", f"{value:.{digits}f}")


def gains(summary: dict) -> list[str]:
    return [number(summary[f"{kind}_recovered_gain"]) for kind in ("mean", "median", "min")]


def suite() -> str:
    """Every row of the final table, for each split."""
    return report_table("suite")


def shipped() -> str:
    """Every row of the table of the shipped generator, on validation tasks."""
    return report_table("shipped")


def demo() -> str:
    """Every row of the demo's first seed."""
    return report_table("demo")


def report_table(name: str) -> str:
    splits = read(name)["splits"]
    head = ["row"]
    for split, rows in splits.items():
        head += [f"{TITLES[split]} ({len(rows['base']['tasks'])}): mean G", "median", "min", "exact"]
    names = dict.fromkeys(name for rows in splits.values() for name in rows)
    lines = []
    for name in names:
        cells = [f"**{name}**" if name == "generated" else name]
        for rows in splits.values():
            summary = rows.get(name)
            cells += [*gains(summary), f"{100 * summary['exact_match']:.0f} %"] if summary else ["-"] * 4
        lines.append(cells)
    return table(head, lines)


def tasks() -> str:
    """G of every unseen task."""
    lines = []
    for split, rows in read("suite")["splits"].items():
        if split == "seen":
            continue
        for name, score in sorted(
            rows["generated"]["tasks"].items(), key=lambda item: -(item[1]["recovered_gain"] or -2)
        ):
            own = {row: summary["tasks"][name]["recovered_gain"] for row, summary in rows.items()}
            best = max(own[row] for row in PLAIN_RIVALS if own[row] is not None)
            shown = [own[row] for row in ("generated", "refined", "few_shot_prompt", "description") if row in own]
            lines.append([name, *map(number, [*shown, best, score["novelty"]])])
    return table(
        ["task", "generated", "refined", "few-shot prompt", "description", "best plain rival", "novelty"], lines
    )


def families() -> str:
    """Mean G of each family: seen tasks, unseen tasks, and the prompt on the unseen ones."""
    means: dict[str, dict[str, list[float]]] = {}
    for split, rows in read("suite")["splits"].items():
        for row in ("generated", "few_shot_prompt"):
            for name, score in rows[row]["tasks"].items():
                if score["recovered_gain"] is not None:
                    column = "seen" if split == "seen" else "unseen"
                    means.setdefault(name.split("/")[0], {}).setdefault(f"{row} {column}", []).append(
                        score["recovered_gain"]
                    )
    columns = ["generated seen", "generated unseen", "few_shot_prompt unseen"]
    lines = [
        [family, *(f"{statistics.mean(c[k]):.2f} ({len(c[k])})" if k in c else "-" for k in columns)]
        for family, c in sorted(means.items())
    ]
    return table(["family", "generated, seen tasks (how many)", "generated, unseen", "few-shot prompt, unseen"], lines)


def refine() -> str:
    """G against gradient steps, from the generated adapter and from none."""
    curves = read("refine")["curves"]
    lines = []
    for steps in curves["refined"]:
        cells = [steps]
        for row in ("refined", "fine_tuned"):
            point = curves[row][steps]
            cells += [number(point[f"{kind}_recovered_gain"]) for kind in ("mean", "min")]
            cells.append(f"{point['median_seconds']:.1f}")
        lines.append(cells)
    heads = [f"{start}: {what}" for start in ("generated", "from scratch") for what in ("mean G", "min G", "seconds")]
    return table(["steps", *heads], lines)


def descriptions() -> str:
    """G from a description, from the same in other words, from examples, and from both."""
    splits = read("descriptions")["splits"]
    head = ["made from", *(f"{TITLES[split]}: {kind} G" for split in splits for kind in ("mean", "median", "min"))]
    names = next(iter(splits.values()))
    return table(head, [[name, *(cell for rows in splits.values() for cell in gains(rows[name]))] for name in names])


def storage() -> str:
    """Bytes against G on seen tasks."""
    lines = [
        [name, f"{row['bytes'] / 1e6:.2f}", *(number(row[f"{kind}_recovered_gain"]) for kind in ("mean", "min"))]
        for name, row in read("storage")["rows"].items()
    ]
    return table(["stored as", "MB", "mean G", "min G"], lines)


def ablations() -> str:
    """Mean G of the validation tasks for every arm, over its seeds."""
    lines = []
    for name, runs in read("ablations")["arms"].items():
        means = [statistics.mean(run["recovered_gains"].values()) for run in runs]
        loss = statistics.mean(statistics.mean(run["losses"].values()) for run in runs)
        seconds = statistics.mean(run["seconds"] for run in runs)
        spread = number(max(means) - min(means), 3)
        lines.append(
            [name, number(statistics.mean(means), 3), spread, number(loss, 3), f"{seconds:.0f}", str(len(runs))]
        )
    return table(["change", "mean G", "largest difference of seeds", "loss", "seconds", "seeds"], lines)


TABLES: dict[str, Callable[[], str]] = {
    one.__name__: one for one in (suite, shipped, demo, tasks, families, refine, descriptions, storage, ablations)
}


def filled(page: str) -> str:
    """Return a page with its tables as the results say."""
    pattern = rf"<!-- ({'|'.join(TABLES)}) -->\n.*?<!-- end -->"
    return re.sub(pattern, lambda m: f"<!-- {m[1]} -->\n\n{TABLES[m[1]]()}\n\n<!-- end -->", page, flags=re.DOTALL)


def main() -> None:
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
