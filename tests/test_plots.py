"""Pictures: every point, label and panel is where the numbers are, and nothing but the picture changes."""

import json
import struct
import subprocess
import sys

import matplotlib
import matplotlib.style
import numpy
import pytest
import torch
from conftest import save_base_and_tasks
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hf_icm_lora import (
    ArgumentError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraLayout,
    LoraZoo,
    TaskVectorError,
    TaskVectors,
    TaskVectorSpec,
)
from hf_icm_lora.cli import main
from hf_icm_lora.completion import DEFAULT_TEMPLATE
from hf_icm_lora.layout import PREFIX, LoraModule
from hf_icm_lora.plots import (
    plot_losses,
    plot_module_errors,
    plot_recovered_accuracy,
    plot_recovered_gain,
    write_plots,
)

CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": ["q", "v"]}
SIZES = dict(hidden_size=32, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=1, latent_size=4)
SEEN, UNSEEN = ["dates/german", "dates/french", "words/plural"], ["dates/dutch", "words/past"]
GAINS = {  # split -> row -> G of each task
    "seen": {
        "base": [0, 0, None], "task_lora": [1, 1, None], "generated": [0.5, 0.9, None],
        "mean_lora": [0.2, 0.2, None], "nearest_lora": [-0.6, 0.1, None], "top_k_merge": [0.1, 0.4, None],
        "ridge": [0.8, 1, None], "few_shot_prompt": [0.6, 0.7, None],
    },
    "unseen_family": {
        "base": [0, 0], "task_lora": [1, 1], "generated": [0.4, 0.3],
        "mean_lora": [0.3, 0.2], "nearest_lora": [0.1, 0.1], "top_k_merge": [0.1, 0.2], "ridge": [0, 0],
        "few_shot_prompt": [0.6, 0.7],
    },
}  # fmt: skip


def make_report(gains, more_rows=(), what="recovered_gain"):
    """What `plot_recovered_gain`, or with another score `plot_recovered_accuracy`, reads of a report."""
    splits = {}
    for split, rows in gains.items():
        rows = rows | {row: rows["generated"] for row in more_rows}
        splits[split] = {
            row: {"tasks": {f"{split}/{i}": {what: gain} for i, gain in enumerate(values)}}
            for row, values in rows.items()
        }
    return {"splits": splits}


def make_weights(seed, gauge, widths=(32, 16)):
    """Random LoRAs of rank 2 in two layers; with a frozen A all have the same."""
    state_dict = {}
    for factor, seed_of_factor in (("A", 0 if gauge == "frozen_a" else 1000 + seed), ("B", seed)):
        generator = torch.Generator().manual_seed(seed_of_factor)
        for layer in range(2):
            for name, width in zip("qv", widths, strict=True):
                shape = (2, 24) if factor == "A" else (width, 2)
                key = f"{PREFIX}model.layers.{layer}.{name}.lora_{factor}.weight"
                state_dict[key] = torch.randn(shape, generator=generator)
    return state_dict


def make_zoo(path, names, gauge="frozen_a", vectors_of=None):
    layout = LoraLayout.from_state_dict(make_weights(0, gauge), CONFIG, gauge)
    zoo = LoraZoo.create(
        path, layout=layout, lora_config=CONFIG, base_model_name_or_path="tiny", base_model_fingerprint="f" * 64,
        template=DEFAULT_TEMPLATE,
    )  # fmt: skip
    for seed, name in enumerate(names):
        zoo.add(name, {1: make_weights(seed, gauge)}, family=name.split("/")[0])
    generator = torch.Generator().manual_seed(0)
    banks = {name: {"demonstrations": torch.randn(2, 1, 8, generator=generator)} for name in vectors_of or names}
    TaskVectors(TaskVectorSpec(pooling="prompts"), "f" * 64, banks).save(zoo.path / "task_vectors.safetensors")
    return zoo


def make_generator(seen):
    torch.manual_seed(0)
    generator = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(seen, **SIZES)).eval()
    generator.fit_normalizer(seen.as_dataset())
    return generator


@pytest.fixture
def zoo(tmp_path):
    return make_zoo(tmp_path / "zoo", [*SEEN, *UNSEEN])


@pytest.fixture
def generator(zoo):
    return make_generator(zoo.subset(SEEN))


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(numpy.array(canvas.buffer_rgba()))


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


def marks(ax):
    """Name in the legend -> places of its dots."""
    return {dots.get_label(): dots.get_offsets().tolist() for dots in ax.collections if "_" not in dots.get_label()}


# Recovered gain


