"""Pictures of a generator: what it recovers, where its tasks lie, how it learned, and where its weights are off.

Each function returns a `matplotlib.figure.Figure`, 1200 pixels wide, which `figure.savefig("picture.png")` writes. No
window and no pyplot is involved, and the style is this module's own, whatever the user's is.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import TaskVectorError
from .evaluation import PLAIN_RIVALS
from .files import commit_file
from .layout import PREFIX, LoraLayout, split
from .modeling_lora_generator import LoraGeneratorModel
from .task_vectors import TaskVectors
from .zoo import LoraZoo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#222222", "#6b6b6b", "#e4e4e4"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito: for any eye
FAMILY_COLORS = ("#332288", "#44aad4", "#117733", "#ddaa33", "#cc6677", "#44aa99", "#882255")  # after Tol's muted
FAMILY_MARKERS = "osD^"
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
STYLE = {
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
def plot_recovered_gain(report: Mapping[str, Any]) -> "Figure":
    """Draw the recovered gain G of every task, one panel per split, the best at the top.

    The base model is the line at 0, the task's own LoRA the line at 1. The best plain rival is the one with the
    largest mean of the split. Tasks without a G are left out, and counted.

    Args:
        report (`Mapping`): From `evaluate_generator`, or `read_report("evaluation.json")`.

    Returns:
        `matplotlib.figure.Figure`: As high as the number of tasks asks for.

    Example:
        >>> plot_recovered_gain(read_report("evaluation/evaluation.json")).savefig("gain.png")  # doctest: +SKIP
    """
    panels = {name: _marked_gains(rows) for name, rows in report["splits"].items()}
    lengths = [len(gains["generated"]) for _, gains in panels.values()]
    lowest = min(gain for _, gains in panels.values() for row in gains.values() for gain in (0.0, *row.values()))
    pitch, size = (0.19, 8.0) if sum(lengths) <= 60 else (0.115, 6.8)  # inches per task, points
    figure = _figure(0.6 + sum(pitch * (length + 2.7) + 0.55 for length in lengths))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[length + 2.7 for length in lengths])[:, 0]
    for ax, (name, (rival, gains)) in zip(axes, panels.items(), strict=True):
        tasks = sorted(gains["generated"], key=gains["generated"].get, reverse=True)
        places = [-1.4, *range(len(tasks))] if tasks else []
        ax.vlines([0, 1], -2, len(tasks) - 0.5, color=GREY, lw=0.8, zorder=1)
        ax.hlines(places, lowest, 1, color=PALE, lw=0.7, zorder=0)
        for mark, values in gains.items():
            label, look = MARKS[mark]
            means = [sum(values.values()) / len(values)] if tasks else []
            look = look | {"s": look["s"] * pitch / 0.19}
            ax.scatter(means + [values[task] for task in tasks], places, label=label, zorder=3, **look)
        average = f": G = {means[0]:.2f} on average" if tasks else ""
        left_out = len(report["splits"][name]["base"]["tasks"]) - len(tasks)
        ax.set_title(f"{len(tasks)} {name.replace('_', ' ')} tasks{average}")
        note = f"{left_out} that fine-tuning did not improve are left out;  " if left_out else ""
        ax.set_title(f"{note}best plain rival: {rival}", loc="right", fontsize=8, color=GREY)
        ax.set_xticks([-1, -0.5, 0, 0.5, 1], ["-1", "-0.5", "G = 0: base model", "0.5", "G = 1: fine-tuned"])
        names = [task if len(task) <= 48 else f"{task[:47]}…" for task in tasks]
        ax.set_yticks(places, ["mean", *names] if tasks else [], fontsize=size)
        ax.set(xlim=(lowest - 0.04, 1.04), ylim=(len(tasks) + 0.2, -2.5))
        for label in ax.get_yticklabels()[:1]:
            label.set_fontweight("bold")
        ax.tick_params(length=0, labelbottom=False, labeltop=True)
        ax.tick_params("y", labelcolor=INK)
        ax.spines[:].set_visible(False)
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[1]))
    title = "How much of fine-tuning's gain a generated adapter recovers"
    figure.legend(
        handles[::-1], labels[::-1], loc="outside upper left", ncols=min(3, len(labels)), columnspacing=1.2,
        title=title, title_fontproperties={"size": 11, "weight": "bold"}, alignment="left",
    )  # fmt: skip
    return figure


def _marked_gains(rows: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, dict[str, float]]]:
    """Return the name of the best plain rival, and for each mark G of the tasks that have one."""
    gains = {
        row: {name: s["recovered_gain"] for name, s in summary["tasks"].items() if s["recovered_gain"] is not None}
        for row, summary in rows.items()
    }
    rival = max((row.__name__ for row in PLAIN_RIVALS), key=lambda row: sum(gains[row].values()))
    gains["rival"] = gains[rival]
    return rival, {mark: gains[mark] for mark in MARKS if mark in gains}


@_own_style()
def plot_maps(generator: LoraGeneratorModel, zoo: LoraZoo, task_vectors: TaskVectors | None = None) -> "Figure":
    """Draw a map of the tasks' conditions beside one of their LoRAs' effects B @ A, both by principal components.

    Above each map stands how many tasks have a task of their own family as the nearest one, before the projection to
    two dimensions; tasks that are alone in their family are not counted.

    Args:
        generator (`LoraGeneratorModel`): Its normalizer makes the conditions; its training tasks are the seen ones.
        zoo (`LoraZoo`): The tasks, with their families; `zoo.subset(names)` for some of them.
        task_vectors (`TaskVectors`, *optional*): By default the zoo's. Tasks without any are left out.

    Returns:
        `matplotlib.figure.Figure`: Seen tasks filled, unseen ones open, coloured by family.

    Raises:
        TaskVectorError: if none of the tasks has a vector.

    Example:
        >>> plot_maps(generator, LoraZoo("zoo")).savefig("maps.png")  # doctest: +SKIP
    """
    zoo, vectors = _with_vectors(zoo, task_vectors)
    means = torch.stack([bank.mean(0) for bank in vectors.values()]).to(generator.device)
    conditions = generator.zoo_normalizer.condition(means).detach().cpu()
    grams = {"What the generator reads: conditions": conditions @ conditions.T,
             "What fine-tuning wrote: effects B·A": _effect_gram(zoo)}  # fmt: skip
    looks = [{"color": color, "marker": marker} for marker in FAMILY_MARKERS for color in FAMILY_COLORS]
    families = [record.get("family") or "no family" for record in zoo.records.values()]
    common = [family for family, _ in Counter(families).most_common(len(looks))]
    groups = [family if family in common else "other families" for family in families]
    looks = dict(zip(sorted(common), looks, strict=False)) | {"other families": {"color": GREY, "marker": "."}}
    seen = [name in (generator.config.training_tasks or ()) for name in zoo]

    figure = _figure(4.7 + 0.15 * (len(set(groups)) // 5), "Where the tasks lie, to the generator and to fine-tuning")
    axes = figure.subplots(1, 2)
    maps = [(ax, *_principal_places(gram)) for ax, gram in zip(axes, grams.values(), strict=True)]
    for (ax, places, shares), (title, gram) in zip(maps, grams.items(), strict=True):
        for group in [name for name in looks if name in groups]:
            for filled in (True, False):
                x, y = places[[g == group and s == filled for g, s in zip(groups, seen, strict=True)]].T
                look = {"ls": "", "ms": 4.5, "mew": 0.9, "mfc": looks[group]["color"] if filled else "white"}
                ax.plot(x, y, label=group if filled else None, **looks[group], **look)
        if (near := _near_their_family(gram, families)) is not None:
            title += f"\n{100 * near:.0f} % of the tasks are nearest to one of their family"
        ax.set_title(title)
        ax.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of the variance)")
        ax.set_ylabel(f"second ({100 * shares[1]:.0f} %)")
        ax.set_aspect("equal", "datalim")
        ax.locator_params(nbins=5)
    for name, color in (("seen", INK), ("unseen", "white")):
        axes[0].plot([], [], ls="", ms=4.5, marker="o", color=INK, mfc=color, label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=5, fontsize=7.5)
    figure.draw_without_rendering()  # it is not known before where there is room
    for ax, places, _ in maps:
        _name_some(ax, places, list(zoo), families)
    return figure


def _with_vectors(zoo: LoraZoo, task_vectors: TaskVectors | None) -> tuple[LoraZoo, dict[str, torch.Tensor]]:
    """Return the tasks that have vectors of demonstrations, and these, `(num_draws, num_vectors, hidden_size)`."""
    banks = (task_vectors or zoo.task_vectors).banks
    vectors = {name: banks[name]["demonstrations"] for name in zoo if "demonstrations" in banks.get(name, {})}
    if not vectors:
        raise TaskVectorError(f"There are no vectors for any of the tasks of {zoo}.")
    return zoo.subset(vectors), vectors


def _effect_gram(zoo: LoraZoo) -> torch.Tensor:
    """Return all inner products `(tasks, tasks)` of the adapters' effects, from their factors.

    <B A, B' A'> is the sum of the entries of (A A'^T) * (B^T B'), which are as small as the rank.
    """
    adapters = [zoo.layout.unpack(zoo.lora_weights(name), zoo.shared_weights) for name in zoo]
    gram = torch.zeros(len(adapters), len(adapters))
    for module in zoo.layout.modules:
        key = f"{PREFIX}{module.name}.lora_"
        a = torch.cat([adapter[f"{key}A.weight"] for adapter in adapters])  # (tasks * rank, in_features)
        b = torch.cat([adapter[f"{key}B.weight"].T for adapter in adapters])  # (tasks * rank, out_features)
        products = ((a @ a.T) * (b @ b.T)).unflatten(1, (len(adapters), -1)).unflatten(0, (len(adapters), -1))
        gram += products.sum((1, 3))
    return gram


def _principal_places(gram: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Return the first two principal components `(tasks, 2)` and their shares of the variance, from a Gram matrix."""
    gram = gram.double()
    values, vectors = torch.linalg.eigh(gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean())
    values = nn.functional.pad(values.clamp(min=0), (1, 0))  # one task has one component only
    vectors = nn.functional.pad(vectors, (1, 0))
    shares = values / values.sum().clamp(min=1e-12)
    return (vectors * values.sqrt())[:, -2:].flip(1), shares[-2:].flip(0).tolist()


