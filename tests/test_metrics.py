"""The metrics: by hand, against numpy, in batches, and as `evaluate.load` reads their folders without a network."""

import math
import re
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from conftest import make_llama
from huggingface_hub import SpaceCard

from hf_icm_lora import ArgumentError, IncompatibleAdapterError, LoraLayout, metrics
from hf_icm_lora.completion import CompletionCollator, render, score_completions
from hf_icm_lora.layout import LoraModule
from hf_icm_lora.metrics import (
    BitsPerCharacter,
    LoraReconstruction,
    RecoveredGain,
    bits_per_character,
    lora_reconstruction,
    perplexity,
)

ROOT = Path(__file__).parent.parent
METRICS = {"recovered_gain": RecoveredGain, "bits_per_character": BitsPerCharacter,
           "lora_reconstruction": LoraReconstruction}  # fmt: skip
# Modules of two kinds, ranks and sizes: q of both layers first, then v; A and B of each lie apart.
MODULES = (LoraModule("layers.0.q", 3, 4, 2), LoraModule("layers.1.q", 3, 4, 2), LoraModule("layers.0.v", 5, 2, 1))
LAYOUTS = {gauge: LoraLayout(MODULES, gauge) for gauge in ("frozen_a", "shared_init")}
GAINS = {"base_loss": [3.0, 2.0, 1.0, 2.0], "loss": [1.5, 1.8, 0.9, 9.0], "task_lora_loss": [1.0, 1.0, 1.2, 1.0]}
TEXTS = {"loss": [2.5, 4.2, 0.8], "num_tokens": [2, 3, 1], "num_characters": [9, 11, 4]}
ADAPTERS = {name: np.random.default_rng(seed).normal(size=(3, 18)).astype(np.float32).tolist()
            for seed, name in enumerate(("predictions", "references"))}  # fmt: skip