def test_every_task_with_a_gain_is_a_dot_in_the_panel_of_its_split():
    seen, unseen = plot_recovered_gain(make_report(GAINS)).axes
    assert [label.get_text() for label in seen.get_yticklabels()] == ["mean", "seen/1", "seen/0"]
    dots = marks(seen)
    assert list(dots) == ["examples in the prompt", "best plain rival", "generated from the examples"]
    assert dots["generated from the examples"] == [[pytest.approx(0.7), -1.4], [0.9, 0], [0.5, 1]]
    assert dots["examples in the prompt"] == [[pytest.approx(0.65), -1.4], [0.7, 0], [0.6, 1]]
    assert marks(unseen)["generated from the examples"] == [[pytest.approx(0.35), -1.4], [0.4, 0], [0.3, 1]]


def test_titles_say_the_mean_and_what_is_left_out():
    seen, unseen = plot_recovered_gain(make_report(GAINS)).axes
    assert seen.get_title("left") == "2 seen tasks: G = 0.70 on average"
    assert unseen.get_title("left") == "2 unseen family tasks: G = 0.35 on average"
    assert seen.get_title("right").startswith("1 left out: no gain by fine-tuning;")
    assert "fine-tuning" not in unseen.get_title("right")


def test_right_answers_are_drawn_in_the_same_way():
    seen, unseen = plot_recovered_accuracy(make_report(GAINS, what="recovered_accuracy")).axes
    assert seen.get_title("left") == "2 seen tasks: 0.70 on average"
    assert seen.get_title("right").startswith("1 left out: under 10 points to gain;")
    assert marks(seen)["generated from the examples"] == [[pytest.approx(0.7), -1.4], [0.9, 0], [0.5, 1]]
    assert marks(unseen)["generated from the examples"] == [[pytest.approx(0.35), -1.4], [0.4, 0], [0.3, 1]]
    ticks = [tick.get_text() for tick in seen.get_xticklabels()]
    assert {"base model", "fine-tuned"} <= set(ticks)


def test_the_rival_of_a_split_is_its_best():
    seen, unseen = plot_recovered_gain(make_report(GAINS)).axes
    assert seen.get_title("right").endswith("best plain rival: ridge")
    assert marks(seen)["best plain rival"] == [[pytest.approx(0.9), -1.4], [1, 0], [0.8, 1]]
    assert unseen.get_title("right").endswith("best plain rival: mean_lora")
    assert marks(unseen)["best plain rival"] == [[pytest.approx(0.25), -1.4], [0.3, 0], [0.2, 1]]


def test_base_and_fine_tuning_are_lines_and_all_dots_are_inside():
    figure = plot_recovered_gain(make_report(GAINS | {"other": GAINS["seen"] | {"few_shot_prompt": [-1, 0, None]}}))
    for ax in figure.axes:
        assert {segment[0][0] for segment in ax.collections[0].get_segments()} == {0, 1}
        assert ax.get_xlim() == (-1.04, 1.04)  # the same in all panels
        ticks = [(tick.get_position()[0], tick.get_text()) for tick in ax.get_xticklabels()]
        assert {(0, "G = 0: base model"), (1, "G = 1: fine-tuned")} <= set(ticks)


def test_rows_on_request_are_drawn_when_they_are_there():
    figure = plot_recovered_gain(make_report(GAINS, ["description", "refined", "fallback"]))
    drawn = ["generated from the examples", "refined on the examples", "from the description alone",
             "best plain rival", "examples in the prompt"]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == drawn
    assert len(marks(figure.axes[0])) == 5


def test_split_without_any_gain_is_an_empty_panel():
    nothing = {row: [None, None] for row in GAINS["seen"]}
    empty, unseen = plot_recovered_gain(make_report({"seen": nothing, "unseen": GAINS["unseen_family"]})).axes
    assert empty.get_title("left") == "0 seen tasks"
    assert set(map(len, marks(empty).values())) == {0}
    assert set(map(len, marks(unseen).values())) == {3}


@pytest.mark.parametrize("counts", [[12, 8], [100, 40], [100]])
def test_names_are_readable_however_many(counts):
    gains = {f"s{i}": {row: [0.5] * n for row in GAINS["seen"]} for i, n in enumerate(counts)}
    figure = plot_recovered_gain(make_report(gains))
    pixels(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert width == 1200
    assert height < 300 + (30 if sum(counts) < 60 else 18) * (sum(counts) + 10)  # a hundred tasks are no scroll
    for ax, n in zip(figure.axes, counts, strict=True):
        labels = ax.get_yticklabels()
        assert len(labels) == n + 1
        boxes = [label.get_window_extent() for label in labels]
        assert min(label.get_fontsize() for label in labels) >= 6.5
        assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:], strict=False))
        assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)


