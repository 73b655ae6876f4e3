"""Pictures of a generator: what it recovers, how it learned, and where its weights are off.

Each function returns a `matplotlib.figure.Figure`, 1200 pixels wide, which `figure.savefig("picture.png")` writes. No
window and no pyplot is involved, and the style is this module's own, whatever the user's is.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from .errors import ArgumentError, TaskVectorError
from .evaluation import PLAIN_RIVALS
from .files import commit_file
from .layout import LoraLayout, split
from .modeling_lora_generator import LoraGeneratorModel
from .zoo import LoraZoo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#222222", "#6b6b6b", "#e4e4e4"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito: for any eye
MARKS: dict[str, tuple[str, dict]] = {  # row of the report -> its name in the legend, and how it is drawn
    "few_shot_prompt": ("examples in the prompt", {"marker": "|", "s": 80, "color": INK, "lw": 1.4}),
    "rival": ("best plain rival", {"marker": "o", "s": 24, "facecolor": "white", "edgecolor": ORANGE}),
    "description": ("from the description alone", {"marker": "^", "s": 22, "color": GREEN}),
    "refined": ("refined on the examples", {"marker": "D", "s": 18, "color": PURPLE}),
    "generated": ("generated from the examples", {"marker": "o", "s": 38, "color": BLUE}),
}
LOSSES = {  # what is measured -> its unit, and its names in the log
    "Error of the weights": ("squared error (1: the mean adapter)", ("reconstruction_loss", "generation_loss")),
    "Loss through the base model": ("nats per token", ("behavioural_loss",)),
    "Information in z (KL)": ("nats", ("kl",)),
    "Loss": ("as optimized", ("loss",)),
}
STYLE: dict[Any, Any] = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 8.5,
    "legend.frameon": False,
    "legend.handletextpad": 0.3,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a task's name is a dollar
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def require_matplotlib() -> None:
    """Make sure that there is a matplotlib before anything else is done for the sake of a picture.

    Raises:
        ImportError: if there is none; the message says how to install it.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install hf_icm_lora[plots]") from error


