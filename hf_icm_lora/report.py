"""The report of an evaluation: figures from the scores of tasks, written, read, and shown as tables."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import CorruptFileError
from .files import commit_file, read_json, write_json

REPORT_FILE, TABLES_FILE = "evaluation.json", "evaluation.md"
LEAST_GAIN = 0.1  # in right answers, of a fine-tuned LoRA: with less, the part that is recovered is mostly noise
LEGEND = (
    "Right answers: the share of test samples that greedy decoding answers exactly. Recovered: (right - base) / (task "
    "LoRA - base) of these shares, over the tasks where the task LoRA gains 10 points or more. In brackets: 95 % of a "
    "bootstrap over {drawn}. G: the same of losses; it mostly counts the form of the answers, which is learned long "
    "before the answers are right."
)


def recovered_accuracy(base: float, right: float, task_lora: float) -> float | None:
    """Return the part of fine-tuning's gain in right answers that is recovered, clipped to [-1, 1].

    It is `None` where fine-tuning itself gained less than 10 points.

    Args:
        base (`float`): Share of right answers of the base model alone, 0 to 1.
        right (`float`): That of the adapter, or the prompt, to be judged, on the same samples.
        task_lora (`float`): That of the LoRA which was fine-tuned on the task.

    Example:
        >>> recovered_accuracy(base=0.25, right=0.5, task_lora=0.75)
        0.5
    """
    gain = task_lora - base
    if gain < LEAST_GAIN - 1e-9:  # shares of 30 samples are not exact
        return None
    return max(-1.0, min(1.0, (right - base) / gain))


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


def family_means(values: Mapping[str, float], families: Mapping[str, str | None]) -> list[float]:
    """Return the mean of each family's tasks, so that a family with many tasks counts no more than one with few.

    Args:
        values (`Mapping[str, float]`): Task -> a figure.
        families (`Mapping[str, str]`): Task -> its family. A task without one is a family of its own.

    Example:
        >>> family_means({"a/1": 1.0, "a/2": 0.0, "b": 0.25}, {"a/1": "a", "a/2": "a"})
        [0.5, 0.25]
    """
    members: dict[tuple, list[float]] = {}
    for name, value in values.items():
        family = families.get(name)
        members.setdefault(("task", name) if family is None else ("family", family), []).append(value)
    return [statistics.mean(own) for own in members.values()]


def bootstrap_interval(values: Sequence[float], num_draws: int = 2000, seed: int = 0) -> list[float] | None:
    """Return where the mean lies in 95 % of draws of as many values, with replacement; `None` for fewer than two.

    Args:
        values (`Sequence[float]`): Of tasks, or of families of tasks.
        num_draws (`int`, *optional*, defaults to 2000), seed (`int`, *optional*, defaults to 0): Of a generator of its
            own: the same values have the same interval.

    Returns:
        `list[float]`: Lower and upper end.

    Example:
        >>> bootstrap_interval([0.5, 0.5])
        [0.5, 0.5]
    """
    if len(values) < 2:
        return None
    drawn = torch.randint(len(values), (num_draws, len(values)), generator=torch.Generator().manual_seed(seed))
    means = torch.tensor(values, dtype=torch.float64)[drawn].mean(1)
    return [round(end, 6) for end in means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()]


def summarize(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]], families: Mapping[str, str | None] | None = None
) -> dict[str, dict[str, Any]]:
    """Put the scores of the tasks of one split together, right answers first.

    Args:
        scores (`Mapping`): Row -> task -> `loss`, `exact_match`, and what else is known: `label_accuracy` of a
            classification; of that row's adapter, `nearest_seen_distance` and `gain_on_examples`. The rows `base` and
            `task_lora` are what recovered accuracy and G are measured by; a task without a LoRA has neither.
        families (`Mapping[str, str]`, *optional*): Task -> its family. With it, means and intervals are over families
            of equal weight instead of over tasks; medians and minima are always over tasks.

    Returns:
        `dict`: Row -> `exact_match`, the mean share of right answers, with `exact_match_interval`; mean, median and
        minimum of recovered accuracy and of G, with `mean_recovered_accuracy_interval`; `mean_loss`; and `tasks`: the
        scores of each, with its `recovered_accuracy` and `recovered_gain`. Where they are known, also the mean
        `label_accuracy` with its interval and the mean `nearest_seen_distance`, and the rank correlation of
        `gain_on_examples` with G.

    Example:
        >>> shares = {"base": 0.0, "task_lora": 0.8, "generated": 0.2}
        >>> rows = summarize({row: {"capital": {"loss": 1.0, "exact_match": x}} for row, x in shares.items()})
        >>> rows["generated"]["mean_recovered_accuracy"]
        0.25
    """
    return {
        row: _summary(_with_recovered(own, scores["base"], scores.get("task_lora", {})), families)
        for row, own in scores.items()
    }


def _with_recovered(scores: Mapping, base: Mapping, task_lora: Mapping) -> dict[str, dict[str, Any]]:
    def recovered(name: str, what: str, part: Callable[[float, float, float], float | None]) -> float | None:
        return part(base[name][what], scores[name][what], task_lora[name][what]) if name in task_lora else None

    return {
        name: {
            **score,
            "recovered_accuracy": recovered(name, "exact_match", recovered_accuracy),
            "recovered_gain": recovered(name, "loss", recovered_gain),
        }
        for name, score in scores.items()
    }


def _summary(tasks: dict[str, dict[str, Any]], families: Mapping[str, str | None] | None) -> dict[str, Any]:
    def known(what: str) -> dict[str, float]:
        return {name: score[what] for name, score in tasks.items() if score.get(what) is not None}

    def counted(what: str) -> list[float]:
        """The values that a mean is taken of."""
        return list(known(what).values()) if families is None else family_means(known(what), families)

    summary: dict[str, Any] = {}
    for what in ("exact_match", "label_accuracy"):
        if values := counted(what):
            summary |= {what: statistics.mean(values), f"{what}_interval": bootstrap_interval(values)}
    for what in ("recovered_accuracy", "recovered_gain"):
        values, means = list(known(what).values()), counted(what)
        summary[f"mean_{what}"] = statistics.mean(means) if means else None
        if what == "recovered_accuracy":
            summary[f"mean_{what}_interval"] = bootstrap_interval(means)
        summary[f"median_{what}"] = statistics.median(values) if values else None
        summary[f"min_{what}"] = min(values, default=None)
    summary["mean_loss"] = statistics.mean(counted("loss"))
    summary["tasks"] = tasks
    if distances := counted("nearest_seen_distance"):
        summary["nearest_seen_distance"] = statistics.mean(distances)
    gains, signs = known("recovered_gain"), known("gain_on_examples")
    if judged := [name for name in tasks if name in gains and name in signs]:  # does the gain on the examples tell G?
        correlation = rank_correlation([signs[name] for name in judged], [gains[name] for name in judged])
        summary["gain_on_examples_correlation"] = correlation
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
    """Return a report as Markdown: a table per split, right answers first, then what the rows are, storage and times.

    Args:
        report (`Mapping`): From [`evaluate_generator`].

    Example:
        >>> print(format_report(read_report("evaluation/evaluation.json")))  # doctest: +SKIP
    """
    parts = [_section(split, rows) for split, rows in report["splits"].items()]
    parts.append(LEGEND.format(drawn="families, which all have the same weight" if report["by_family"] else "tasks"))
    parts.append("\n".join(f"- `{row}`: {description}" for row, description in report["rows"].items()))
    store, seconds = report["storage"], report["seconds"]
    parts.append(
        f"Generator {store['generator_bytes'] / 1e6:.1f} MB, one fp16 adapter {store['adapter_bytes'] / 1e6:.2f} MB: "
        f"smaller than {store['break_even_tasks']} adapters or more ({store['num_seen_tasks']} seen tasks).\n"
        f"Seconds: task vector {seconds['task_vector']:.2f}, generation {seconds['rows']['generated']:.3f}, "
        f"attachment {seconds['attachment']:.3f}; fine-tuning one LoRA {seconds['fine_tuning']:.1f}."
    )
    return "\n\n".join(parts) + "\n"


def score_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the summaries of one split as a Markdown table.

    Args:
        rows (`Mapping`): Row -> its summary, as from `summarize`.
    """
    labels = any("label_accuracy" in summary for summary in rows.values())
    head = ["row", "right answers", *(["by label"] if labels else []), "recovered", "median", "min"]
    head += ["mean G", "median G", "min G", "loss"]
    lines = [head, ["---"] * len(head)]
    for row, summary in rows.items():
        shares = [share(summary, what) for what in ("exact_match", *(("label_accuracy",) if labels else ()))]
        interval = _interval(summary["mean_recovered_accuracy_interval"], 1, 2)
        figures = [_figure(summary[f"{kind}_recovered_accuracy"]) for kind in ("mean", "median", "min")]
        gains = [_figure(summary[f"{kind}_recovered_gain"]) for kind in ("mean", "median", "min")]
        lines.append([row, *shares, figures[0] + interval, *figures[1:], *gains, f"{summary['mean_loss']:.3f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def share(summary: Mapping[str, Any], what: str) -> str:
    """Return a share of a summary, `"exact_match"` or `"label_accuracy"`, in percent with its interval."""
    if what not in summary:
        return "-"
    return f"{100 * summary[what]:.0f} %" + _interval(summary[f"{what}_interval"], 100, 0)


def _interval(ends: Sequence[float] | None, factor: int, digits: int) -> str:
    if ends is None or ends[0] == ends[1]:  # of the rows that recovered accuracy is measured by
        return ""
    return f" [{', '.join(_figure(factor * end, digits) for end in ends)}]"


def _figure(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no sign before nothing


def _section(split: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    generated = rows["generated"]
    parts = [f"### {split.replace('_', ' ').capitalize()} tasks ({len(rows['base']['tasks'])})", score_table(rows)]
    near = {row: rows[row].get("nearest_seen_distance") for row in ("generated", "task_lora", "mean_lora")}
    if None not in near.values():
        told = ", ".join(f"{row} {distance:.2f}" for row, distance in near.items())
        parts.append(f"Distance to the nearest other seen adapter, in the seen ones' deviation: {told}.")
    if (correlation := generated.get("gain_on_examples_correlation")) is not None:
        parts.append(f"Rank correlation of G with the gain on the examples (row generated): {correlation:.2f}.")
    for what, why in (
        ("accuracy", "Without recovered accuracy, since fine-tuning gained less than 10 points of right answers"),
        ("gain", "Without G, since fine-tuning gained nothing"),
    ):
        if excluded := [name for name, score in generated["tasks"].items() if score[f"recovered_{what}"] is None]:
            parts.append(f"{why}: {', '.join(excluded)}.")
    return "\n\n".join(parts)