def _near_their_family(gram: torch.Tensor, families: Sequence[str]) -> float | None:
    """Return the part of the tasks, of those not alone in their family, whose nearest task is of their family."""
    squares = gram.diagonal()
    nearest = (squares[:, None] + squares - 2 * gram).fill_diagonal_(torch.inf).argmin(1).tolist()
    near = [families[i] == family for i, family in zip(nearest, families, strict=True) if families.count(family) > 1]
    return sum(near) / len(near) if near else None


def _name_some(ax: "Axes", places: torch.Tensor, names: Sequence[str], families: Sequence[str], most: int = 8) -> None:
    """Write the names of a few points beside them: far apart, one of a family, and where there is room."""
    points, boxes, named = ax.transData.transform(places.tolist()), [], set()
    distances = (places - places.mean(0)).norm(dim=1)
    for _ in names:
        index = int(distances.argmax())
        distances = distances.minimum((places - places[index]).norm(dim=1))  # to the nearest of those before
        for x, y, ha, va in ((6, -0.5, "left", "center"), (-6, -0.5, "right", "center"),
                             (0, 6, "center", "bottom"), (0, -6, "center", "top")):  # fmt: skip
            if len(boxes) == most or families[index] in named:
                break
            text = ax.annotate(names[index], places[index].tolist(), (x, y), textcoords="offset points",
                               ha=ha, va=va, fontsize=6.5, color=GREY)  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent().padded(6)
            if box.count_contains(points) or box.count_overlaps(boxes) or ax.bbox.count_contains(box.corners()) < 4:
                text.remove()
            else:
                boxes.append(box)
                named.add(families[index])