@contextmanager
def _own_style() -> Iterator[None]:
    """Draw in this module's style, in a `with` block or a decorated function, and leave the user's as it was."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _figure(height: float, title: str = "") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure((8, height), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


@_own_style()
def plot_recovered_accuracy(report: Mapping[str, Any]) -> "Figure":
    """Draw the recovered part of fine-tuning's right answers of every task, one panel per split, the best at the top.

    The base model is the line at 0, the task's own LoRA the line at 1. The best plain rival is the one with the
    largest mean of the split. Tasks on which fine-tuning gained less than 10 points are left out, and counted.

    Args:
        report (`Mapping`): From `evaluate_generator`, or `read_report("evaluation.json")`.

    Returns:
        `matplotlib.figure.Figure`: As high as the number of tasks asks for.

    Example:
        >>> report = read_report("evaluation/evaluation.json")  # doctest: +SKIP
        >>> plot_recovered_accuracy(report).savefig("right_answers.png")  # doctest: +SKIP
    """
    title = "How many of fine-tuning's right answers a generated adapter gives"
    why = "under 10 points to gain"
    return _plot_recovered(report, "recovered_accuracy", title, "", ("base model", "fine-tuned"), why)


@_own_style()
def plot_recovered_gain(report: Mapping[str, Any]) -> "Figure":
    """Draw the recovered gain G of every task, as [`plot_recovered_accuracy`] draws right answers.

    G is of losses, and mostly counts the form of the answers. Tasks without a G are left out, and counted.

    Args:
        report (`Mapping`): From `evaluate_generator`, or `read_report("evaluation.json")`.

    Returns:
        `matplotlib.figure.Figure`: As high as the number of tasks asks for.

    Example:
        >>> plot_recovered_gain(read_report("evaluation/evaluation.json")).savefig("gain.png")  # doctest: +SKIP
    """
    title = "How much of fine-tuning's gain in loss a generated adapter recovers"
    bounds = ("G = 0: base model", "G = 1: fine-tuned")
    return _plot_recovered(report, "recovered_gain", title, "G = ", bounds, "no gain by fine-tuning")


def _plot_recovered(
    report: Mapping[str, Any], what: str, title: str, name: str, bounds: tuple[str, str], why_left_out: str
) -> "Figure":
    """Draw a score of every task that is 0 for the base model and 1 for the task's LoRA, and may be `None`."""
    panels = {part: _marked(rows, what) for part, rows in report["splits"].items()}
    lengths = [len(scores["generated"]) for _, scores in panels.values()]
    lowest = min(score for _, scores in panels.values() for row in scores.values() for score in (0.0, *row.values()))
    pitch, size = (0.19, 8.0) if sum(lengths) <= 60 else (0.115, 6.8)  # inches per task, points
    figure = _figure(0.6 + sum(pitch * (length + 2.7) + 0.55 for length in lengths))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[length + 2.7 for length in lengths])[:, 0]
    for ax, (part, (rival, scores)) in zip(axes, panels.items(), strict=True):
        tasks = sorted(scores["generated"], key=lambda task: scores["generated"][task], reverse=True)
        places = [-1.4, *range(len(tasks))] if tasks else []
        ax.vlines([0, 1], -2, len(tasks) - 0.5, color=GREY, lw=0.8, zorder=1)
        ax.hlines(places, lowest, 1, color=PALE, lw=0.7, zorder=0)
        for mark, values in scores.items():
            label, look = MARKS[mark]
            means = [sum(values.values()) / len(values)] if tasks else []
            look = look | {"s": look["s"] * pitch / 0.19}
            ax.scatter(means + [values[task] for task in tasks], places, label=label, zorder=3, **look)
        average = f": {name}{means[0]:.2f} on average" if tasks else ""
        left_out = len(report["splits"][part]["base"]["tasks"]) - len(tasks)
        ax.set_title(f"{len(tasks)} {part.replace('_', ' ')} tasks{average}")
        note = f"{left_out} left out: {why_left_out};  " if left_out else ""
        ax.set_title(f"{note}best plain rival: {rival}", loc="right", fontsize=8, color=GREY)
        ax.set_xticks([-1, -0.5, 0, 0.5, 1], ["-1", "-0.5", bounds[0], "0.5", bounds[1]])
        names = [task if len(task) <= 48 else f"{task[:47]}…" for task in tasks]
        ax.set_yticks(places, ["mean", *names] if tasks else [], fontsize=size)
        ax.set(xlim=(lowest - 0.04, 1.04), ylim=(len(tasks) + 0.2, -2.5))
        for label in ax.get_yticklabels()[:1]:
            label.set_fontweight("bold")
        ax.tick_params(length=0, labelbottom=False, labeltop=True)
        ax.tick_params("y", labelcolor=INK)
        ax.spines[:].set_visible(False)
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[1]))
    figure.legend(
        handles[::-1], labels[::-1], loc="outside upper left", ncols=min(3, len(labels)), columnspacing=1.2,
        title=title, title_fontproperties={"size": 11, "weight": "bold"}, alignment="left",
    )  # fmt: skip
    return figure


def _marked(rows: Mapping[str, Mapping[str, Any]], what: str) -> tuple[str, dict[str, dict[str, float]]]:
    """Return the name of the best plain rival, and for each mark the scores of the tasks that have one."""
    scores = {
        row: {name: score[what] for name, score in summary["tasks"].items() if score[what] is not None}
        for row, summary in rows.items()
    }
    rival = max((row.__name__ for row in PLAIN_RIVALS), key=lambda row: sum(scores[row].values()))
    scores["rival"] = scores[rival]
    return rival, {mark: scores[mark] for mark in MARKS if mark in scores}


@_own_style()
def plot_losses(trainer_state: Mapping[str, Any] | str | Path) -> "Figure":
    """Draw the terms of the loss over the steps of a training run, one panel for each unit.

    A pale line is what was logged, the line over it its running mean over a tenth of the run; points are evaluations.

    Args:
        trainer_state (`Mapping`, `str` or `Path`): The `trainer_state.json` of a checkpoint, or its content.

    Returns:
        `matplotlib.figure.Figure`: One to three panels, depending on what the loss was made of.

    Raises:
        ArgumentError: if no loss was logged.

    Example:
        >>> plot_losses("generator/checkpoint-600/trainer_state.json").savefig("losses.png")  # doctest: +SKIP
    """
    if not isinstance(trainer_state, Mapping):
        return plot_losses(json.loads(Path(trainer_state).read_text(encoding="utf-8")))
    history = trainer_state["log_history"]
    curves = _curves(history)
    if not curves:
        raise ArgumentError("No loss was logged in this training run: it was shorter than its logging_steps.")

    figure = _figure(3.2, f"How the generator learned in {history[-1]['step']} steps")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (title, terms) in zip(axes, curves.items(), strict=True):
        for name, points in terms.items():
            steps, values = _draw_curve(ax, name, points)
            if name.startswith("eval_") or f"eval_{name}" not in terms:  # of two curves of a term, name one
                term = name.removeprefix("eval_").removesuffix("_loss")
                text = f"{values[-1]:.3g}" if len(LOSSES[title][1]) == 1 else f"{term}\n{values[-1]:.3g}"
                look = {"va": "center", "color": _color_of(name)}
                ax.annotate(text, (steps[-1], values[-1]), (6, 0), textcoords="offset points", **look)
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.set_ylabel(LOSSES[title][0])
        ax.grid(axis="y", color=PALE, lw=0.7)
        ax.locator_params(nbins=6)
        ax.margins(y=0.12)  # room for the last value
    if any(name.startswith("eval_") for terms in curves.values() for name in terms):
        axes[0].plot([], [], color=GREY, label="training", lw=1.8)
        axes[0].plot([], [], color=GREY, label="evaluation", marker="o", ls="", ms=4)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, handletextpad=0.6)
    return figure


