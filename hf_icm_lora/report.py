"""The report of an evaluation: figures from the scores of tasks, written, read, and shown as tables."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CorruptFileError
from .files import commit_file, read_json, write_json

REPORT_FILE, TABLES_FILE = "evaluation.json", "evaluation.md"


def recovered_gain(base_loss: float, loss: float, task_lora_loss: float) -> float | None:
    """Return G clipped to [-1, 1], or `None` where fine-tuning itself gained nothing, so that G means nothing.

    A loss that is not finite is the worst there is: -1.

    Args:
        base_loss (`float`): Loss of the base model alone, in nats per token.
        loss (`float`): That of the adapter, or the prompt, to be judged, on the same samples.
        task_lora_loss (`float`): That of the LoRA which was fine-tuned on the task.

    Example:
        >>> recovered_gain(base_loss=3.0, loss=1.5, task_lora_loss=1.0)
        0.75
    """
    gain = base_loss - task_lora_loss
    if not gain > 0:
        return None
    return max(-1.0, min(1.0, (base_loss - loss) / gain)) if math.isfinite(loss) else -1.0


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, ties sharing their mean rank; `None` if one side is constant.

    Example:
        >>> rank_correlation([0.1, 0.5, 0.9], [3.0, 2.0, 1.0])
        -1.0
    """
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    ranks = ([sum((o < v) + (o == v) / 2 for o in values) for v in values] for values in (x, y))
    return statistics.correlation(*ranks)


