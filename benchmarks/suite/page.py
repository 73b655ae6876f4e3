"""Put the tables of `benchmarks/results` into the pages that show them: `python benchmarks/suite/page.py`.

In a page, the rows of the report `benchmarks/results/NAME.json` stand between `<!-- NAME -->` and `<!-- end -->`.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/source/benchmark.md",
    "docs/source/evaluation.md",
    "hf_icm_lora/smollm2_generator/README.md",
)
TITLES = {
    "seen": "seen tasks",
    "unseen": "unseen tasks of known families",
    "unseen_family": "unseen families",
    "validation": "validation tasks",
    "validation_family": "validation family",
}


def number(value: float | None) -> str:
    """Format G, without a minus before nothing."""
    return "-" if value is None else re.sub(r"^-(0\.00)$", r"\1", f"{value:.2f}")


def table(name: str) -> str:
    """Return every row of a report, with G and exact matches of each split."""
    splits = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["splits"]
    head = ["row"]
    for split, rows in splits.items():
        head += [f"{TITLES[split]} ({len(rows['base']['tasks'])}): mean G", "median", "min", "exact"]
    lines = [head, ["---"] * len(head)]
    for row in dict.fromkeys(row for rows in splits.values() for row in rows):
        cells = [f"**{row}**" if row == "generated" else row]
        for rows in splits.values():
            if summary := rows.get(row):
                cells += [number(summary[f"{kind}_recovered_gain"]) for kind in ("mean", "median", "min")]
                cells.append(f"{100 * summary['exact_match']:.0f} %")
            else:
                cells += ["-"] * 4
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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


if __name__ == "__main__":
    main()