def _curves(history: Sequence[Mapping[str, float]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return what was logged of a run: title of a panel -> name in the log -> (step, value) of each entry."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, (_, terms) in LOSSES.items():
        for name in [f"{prefix}{term}" for term in terms for prefix in ("", "eval_")]:
            if points := [(logs["step"], logs[name]) for logs in history if name in logs]:
                curves.setdefault(title, {})[name] = points
    if len(curves) > 1:
        curves.pop("Loss", None)  # the sum of the others
    return curves


def _draw_curve(ax: "Axes", name: str, points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Draw an evaluation as points, training as a pale line below its running mean; return what stands out."""
    steps, values = ([point[axis] for point in points] for axis in (0, 1))
    if name.startswith("eval_"):
        ax.plot(steps, values, "o", ms=4, color=_color_of(name))
        return steps, values
    reach = len(values) // 20
    means = [fmean(values[max(0, i - reach) : i + min(i, reach) + 1]) for i in range(len(values))]
    ax.plot(steps, values, lw=0.8, color=_color_of(name), alpha=0.35)
    ax.plot(steps, means, lw=1.8, color=_color_of(name))
    return steps, means


def _color_of(name: str) -> str:
    return ORANGE if "generation" in name else BLUE


@_own_style()
def plot_module_errors(generator: LoraGeneratorModel, zoo: LoraZoo) -> "Figure":
    """Draw how far generated weights are from those of the tasks' LoRAs, layer by kind of module.

    The error is |generated - task LoRA| / |task LoRA| over a module's packed weights, as `relative_error` in the
    report is over all of them. Its mean over tasks is drawn, one panel for seen and one for unseen tasks.

    Args:
        generator (`LoraGeneratorModel`): A generator with the layout of the zoo.
        zoo (`LoraZoo`): The tasks and their vectors; `zoo.subset(names)` for some of them. Tasks without vectors are
            left out.

    Returns:
        `matplotlib.figure.Figure`: One row of cells per kind of module, one column per layer.

    Raises:
        NotFittedError: if the generator has no statistics yet.
        TaskVectorError: if none of the tasks has a vector, or one does not fit the generator.

    Example:
        >>> plot_module_errors(generator, LoraZoo("zoo")).savefig("module_errors.png")  # doctest: +SKIP
    """
    from matplotlib.colors import TwoSlopeNorm

    banks = zoo.task_vectors.banks
    vectors = {name: banks[name]["demonstrations"] for name in zoo if "demonstrations" in banks.get(name, {})}
    if not vectors:
        raise TaskVectorError(f"There are no vectors for any of the tasks of {zoo}.")
    modules, seen = zoo.layout.modules, set(generator.config.training_tasks or ())
    kinds, layers = sorted({module.kind for module in modules}), sorted({module.position for module in modules})
    errors: dict[str, list[torch.Tensor]] = {}  # split -> of each task, (num_modules,)
    for name, vector in vectors.items():
        error = _module_errors(zoo.layout, generator.decode_task_vector(vector).cpu(), zoo.lora_weights(name))
        errors.setdefault("seen" if name in seen else "unseen", []).append(error)
    means = {name: torch.stack(rows).mean(0) for name, rows in sorted(errors.items())}
    finite = [value for row in means.values() for value in row.tolist() if math.isfinite(value)]
    least, most = min([0.5, *finite]), max([1.5, *finite])

    title = "Where generated weights differ from the task's own LoRA"
    figure = _figure(1.2 + len(means) * (0.55 + 0.24 * len(kinds)), title)
    axes = figure.subplots(len(means), 1, squeeze=False)[:, 0]
    for ax, (name, row) in zip(axes, means.items(), strict=True):
        cells = torch.full((len(kinds), len(layers)), torch.nan)
        for module, error in zip(modules, row.tolist(), strict=True):
            cells[kinds.index(module.kind), layers.index(module.position)] = error
        mesh = ax.pcolormesh(cells.numpy(), cmap="RdBu_r", norm=TwoSlopeNorm(1, least, most), edgecolor="white", lw=1)
        ax.set_title(f"{len(errors[name])} {name} tasks: {row[row.isfinite()].mean():.2f} on average")
        ax.set_yticks([i + 0.5 for i in range(len(kinds))], _short_names(kinds))
        shown = range(0, len(layers), len(layers) // 16 + 1)
        ax.set_xticks([i + 0.5 for i in shown], [".".join(map(str, layers[i])) for i in shown])
        ax.tick_params(length=0)
        ax.tick_params("y", labelcolor=INK)
        ax.spines[:].set_visible(False)
        ax.invert_yaxis()
    axes[-1].set_xlabel("layer")
    bar = figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.5, aspect=40, ticks=[least, 1, most])
    bar.ax.set_xticklabels([f"{least:.2g}", "1 = as far as no adapter", f"{most:.2g}"])
    bar.set_label("relative error (0 = the same weights)")
    bar.outline.set_visible(False)
    return figure


def _module_errors(layout: LoraLayout, generated: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the relative error of the weights of each of the layout's modules, `(num_modules,)`."""
    squares = {module.name: torch.zeros(2) for module in layout.modules}
    pairs = split(torch.stack([generated - target, target]), layout.blocks)  # each (2, count, rank, width)
    for block, pair in zip(layout.blocks, pairs, strict=True):
        for module, square in zip(block.modules, pair.square().sum((2, 3)).T, strict=True):
            squares[module.name] += square
    difference, length = torch.stack(list(squares.values())).T
    return (difference / length).sqrt()


def _short_names(names: Sequence[str]) -> list[str]:
    """Return as much of the ends of dotted names as tells them apart.

    Example:
        >>> _short_names(["layers.*.attention.q", "layers.*.attention.v"])
        ['q', 'v']
    """
    for parts in range(1, max(map(len, names))):
        short = [".".join(name.split(".")[-parts:]) for name in names]
        if len(set(short)) == len(names) and not any(name.startswith("*") for name in short):
            return short
    return list(names)


def write_plots(
    output_dir: str | Path,
    generator: LoraGeneratorModel,
    zoo: LoraZoo,
    report: Mapping[str, Any],
    run_dir: str | Path | None = None,
) -> list[Path]:
    """Draw all pictures of an evaluation into PNG files.

    Args:
        output_dir (`str` or `Path`): Where they go: `recovered_accuracy.png`, `recovered_gain.png`,
            `module_errors.png`, and `losses.png`.
        generator (`LoraGeneratorModel`), zoo (`LoraZoo`), report (`Mapping`): Of `evaluate_generator`.
        run_dir (`str` or `Path`, *optional*): Where the generator was trained. The last checkpoint of each run there
            gives the losses, one picture per run; without any there is none.

    Returns:
        `list[Path]`: The files.

    Raises:
        ImportError: if there is no matplotlib.

    Example:
        >>> write_plots("evaluation", generator, zoo, report, run_dir="generator")  # doctest: +SKIP
    """
    scored = [name for rows in report["splits"].values() for name in rows["base"]["tasks"]]
    tasks = zoo.subset(dict.fromkeys([*scored, *filter(zoo.__contains__, generator.config.training_tasks or ())]))
    figures = {
        "recovered_accuracy": plot_recovered_accuracy(report),
        "recovered_gain": plot_recovered_gain(report),
        "module_errors": plot_module_errors(generator, tasks),
    }
    for run, state in (_last_states(Path(run_dir)) if run_dir else {}).items():
        with suppress(ArgumentError):  # too short a run to have logged a loss
            figures["-".join(("losses", *run.parts))] = plot_losses(state)
    paths = [Path(output_dir) / f"{name}.png" for name in figures]
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for path, figure in zip(paths, figures.values(), strict=True):
        with commit_file(path) as temporary, _own_style():
            figure.savefig(temporary, format="png")
    return paths


def _last_states(folder: Path) -> dict[Path, Path]:
    """Return the last state of each training run in a folder, its own or a checkpoint's, by the run's place in it."""
    states = [*folder.glob("trainer_state.json"), *folder.glob("*/trainer_state.json")]
    states += folder.glob("*/checkpoint-*/trainer_state.json")
    last = {}
    for state in sorted(states, key=lambda state: state.stat().st_mtime):
        run = state.parent.parent if state.parent.name.startswith("checkpoint-") else state.parent
        last[run.relative_to(folder)] = state
    return last
