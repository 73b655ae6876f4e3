"""The demo's figures for several seeds of the generator: `python benchmarks/demo_seeds.py --seeds 0 1 2`.

Runs `examples/demo.py` once per seed on one zoo (a finished run is not repeated), prints mean G of every row with its
spread over seeds, and writes the first seed's report and the spread to `benchmarks/results/demo.json`.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from suite.bench import options_of

from hf_icm_lora.files import write_json
from hf_icm_lora.report import read_report

ROOT = Path(__file__).parent.parent


@dataclass
class SeedsArguments:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output_dir: str = field(default="build/demo", metadata={"help": "Of `make demo`; seed n > 0 goes to <it>-seed-n."})


def main() -> None:
    options = options_of(SeedsArguments)
    reports = []
    for seed in options.seeds:
        folder = Path(options.output_dir if seed == 0 else f"{options.output_dir}-seed-{seed}")
        if not (folder / "evaluation.json").exists():
            command = [ROOT / "examples/demo.py", "--output_dir", folder, "--zoo", Path(options.output_dir) / "zoo"]
            subprocess.run([sys.executable, *map(str, command), "--seed", str(seed)], check=True)
        reports.append(read_report(folder / "evaluation.json"))

    spread: dict[str, dict[str, dict]] = {}
    print("| split | row | mean G by seed | largest difference |\n|---|---|---|---|")
    for split, rows in reports[0]["splits"].items():
        for row in rows:
            gains = [report["splits"][split][row]["mean_recovered_gain"] for report in reports]
            difference = max(gains) - min(gains)
            spread.setdefault(split, {})[row] = {"mean_recovered_gain": gains, "difference": difference}
            print(f"| {split} | {row} | {', '.join(f'{gain:.3f}' for gain in gains)} | {difference:.3f} |")
    (ROOT / "benchmarks/results").mkdir(exist_ok=True)
    write_json(ROOT / "benchmarks/results/demo.json", reports[0] | {"seeds": options.seeds, "spread": spread})


if __name__ == "__main__":
    main()