def test_names_that_are_long_or_hold_dollars():
    report = make_report(GAINS)
    rows = report["splits"]["seen"]
    for summary in rows.values():
        summary["tasks"] = {"$x_1$ " + "long " * 40: {"recovered_gain": 0.5}, "$": {"recovered_gain": 0.1}}
    figure = plot_recovered_gain(report)
    pixels(figure)
    _, long, dollar = figure.axes[0].get_yticklabels()
    assert (len(long.get_text()), dollar.get_text()) == (48, "$")
    assert not long.get_parse_math()
    assert figure.axes[0].get_window_extent().width > 500


# Losses


def history(*names, steps=(10, 20, 30)):
    return {"log_history": [{"step": step, **{name: 1 / step for name in names}} for step in steps]}


def test_panels_are_the_terms_that_were_logged():
    def titles(*names):
        return [ax.get_title("left") for ax in plot_losses(history(*names)).axes]

    assert titles("loss", "behavioural_loss", "learning_rate") == ["Loss through the base model"]
    assert titles("loss", "eval_loss") == ["Loss"]
    assert titles("loss", "reconstruction_loss", "kl", "behavioural_loss", "eval_generation_loss", "active_units") == [
        "Error of the weights", "Loss through the base model", "Information in z (KL)"
    ]  # fmt: skip


def test_training_is_a_line_and_evaluation_points():
    state = history("reconstruction_loss", steps=range(1, 61))
    state["log_history"] += [{"step": 60, "eval_reconstruction_loss": 0.5, "eval_generation_loss": 0.75}]
    (ax,) = plot_losses(state).axes
    logged, smooth, evaluation, generation = (line for line in ax.lines if len(line.get_xdata()))
    assert list(logged.get_ydata()) == [1 / step for step in range(1, 61)]
    assert list(smooth.get_ydata()[[0, -1]]) == pytest.approx([1, sum(1 / s for s in range(57, 61)) / 4])
    assert smooth.get_ydata()[10] == pytest.approx(sum(1 / s for s in range(8, 15)) / 7)
    assert (evaluation.get_marker(), evaluation.get_linestyle()) == ("o", "None")
    assert generation.get_xydata().tolist() == [[60, 0.75]]
    assert [text.get_text() for text in ax.texts] == ["reconstruction\n0.5", "generation\n0.75"]
    assert ax.get_xlabel() == "step"
    assert ax.get_ylabel() == "squared error (1: the mean adapter)"


def test_short_runs_are_drawn_as_logged_and_read_from_a_file(tmp_path):
    state = history("behavioural_loss")
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (ax,) = plot_losses(tmp_path / "trainer_state.json").axes
    assert ax.lines[0].get_xydata().tolist() == ax.lines[1].get_xydata().tolist() == [
        [10, 0.1], [20, 0.05], [30, pytest.approx(1 / 30)]
    ]  # fmt: skip
    assert [text.get_text() for text in ax.texts] == ["0.0333"]


def test_run_without_a_logged_loss():
    with pytest.raises(ArgumentError, match="No loss was logged"):
        plot_losses(history("learning_rate"))


# Errors of the weights


def module_errors(zoo, generated, name):
    """By hand, from the matrices that vary: |generated - task LoRA| / |task LoRA| of each module."""
    states = [zoo.layout.unpack(packed, zoo.shared_weights) for packed in (generated, zoo.lora_weights(name))]
    factors, errors = "B" if zoo.layout.gauge == "frozen_a" else "AB", []
    for module in zoo.layout.modules:
        keys = [f"{PREFIX}{module.name}.lora_{factor}.weight" for factor in factors]
        own, target = (torch.cat([state[key].flatten() for key in keys]) for state in states)
        errors.append((own - target).norm() / target.norm())
    return torch.stack(errors)


@pytest.mark.parametrize("gauge", ["frozen_a", "shared_init"])
def test_errors_are_cells_of_layer_and_kind(tmp_path, gauge):
    zoo = make_zoo(tmp_path / "zoo", [*SEEN, *UNSEEN], gauge)
    generator = make_generator(zoo.subset(SEEN))
    figure = plot_module_errors(generator, zoo)
    seen, unseen, bar = figure.axes
    assert seen.get_title("left").startswith("3 seen tasks: ")
    assert unseen.get_title("left").startswith("2 unseen tasks: ")
    assert [label.get_text() for label in seen.get_yticklabels()] == ["q", "v"]
    assert [label.get_text() for label in seen.get_xticklabels()] == ["0", "1"]
    banks = zoo.task_vectors.banks
    for ax, names in ((seen, SEEN), (unseen, UNSEEN)):
        generated = {name: generator.decode_task_vector(banks[name]["demonstrations"]) for name in names}
        expected = torch.stack([module_errors(zoo, own, name) for name, own in generated.items()]).mean(0)
        cells = torch.tensor(ax.collections[0].get_array().data)
        torch.testing.assert_close(cells, expected.reshape(2, 2))  # the modules, by kind and layer
        assert f"{expected.mean():.2f} on average" in ax.get_title("left")
        assert ax.collections[0].get_clim()[0] <= 0.5
        assert ax.yaxis_inverted()
    assert "relative error" in bar.get_xlabel()