@_own_style()
def plot_losses(trainer_state: Mapping[str, Any] | str | Path) -> "Figure":
    """Draw the terms of the loss over the steps of a training run, one panel for each unit.

    A pale line is what was logged, the line over it its running mean over a tenth of the run; points are evaluations.

    Args:
        trainer_state (`Mapping`, `str` or `Path`): The `trainer_state.json` of a checkpoint, or its content.

    Returns:
        `matplotlib.figure.Figure`: One to three panels, depending on what the loss was made of.

    Raises:
        ValueError: if no loss was logged.

    Example:
        >>> plot_losses("generator/checkpoint-600/trainer_state.json").savefig("losses.png")  # doctest: +SKIP
    """
    if not isinstance(trainer_state, Mapping):
        trainer_state = json.loads(Path(trainer_state).read_text(encoding="utf-8"))
    history = trainer_state["log_history"]
    curves = {}  # title -> name in the log -> its points
    for title, (_, names) in LOSSES.items():
        for name in [f"{prefix}{name}" for name in names for prefix in ("", "eval_")]:
            if points := [(logs["step"], logs[name]) for logs in history if name in logs]:
                curves.setdefault(title, {})[name] = points
    if len(curves) > 1:
        curves.pop("Loss", None)  # the sum of the others
    if not curves:
        raise ValueError("No loss was logged in this training run: it was shorter than its logging_steps.")

    figure = _figure(3.2, f"How the generator learned in {history[-1]['step']} steps")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (title, terms) in zip(axes, curves.items(), strict=True):
        for name, points in terms.items():
            color = ORANGE if "generation" in name else BLUE
            steps, values = zip(*points, strict=True)
            if name.startswith("eval_"):
                ax.plot(steps, values, "o", ms=4, color=color)
            else:
                reach = len(values) // 20
                means = [fmean(values[max(0, i - reach) : i + min(i, reach) + 1]) for i in range(len(values))]
                ax.plot(steps, values, lw=0.8, color=color, alpha=0.35)
                ax.plot(steps, means, lw=1.8, color=color)
                values = means
            if name.startswith("eval_") or f"eval_{name}" not in terms:
                term = name.removeprefix("eval_").removesuffix("_loss")
                text = f"{values[-1]:.3g}" if len(LOSSES[title][1]) == 1 else f"{term}\n{values[-1]:.3g}"
                ax.annotate(
                    text, (steps[-1], values[-1]), (6, 0), textcoords="offset points", va="center", color=color
                )
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.set_ylabel(LOSSES[title][0])
        ax.grid(axis="y", color=PALE, lw=0.7)
        ax.locator_params(nbins=6)
        ax.margins(y=0.12)  # room for the last value
    if any(name.startswith("eval_") for terms in curves.values() for name in terms):
        for label, look in (("training", {"lw": 1.8}), ("evaluation", {"marker": "o", "ls": "", "ms": 4})):
            axes[0].plot([], [], color=GREY, label=label, **look)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, handletextpad=0.6)
    return figure