INPUTS = dict(zip(METRICS, (GAINS, TEXTS, ADAPTERS), strict=True))


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory):
    """What `evaluate` writes goes to a temporary directory: inputs, and copies of the scripts that it loads."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_METRICS_CACHE", "HF_MODULES_CACHE"):
            patch.setattr(evaluate.config, name, tmp_path_factory.mktemp(name))
        patch.setattr(sys, "path", list(sys.path))
        yield


# Values


def test_recovered_gain_by_hand():
    scores = RecoveredGain().compute(**GAINS)
    assert scores["recovered_gains"] == pytest.approx([0.75, 0.2, None, -1.0])  # the last is clipped, from -7
    assert scores["num_undefined"] == 1
    assert scores["mean_recovered_gain"] == pytest.approx(-0.05 / 3, rel=1e-12)
    assert scores["median_recovered_gain"] == pytest.approx(0.2)
    assert scores["min_recovered_gain"] == -1


def test_recovered_gain_where_fine_tuning_gained_nothing():
    assert RecoveredGain().compute(base_loss=[1.0], loss=[0.5], task_lora_loss=[1.0]) == {
        "mean_recovered_gain": None, "median_recovered_gain": None, "min_recovered_gain": None,
        "recovered_gains": [None], "num_undefined": 1,
    }  # fmt: skip


def test_bits_per_character_weighs_characters_and_not_texts():
    scores = BitsPerCharacter().compute(**TEXTS)
    assert scores == pytest.approx(
        {"bits_per_character": np.log2(np.e) * 7.5 / 24, "perplexity": np.exp(7.5 / 6)}, rel=1e-12
    )
    assert scores == {"bits_per_character": bits_per_character(7.5, 24), "perplexity": perplexity(7.5, 6)}


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tokenizer, tasks):
    model = make_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    collate = CompletionCollator(tokenizer)
    loss, num_tokens, _ = score_completions(model, collate(tasks[0].test))
    lengths = [len(render(sample, collate.template, tokenizer)[1]) for sample in tasks[0].test]
    scores = BitsPerCharacter().compute(loss=loss.detach(), num_tokens=num_tokens, num_characters=lengths)
    # The tokenizer's tokens are characters, so that both figures tell the same.
    assert scores == pytest.approx({"perplexity": 128, "bits_per_character": 7}, rel=1e-5)


def test_lora_reconstruction_by_hand():
    scores = lora_reconstruction([[3.0, 4.0], [0.0, 1.0]], [[3.0, 4.0], [1.0, 0.0]])
    assert scores == pytest.approx(
        {"relative_error": math.sqrt(2) / 2, "cosine": 0.5, "explained_variance": 1 - 2 / (2 + 8)}
    )


@pytest.mark.parametrize("center", [None, np.linspace(-1, 1, 18)])
def test_lora_reconstruction_against_numpy(center):
    p, r = (np.array(ADAPTERS[name]) for name in ("predictions", "references"))
    around = r.mean(0) if center is None else center
    norm = np.linalg.norm
    assert LoraReconstruction().compute(**ADAPTERS, center=center) == pytest.approx(
        {
            "relative_error": (norm(p - r, axis=1) / norm(r, axis=1)).mean(),
            "cosine": ((p * r).sum(1) / norm(p, axis=1) / norm(r, axis=1)).mean(),
            "explained_variance": 1 - ((p - r) ** 2).sum() / ((r - around) ** 2).sum(),
        },
        rel=1e-9,
    )


@pytest.mark.parametrize("gauge", LAYOUTS)
@pytest.mark.parametrize("name", [module.name for module in MODULES])
def test_modules_are_scored_by_their_own_weights(gauge, name):
    """Add noise to one module's matrices where they lie in a state dict: all other modules stay perfect."""
    layout, generator = LAYOUTS[gauge], torch.Generator().manual_seed(0)
    config = {"r": 2, "lora_alpha": 2, "rank_pattern": {"v": 1}, "alpha_pattern": {"v": 1}}
    adapters = [
        {
            f"base_model.model.{module.name}.lora_{factor}.weight": torch.randn(shape, generator=generator)
            for module in MODULES
            for factor, shape in (("A", (module.rank, module.in_features)), ("B", (module.out_features, module.rank)))
        }
        for _ in range(3)
    ]
    changed = [{key: 1.5 * value if f".{name}." in key else value for key, value in a.items()} for a in adapters]
    predictions, references = ([layout.pack(a, config)[0] for a in side] for side in (changed, adapters))
    scores = LoraReconstruction().compute(
        predictions=torch.stack(predictions), references=torch.stack(references), layout=layout.to_dict()
    )
    perfect = {"relative_error": 0, "cosine": 1, "explained_variance": 1}
    assert list(scores["modules"]) == [module.name for module in layout.modules]
    for other, module_scores in scores["modules"].items():
        if other == name:
            assert module_scores["relative_error"] == pytest.approx(0.5)
            assert module_scores["explained_variance"] < 0.9
        else:
            assert module_scores == pytest.approx(perfect)
    assert 0 < scores["relative_error"] < 0.5
    # The squared errors of the modules are those of the whole.
    whole = lora_reconstruction(torch.stack(predictions), torch.stack(references), layout=layout)
    assert whole == scores


def test_what_is_not_defined_is_none_and_counts_in_no_mean():
    one = lora_reconstruction([[1.0, 2.0]], [[2.0, 1.0]])
    assert one["explained_variance"] is None
    assert one["cosine"] == pytest.approx(0.8)
    assert lora_reconstruction([[1.0, 2.0]], [[2.0, 1.0]], center=[0, 0])["explained_variance"] == pytest.approx(0.6)
    alike = lora_reconstruction([[1.0, 2.0]] * 3, [[0.1, 0.7]] * 3)  # whose mean is another number, by rounding
    assert alike["explained_variance"] is None
    zero = lora_reconstruction([[1.0, 2.0], [2.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]])
    assert zero["relative_error"] == zero["cosine"] == 1
    assert lora_reconstruction([[1.0]], [[0.0]])["relative_error"] is None


def test_a_prediction_of_nothing_explains_nothing():
    scores = lora_reconstruction(torch.zeros(2, 2), [[1.0, 2.0], [3.0, -1.0]], center=[0.0, 0.0])
    assert scores == {"relative_error": 1, "cosine": 0, "explained_variance": 0}


# As modules of `evaluate`


@pytest.mark.parametrize("name", METRICS)
def test_folders_load_without_a_network(name):
    loaded = evaluate.load(str(ROOT / "metrics" / name))
    assert type(loaded) is METRICS[name]  # not a copy of it
    assert loaded.name == name
    assert loaded.module_type == "metric"
    assert loaded.description.endswith(".")
    assert loaded.inputs_description.startswith("Args")
    assert "2501.17635" in loaded.citation
    assert loaded.compute(**INPUTS[name]) == METRICS[name]().compute(**INPUTS[name])