def test_tasks_without_vectors_are_left_out(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", [*SEEN, *UNSEEN], vectors_of=SEEN)
    generator = make_generator(zoo.subset(SEEN))
    (seen, _) = plot_module_errors(generator, zoo).axes
    assert seen.get_title("left").startswith("3 seen tasks: ")
    with pytest.raises(TaskVectorError, match="no vectors for any"):
        plot_module_errors(generator, zoo.subset(UNSEEN))


def test_white_is_no_adapter_and_blue_nearer(zoo, generator, monkeypatch):
    named = {tuple(bank["demonstrations"].flatten().tolist()): name for name, bank in zoo.task_vectors.banks.items()}
    scale = 1.0
    monkeypatch.setattr(
        generator, "decode_task_vector", lambda v: scale * zoo.lora_weights(named[tuple(v.flatten().tolist())])
    )
    for scale, shade in ((1.0, "blue"), (0.0, "white"), (3.0, "red")):  # noqa: B007
        mesh = plot_module_errors(generator, zoo).axes[0].collections[0]
        red, _, blue, _ = mesh.to_rgba(mesh.get_array())[0, 0]
        assert {"blue": blue > red + 0.2, "white": red > 0.9 < blue, "red": red > blue + 0.2}[shade]


def make_zoo_of(path, modules):
    """A zoo of two LoRAs of ones in modules of these names; that of `head` is 0."""
    layout = LoraLayout(tuple(LoraModule(name, 8, 8, 2) for name in modules), "frozen_a")
    state = {key: torch.ones(shape) for block, shape in ((layout.blocks, (8, 2)), (layout.shared_blocks, (2, 8)))
             for part in block for key in part.keys()}  # fmt: skip
    if "head" in modules:
        state[f"{PREFIX}head.lora_B.weight"] = torch.zeros(8, 2)
    zoo = LoraZoo.create(
        path, layout=layout, lora_config=CONFIG, base_model_name_or_path="tiny",
        base_model_fingerprint="f" * 64, template=DEFAULT_TEMPLATE,
    )  # fmt: skip
    for name in ("a", "b"):
        zoo.add(name, {1: state})
    banks = {name: {"demonstrations": torch.randn(2, 1, 8)} for name in zoo}
    zoo.add_task_vectors(TaskVectors(TaskVectorSpec(pooling="prompts"), "f" * 64, banks))
    return zoo


def test_modules_of_other_depths_and_without_a_lora_are_blank(tmp_path):
    zoo = make_zoo_of(tmp_path / "zoo", ["encoder.0.q", "encoder.1.q", "decoder.0.1.q", "head"])
    figure = plot_module_errors(make_generator(zoo), zoo)
    cells = figure.axes[0].collections[0].get_array()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["decoder.*.*.q", "encoder.*.q", "head"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["", "0", "0.1", "1"]
    assert cells.mask.tolist() == [[True, True, False, True], [True, False, True, False], [True, True, True, True]]
    pixels(figure)


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        (["a.0.x.q", "a.0.x.v"], ["q", "v"]),
        (["decoder.0.x.q", "encoder.0.x.q"], ["decoder.*.x.q", "encoder.*.x.q"]),
        (["b.q", "c.b.q", "q"], ["b.q", "c.b.q", "q"]),
    ],
)
def test_names_of_modules_are_as_short_as_tells_them_apart(tmp_path, modules, names):
    zoo = make_zoo_of(tmp_path / "zoo", modules)
    (ax, _) = plot_module_errors(make_generator(zoo), zoo).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == names


# The picture, and nothing else


@pytest.mark.parametrize("draw", [lambda: plot_recovered_gain(make_report(GAINS)), lambda: plot_losses(history("kl"))])
def test_the_users_style_is_neither_used_nor_changed(draw):
    expected = pixels(draw())
    assert expected.shape[1] == 1200
    assert (expected[..., :3] == 255).all(-1).float().mean() > 0.7  # a light background
    with matplotlib.rc_context():
        matplotlib.style.use("dark_background")
        matplotlib.rcParams.update({"font.size": 20, "figure.dpi": 50, "axes.spines.right": True})
        before = dict(matplotlib.rcParams)
        figure = draw()
        assert dict(matplotlib.rcParams) == before
        assert torch.equal(pixels(figure), expected)