def summarize(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Put the scores of the tasks of one split together.

    Args:
        scores (`Mapping`): Row -> task -> `loss`, `exact_match`, and what else is known of that row's adapter:
            `nearest_seen_distance`, `gain_on_examples`. The rows `base` and `task_lora` are what G is measured by.

    Returns:
        `dict`: Row -> mean, median and minimum of G, mean loss and exact match, and `tasks`: the scores of each, with
        its `recovered_gain`. Where they are known, also the mean `nearest_seen_distance`, and the rank correlation of
        `gain_on_examples` with G.

    Example:
        >>> losses = {"base": 3.0, "task_lora": 1.0, "generated": 1.5}
        >>> rows = summarize({row: {"capital": {"loss": x, "exact_match": 0.0}} for row, x in losses.items()})
        >>> rows["generated"]["mean_recovered_gain"]
        0.75
    """
    return {row: _summary(_with_gains(own, scores["base"], scores["task_lora"])) for row, own in scores.items()}


def _with_gains(scores: Mapping, base: Mapping, task_lora: Mapping) -> dict[str, dict[str, Any]]:
    return {
        name: {**score, "recovered_gain": recovered_gain(base[name]["loss"], score["loss"], task_lora[name]["loss"])}
        for name, score in scores.items()
    }


def _summary(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    gains = [score["recovered_gain"] for score in tasks.values() if score["recovered_gain"] is not None]
    summary: dict[str, Any] = {
        "mean_recovered_gain": statistics.mean(gains) if gains else None,
        "median_recovered_gain": statistics.median(gains) if gains else None,
        "min_recovered_gain": min(gains, default=None),
        "mean_loss": statistics.mean(score["loss"] for score in tasks.values()),
        "exact_match": statistics.mean(score["exact_match"] for score in tasks.values()),
        "tasks": tasks,
    }
    distances = [score["nearest_seen_distance"] for score in tasks.values() if "nearest_seen_distance" in score]
    if distances:
        summary["nearest_seen_distance"] = statistics.mean(distances)
    judged = [score for score in tasks.values() if "gain_on_examples" in score and score["recovered_gain"] is not None]
    if judged:  # does the gain on the examples tell G?
        signs, gains = ([score[what] for score in judged] for what in ("gain_on_examples", "recovered_gain"))
        summary["gain_on_examples_correlation"] = rank_correlation(signs, gains)
    return summary


def stored_bytes(generator) -> dict[str, int]:
    """Return what a generator and its adapters take to store.

    Args:
        generator (`LoraGeneratorModel`): As it is to be stored, without its encoder and in 8 bits for instance.

    Returns:
        `dict`: `generator_bytes`; in fp16 `adapter_bytes`, what varies of one adapter, and `shared_bytes`, what all
        share; `break_even_tasks`, the number of adapters from which on the generator is not larger than all of them.
    """
    generator_bytes = sum(tensor.numel() * tensor.element_size() for tensor in generator.state_dict().values())
    adapter_bytes, shared_bytes = 2 * generator.layout.num_weights, 2 * generator.layout.num_shared_weights
    return {
        "generator_bytes": generator_bytes,
        "adapter_bytes": adapter_bytes,
        "shared_bytes": shared_bytes,
        "break_even_tasks": max(0, -(-(generator_bytes - shared_bytes) // adapter_bytes)),
    }


def storage(generator, num_seen_tasks: int) -> dict[str, Any]:
    """Return `stored_bytes`, and beside them the size of the generator over that of one adapter per seen task."""
    size_of = stored_bytes(generator)
    all_adapters = size_of["adapter_bytes"] * num_seen_tasks + size_of["shared_bytes"]
    ratio = round(size_of["generator_bytes"] / all_adapters, 3)
    return size_of | {"num_seen_tasks": num_seen_tasks, "ratio": ratio}


def write_report(report: Mapping[str, Any], output_dir: str | Path) -> None:
    """Write `evaluation.json` and `evaluation.md` into a directory, which is made if there is none."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / REPORT_FILE, report)
    with commit_file(output_dir / TABLES_FILE) as temporary:
        temporary.write_text(format_report(report), encoding="utf-8")


def read_report(path: str | Path) -> dict[str, Any]:
    """Read the `evaluation.json` that [`write_report`] wrote.

    Raises:
        CorruptFileError: if the file is no report.
        OSError: if there is no such file, or it cannot be read.
    """
    try:
        report = read_json(path)
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: expected a report in JSON, as evaluate_generator writes: {error}.") from error
    if not isinstance(report, dict) or "splits" not in report:
        raise CorruptFileError(f"{path}: expected a report with `splits`, as evaluate_generator writes.")
    return report


def format_report(report: Mapping[str, Any]) -> str:
    """Return a report as Markdown: a table per split, then what the rows are, storage and times.

    Args:
        report (`Mapping`): From [`evaluate_generator`].

    Example:
        >>> print(format_report(read_report("evaluation/evaluation.json")))  # doctest: +SKIP
    """
    parts = [_table(split, rows) for split, rows in report["splits"].items()]
    parts.append("\n".join(f"- `{row}`: {description}" for row, description in report["rows"].items()))
    store, seconds = report["storage"], report["seconds"]
    parts.append(
        f"Generator {store['generator_bytes'] / 1e6:.1f} MB, one fp16 adapter {store['adapter_bytes'] / 1e6:.2f} MB: "
        f"smaller than {store['break_even_tasks']} adapters or more ({store['num_seen_tasks']} seen tasks).\n"
        f"Seconds: task vector {seconds['task_vector']:.2f}, generation {seconds['rows']['generated']:.3f}, "
        f"attachment {seconds['attachment']:.3f}; fine-tuning one LoRA {seconds['fine_tuning']:.1f}."
    )
    return "\n\n".join(parts) + "\n"


def _table(split: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"### {split.replace('_', ' ').capitalize()} tasks ({len(rows['base']['tasks'])})\n",
        "| row | mean G | median G | min G | loss | exact match |",
        "|---|---|---|---|---|---|",
    ]
    for row, summary in rows.items():
        gains = [summary[f"{kind}_recovered_gain"] for kind in ("mean", "median", "min")]
        cells = ["-" if gain is None else f"{gain:.2f}" for gain in gains]
        cells += [f"{summary['mean_loss']:.3f}", f"{100 * summary['exact_match']:.0f} %"]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    near = {row: rows[row].get("nearest_seen_distance") for row in ("generated", "task_lora", "mean_lora")}
    if None not in near.values():
        told = ", ".join(f"{row} {distance:.2f}" for row, distance in near.items())
        lines.append(f"\nDistance to the nearest other seen adapter, in the seen ones' deviation: {told}.")
    generated = rows["generated"]
    if (correlation := generated.get("gain_on_examples_correlation")) is not None:
        lines.append(f"\nRank correlation of G with the gain on the examples (row generated): {correlation:.2f}.")
    if excluded := [name for name, score in generated["tasks"].items() if score["recovered_gain"] is None]:
        lines.append(f"\nWithout G, since fine-tuning gained nothing: {', '.join(excluded)}.")
    return "\n".join(lines)