@pytest.mark.parametrize("keep_in_memory", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_batches_add_up(name, keep_in_memory):
    first, rest = ({key: values[part] for key, values in INPUTS[name].items()} for part in (slice(2), slice(2, None)))
    whole = METRICS[name]().compute(**INPUTS[name])
    metric = METRICS[name](keep_in_memory=keep_in_memory)
    assert metric.compute(**first) != whole
    metric.add_batch(**first)  # nothing is left of what was computed before
    metric.add_batch(**rest)
    assert metric.compute() == whole


@pytest.mark.parametrize("name", METRICS)
def test_cards_are_of_the_hubs_form_and_their_snippets_run(name, monkeypatch, capsys):
    card = SpaceCard.load(ROOT / "metrics" / name / "README.md")
    assert card.data.sdk == "gradio"
    assert card.data.tags == ["evaluate", "metric"]
    assert card.data.title
    assert card.data.to_dict()["description"]
    for heading in ("Description", "How to use", "Inputs", "Output values", "Limitations", "Citation"):
        assert re.search(rf"^##+ {heading}$", card.content, re.MULTILINE), heading
    assert all(f"- **{key}** (" in card.content for key in INPUTS[name])
    assert metrics.CITATION in card.content
    monkeypatch.chdir(ROOT)
    [snippet] = re.findall(r"^```python\n(.*?)^```", card.content, re.MULTILINE | re.DOTALL)
    exec(compile(snippet, f"{name}/README.md", "exec"), {})
    promised = re.findall(r"^print\(.*\)  # (.+)$", snippet, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised
    assert promised


# Bad input


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("recovered_gain", {"loss": None}, "base_loss, loss, task_lora_loss; without a value: loss"),
        ("recovered_gain", {"loss": [1.0]}, r"Mismatch in the number of base_loss \(4\) and loss \(1\)"),
        ("recovered_gain", {"loss": [1.0, math.nan, 1.0, 1.0]}, "loss: 1 values are not finite"),
        ("recovered_gain", {"base_loss": [1.0, None, 1.0, math.inf]}, "base_loss: expected numbers of shape"),
        ("recovered_gain", dict.fromkeys(GAINS, []), r"base_loss: expected the shape \(tasks\), found \(0,\)"),
        ("bits_per_character", {"loss": [-2.5, -4.25, -0.75]}, "loss: expected nothing below 0"),
        ("bits_per_character", {"num_tokens": [7, -1, 0]}, "num_tokens: expected nothing below 0"),
        ("bits_per_character", {"num_characters": [0, 0, 0]}, "7.5 nats for 0.0 characters"),
        ("bits_per_character", {"loss": [9e3, 9e3, 9e3]}, "from 0 to 700 nats per"),
        ("bits_per_character", {"num_tokens": None}, "without a value: num_tokens"),
        ("lora_reconstruction", {"references": None}, "without a value: references"),
        ("lora_reconstruction", {"references": [[1.0]] * 3}, r"equally many weights, found \(3, 18\), \(3, 1\)"),
        ("lora_reconstruction", {"references": [[1.0], [1.0, 2.0], [1.0]]}, "references: expected numbers of shape"),
        ("lora_reconstruction", {"predictions": [[math.inf] * 18] * 3}, "predictions: 54 values are not finite"),
        ("lora_reconstruction", {"center": [1.0]}, r"\(3, 18\), \(1,\)"),
        ("lora_reconstruction", {"center": 1.0}, r"center: expected the shape \(num_weights\), found \(\)"),
    ],
)
def test_bad_input_is_said(name, changed, message):
    inputs = INPUTS[name] | changed
    with pytest.raises(ValueError, match=message):
        METRICS[name](keep_in_memory=True).compute(**inputs)


def test_a_layout_of_other_weights_is_refused():
    with pytest.raises(IncompatibleAdapterError, match="35 weights, not 18"):
        LoraReconstruction(keep_in_memory=True).compute(**ADAPTERS, layout=LAYOUTS["shared_init"])


@pytest.mark.parametrize("loss", [-1.0, math.nan, math.inf])
def test_functions_refuse_losses_that_are_none(loss):
    for function in (bits_per_character, perplexity):
        with pytest.raises(ArgumentError, match="Expected a loss"):
            function(loss, 3)