def test_no_window_no_pyplot_and_the_same_backend():
    code = (
        "import sys, io, matplotlib; from hf_icm_lora.plots import plot_losses\n"
        "matplotlib.use('svg'); figure = plot_losses({'log_history': [{'step': 1, 'loss': 1.0}]})\n"
        "figure.savefig(io.BytesIO(), format='png')\n"
        "print('matplotlib.pyplot' in sys.modules, matplotlib.get_backend())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "svg"]


def test_missing_matplotlib_is_said_before_the_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plot_recovered_gain, plot_losses):
        with pytest.raises(ImportError, match=r"pip install hf_icm_lora\[plots\]"):
            draw({})
    assert main(["evaluate", "--zoo", str(tmp_path / "nowhere"), "--plots"]) == 1
    assert "pip install hf_icm_lora[plots]" in capsys.readouterr().err
    assert main(["evaluate", "--zoo", str(tmp_path / "nowhere")]) == 1
    assert "is not a zoo" in capsys.readouterr().err


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("plots")
    base, tasks = save_base_and_tasks(folder, tokenizer)
    zoo, generator = str(folder / "zoo"), str(folder / "generator")
    args = ["--base_model", base, "--tasks", tasks, "--dtype", "float32"]
    collect = ["collect", "--output_dir", zoo, *args, "--r", "4", "--use_cpu", "True"]
    assert main([*collect, "--max_steps", "8", "--eval_steps", "4"]) == 0
    assert main(["vectors", "--zoo", zoo, *args, "--num_draws", "2"]) == 0
    train = ["train", "--zoo", zoo, *args, "--output_dir", generator, "--unseen", "shift/4", "--hidden_size", "32"]
    small = [
        "--reconstruction_steps",
        "4",
        "--max_steps",
        "4",
        "--logging_steps",
        "2",
        "--save_steps",
        "2",
        "--report_to",
        "none",
        "--use_cpu",
        "True",
    ]
    assert main([*train, *small, "--latent_size", "8", "--disable_tqdm", "True"]) == 0
    short = folder / "generator" / "short" / "checkpoint-1"
    short.mkdir(parents=True)
    (short / "trainer_state.json").write_text('{"log_history": []}')
    evaluate = ["evaluate", "--zoo", zoo, *args, "--generator", generator, "--num_examples", "4"]
    assert main([*evaluate, "--output_dir", str(folder / "with"), "--plots", "--names", "shift/1", "shift/4"]) == 0
    assert main([*evaluate, "--output_dir", str(folder / "without"), "--names", "shift/4"]) == 0
    return folder


def test_command_writes_all_pictures_beside_the_report(folder):
    pictures = {"losses", "losses-reconstruction", "module_errors", "recovered_accuracy", "recovered_gain"}
    expected = {"evaluation.json", "evaluation.md", *(f"{name}.png" for name in pictures)}
    assert {path.name for path in (folder / "with").iterdir()} == expected
    for name in pictures:
        width, height = png_size(folder / "with" / f"{name}.png")
        assert width == 1200
        assert 200 < height < 1200


def test_command_writes_none_unasked(folder):
    assert {path.name for path in (folder / "without").iterdir()} == {"evaluation.json", "evaluation.md"}


def test_pictures_are_of_the_scored_and_the_seen_tasks(folder, tmp_path):
    generator, zoo = LoraGeneratorModel.from_pretrained(folder / "generator"), LoraZoo(folder / "zoo")
    generator.config.training_tasks = ["shift/1", "shift/2", "elsewhere"]
    report = make_report(GAINS)
    for rows in report["splits"].values():
        for summary in rows.values():
            summary["tasks"] = {"shift/4": {"recovered_accuracy": 0.5, "recovered_gain": 0.5}}
    paths = write_plots(tmp_path / "new", generator, zoo, report)
    assert [path.name for path in paths] == ["recovered_accuracy.png", "recovered_gain.png", "module_errors.png"]
    plot_module_errors(generator, zoo.subset(["shift/4", "shift/1", "shift/2"])).savefig(tmp_path / "expected.png")
    assert paths[2].read_bytes() == (tmp_path / "expected.png").read_bytes()
    plot_module_errors(generator, zoo).savefig(tmp_path / "of_all.png")
    assert paths[2].read_bytes() != (tmp_path / "of_all.png").read_bytes()