@_own_style()
def plot_module_errors(
    generator: LoraGeneratorModel, zoo: LoraZoo, task_vectors: TaskVectors | None = None
) -> "Figure":
    """Draw how far generated weights are from those of the tasks' LoRAs, layer by kind of module.

    The error is |generated - task LoRA| / |task LoRA| over a module's packed weights, as `relative_error` in the
    report is over all of them. Its mean over tasks is drawn, one panel for seen and one for unseen tasks.

    Args:
        generator (`LoraGeneratorModel`): A generator with the layout of the zoo.
        zoo (`LoraZoo`): The tasks; `zoo.subset(names)` for some of them.
        task_vectors (`TaskVectors`, *optional*): By default the zoo's. Tasks without any are left out.

    Returns:
        `matplotlib.figure.Figure`: One row of cells per kind of module, one column per layer.

    Raises:
        NotFittedError: if the generator has no statistics yet.
        TaskVectorError: if none of the tasks has a vector, or one does not fit the generator.

    Example:
        >>> plot_module_errors(generator, LoraZoo("zoo")).savefig("module_errors.png")  # doctest: +SKIP
    """
    from matplotlib.colors import TwoSlopeNorm

    zoo, vectors = _with_vectors(zoo, task_vectors)
    modules, seen = zoo.layout.modules, set(generator.config.training_tasks or ())
    kinds, layers = sorted({module.kind for module in modules}), sorted({module.position for module in modules})
    errors = {}  # split -> (tasks, modules)
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
        output_dir (`str` or `Path`): Where they go: `recovered_gain.png`, `maps.png`, `module_errors.png`, and
            `losses.png`.
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
        "recovered_gain": plot_recovered_gain(report),
        "maps": plot_maps(generator, tasks),
        "module_errors": plot_module_errors(generator, tasks),
    }
    runs = {}
    for pattern in ("checkpoint-*", "*/checkpoint-*"):
        states = Path(run_dir).glob(f"{pattern}/trainer_state.json") if run_dir else ()
        runs |= {state.parent.parent: state for state in sorted(states, key=lambda state: state.stat().st_mtime)}
    for run, state in runs.items():
        content = json.loads(state.read_text(encoding="utf-8"))
        with suppress(ValueError):  # too short a run to have logged a loss
            figures["-".join(("losses", *run.relative_to(run_dir).parts))] = plot_losses(content)
    paths = [Path(output_dir) / f"{name}.png" for name in figures]
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for path, figure in zip(paths, figures.values(), strict=True):
        with commit_file(path) as temporary, _own_style():
            figure.savefig(temporary, format="png")
    return paths
