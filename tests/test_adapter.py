"""Adapters: read strictly, written so that PEFT reads them, attached exactly or not at all."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
from conftest import make_gpt2, make_llama
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from hf_icm_lora import (
    AlreadyExistsError,
    CorruptAdapterError,
    IncompatibleAdapterError,
    attach_adapter,
    load_adapter,
    save_adapter,
)
from hf_icm_lora.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_state_dict,
)
from hf_icm_lora.layout import PREFIX
from hf_icm_lora.lora_config import lora_config_to_dict

IDS = torch.tensor([[5, 17, 3, 99, 42, 8]])
Q0, V1 = (f"{PREFIX}model.layers.{i}.self_attn.{name}_proj" for i, name in ((0, "q"), (1, "v")))
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip


def logits(model, ids=IDS):
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def make_state_dict(seed=0, rank=4):
    """A state dict for `CONFIG` on the tiny Llama (two layers, 32 wide, keys and values 16 wide)."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for layer in range(2):
        for name, width in (("q_proj", 32), ("v_proj", 16)):
            key = f"{PREFIX}model.layers.{layer}.self_attn.{name}"
            state_dict[f"{key}.lora_A.weight"] = 0.3 * torch.randn(rank, 32, generator=generator)
            state_dict[f"{key}.lora_B.weight"] = 0.3 * torch.randn(width, rank, generator=generator)
    return state_dict


def snapshot(base):
    return {
        "weights": {name: tensor.clone() for name, tensor in base.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in base.named_parameters()},
        "training": {name: module.training for name, module in base.named_modules()},
        "modules": [type(module) for module in base.modules()],
        "peft_config": hasattr(base, "peft_config"),
        "logits": logits(base),
    }


def assert_as_before(base, before):
    after = snapshot(base)
    for part in ("weights", "requires_grad", "training"):
        assert after[part].keys() == before[part].keys()
    assert all(torch.equal(after["weights"][name], before["weights"][name]) for name in before["weights"])
    assert torch.equal(after["logits"], before["logits"])
    for part in ("modules", "requires_grad", "training", "peft_config"):
        assert after[part] == before[part]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    save_adapter(path, CONFIG, make_state_dict())
    return path


# Reading


def test_round_trip_keeps_every_bit(folder):
    config, state_dict = load_adapter(folder)
    assert state_dict.keys() == make_state_dict().keys()
    assert all(torch.equal(state_dict[key], tensor) for key, tensor in make_state_dict().items())
    assert lora_config_to_dict(config) == lora_config_to_dict(CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_of_transposed_views_and_shared_storages(tmp_path, dtype):
    storage = torch.arange(4 * 32).reshape(4, 32).to(dtype)
    state_dict = {
        f"{Q0}.lora_A.weight": storage, f"{Q0}.lora_B.weight": storage.T,
        f"{V1}.lora_A.weight": storage, f"{V1}.lora_B.weight": storage[:, :16].T,
    }  # fmt: skip
    save_adapter(tmp_path / "adapter", CONFIG, state_dict)
    _, read = load_adapter(tmp_path / "adapter")
    assert all(torch.equal(read[key], tensor) and read[key].dtype == dtype for key, tensor in state_dict.items())


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 2000, -1])
def test_truncated_weights_are_refused_with_their_path(folder, kept):
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(CorruptAdapterError, match=rf"{WEIGHTS_FILE}: not a whole safetensors file"):
        load_adapter(folder)


def _no_tensors(folder):
    save_file({}, folder / WEIGHTS_FILE)


def _not_finite(value):
    def spoil(folder):
        state_dict = make_state_dict()
        state_dict[f"{V1}.lora_B.weight"][3, 1] = value
        save_file(state_dict, folder / WEIGHTS_FILE)

    return spoil


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _config(**fields):
    return lambda folder: (folder / CONFIG_FILE).write_text(json.dumps(CONFIG | fields))


def _only_pickle(folder):
    (folder / WEIGHTS_FILE).unlink()
    torch.save(make_state_dict(), folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        pytest.param(_write(WEIGHTS_FILE, b"<html></html>"), CorruptAdapterError, f"{WEIGHTS_FILE}: not a", id="html"),
        pytest.param(_write(WEIGHTS_FILE, b"\xff" * 500), CorruptAdapterError, f"{WEIGHTS_FILE}: not a", id="noise"),
        pytest.param(_no_tensors, CorruptAdapterError, "holds no tensors", id="none"),
        pytest.param(_not_finite(math.nan), CorruptAdapterError, rf"{V1}\.lora_B\.weight holds values", id="nan"),
        pytest.param(_not_finite(math.inf), CorruptAdapterError, rf"{V1}\.lora_B\.weight holds values", id="inf"),
        pytest.param(
            lambda folder: (folder / CONFIG_FILE).unlink(),
            CorruptAdapterError, f"{CONFIG_FILE}: expected a PEFT configuration in JSON", id="no_config",
        ),
        pytest.param(_write(CONFIG_FILE, b"{r: 4}"), CorruptAdapterError, f"{CONFIG_FILE}: expected", id="no_json"),
        pytest.param(_write(CONFIG_FILE, b""), CorruptAdapterError, f"{CONFIG_FILE}: expected", id="empty_config"),
        pytest.param(_write(CONFIG_FILE, b"\xff\xfe{}"), CorruptAdapterError, f"{CONFIG_FILE}: exp", id="utf16"),
        pytest.param(_write(CONFIG_FILE, b"[]"), IncompatibleAdapterError, "JSON object, found list", id="list"),
        pytest.param(_config(r=0), IncompatibleAdapterError, rf"{CONFIG_FILE}: LoraConfig\.r", id="rank_0"),
        pytest.param(_config(use_dora=True), IncompatibleAdapterError, rf"{CONFIG_FILE}: .*\.use_dora", id="dora"),
        pytest.param(_config(peft_type="IA3"), IncompatibleAdapterError, f"{CONFIG_FILE}: .*found 'IA3'", id="ia3"),
        pytest.param(_only_pickle, CorruptAdapterError, "safetensors is missing.*adapter_model.bin", id="pickle"),
    ],
)  # fmt: skip
def test_malformed_folders_get_a_typed_error_with_the_path(folder, monkeypatch, spoil, error, message):
    spoil(folder)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("A pickle was opened."))
    with pytest.raises(error, match=message) as caught:
        load_adapter(folder)
    assert str(folder) in str(caught.value)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(CorruptAdapterError, match="nowhere"):
        load_adapter(tmp_path / "nowhere")


# Writing


def test_peft_reads_what_is_saved(folder, llama):
    ours = attach_adapter(make_llama(), CONFIG, make_state_dict())
    theirs = PeftModel.from_pretrained(llama, folder)
    assert isinstance(theirs, PeftModelForCausalLM)
    assert torch.equal(logits(theirs), logits(ours))


def test_saved_configuration_says_what_peft_would(folder):
    config = LoraConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.task_type) == (4, 4, "CAUSAL_LM")
    assert config.target_modules == {"q_proj", "v_proj"}


def test_saved_configuration_does_not_depend_on_the_hash_seed(tmp_path):
    modules = [f"module_{letter}" for letter in "hgfedcbaponmlkji"]
    save_adapter(tmp_path / "adapter", CONFIG | {"target_modules": modules}, make_state_dict())
    assert json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["target_modules"] == sorted(modules)


def test_existing_folder_is_not_overwritten(folder):
    before = (folder / WEIGHTS_FILE).read_bytes()
    with pytest.raises(AlreadyExistsError, match="exists already"):
        save_adapter(folder, CONFIG, make_state_dict(seed=1))
    assert (folder / WEIGHTS_FILE).read_bytes() == before


def test_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="no_such_field"):  # after the weights are written
        save_adapter(tmp_path / "adapter", CONFIG | {"no_such_field": 1}, make_state_dict())
    assert list(tmp_path.iterdir()) == []


# Attaching


@pytest.mark.parametrize(("task_type", "expected"), [("CAUSAL_LM", PeftModelForCausalLM), (None, PeftModel)])
def test_attached_model_has_the_type_of_its_task(llama, task_type, expected):
    assert type(attach_adapter(llama, CONFIG | {"task_type": task_type}, make_state_dict())) is expected


def test_configuration_in_the_model_is_the_one_that_peft_would_have_made(llama):
    ours = attach_adapter(llama, CONFIG, make_state_dict()).peft_config["default"]
    theirs = get_peft_model(make_llama(), LoraConfig(**CONFIG)).peft_config["default"]
    assert ours.target_modules == {"q_proj", "v_proj"}
    assert ours.base_model_name_or_path is None  # what this copy of the base is called says nothing
    assert dataclasses.replace(ours, base_model_name_or_path=theirs.base_model_name_or_path) == theirs


def test_attached_weights_are_the_given_ones_frozen_and_their_own(llama):
    given = make_state_dict()
    model = attach_adapter(llama.train(), CONFIG, given)
    assert adapter_state_dict(model).keys() == given.keys()
    assert all(torch.equal(tensor, given[key]) for key, tensor in adapter_state_dict(model).items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    before = logits(model)
    for tensor in given.values():
        tensor.zero_()
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), before, atol=1e-2)


def test_given_configuration_is_not_changed(llama):
    config = copy.deepcopy(CONFIG)
    attach_adapter(llama, config, make_state_dict())
    assert config == CONFIG


def test_reading_and_attaching_fit_together(folder, llama):
    model = attach_adapter(llama, *load_adapter(folder))
    assert all(torch.equal(tensor, make_state_dict()[key]) for key, tensor in adapter_state_dict(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapter_takes_the_dtype_of_the_base(dtype):
    model = attach_adapter(make_llama(dtype=dtype), CONFIG, make_state_dict())
    assert {tensor.dtype for tensor in adapter_state_dict(model).values()} == {dtype}
    assert logits(model).isfinite().all()


def test_second_adapter_joins_the_first_and_is_active(llama):
    model = attach_adapter(llama, CONFIG, make_state_dict(0), "one")
    first = logits(model)
    assert attach_adapter(model, CONFIG | {"r": 2}, make_state_dict(1, rank=2), "two") is model
    assert list(model.peft_config) == ["one", "two"]
    assert model.active_adapter == "two"
    alone = attach_adapter(make_llama(), CONFIG | {"r": 2}, make_state_dict(1, rank=2))
    torch.testing.assert_close(logits(model), logits(alone))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("one")
    assert torch.equal(logits(model), first)


def test_same_name_is_overwritten_in_place(llama):
    model = attach_adapter(llama, CONFIG, make_state_dict(0), "one")
    attach_adapter(model, CONFIG, make_state_dict(1), "two")
    attach_adapter(model, CONFIG, make_state_dict(2), "one")
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert attach_adapter(model, CONFIG, make_state_dict(3), "one") is model
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert model.active_adapter == "one"
    for name, seed in (("one", 3), ("two", 1)):
        found = adapter_state_dict(model, name)
        assert all(torch.equal(found[key], tensor) for key, tensor in make_state_dict(seed).items())


@pytest.mark.parametrize(
    "fields",
    [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 1}}, {"alpha_pattern": {"layers.0.*": 7}}],
    ids=["alpha", "rslora", "alpha_pattern", "alpha_pattern_regex"],
)
def test_overwriting_takes_over_the_scaling_too(llama, fields):
    model = attach_adapter(llama, CONFIG, make_state_dict(0))
    attach_adapter(model, CONFIG | fields, make_state_dict(1))
    fresh = attach_adapter(make_llama(), CONFIG | fields, make_state_dict(1))
    torch.testing.assert_close(logits(model), logits(fresh))


def _without(*names):
    return {key: t for key, t in make_state_dict().items() if not any(name in key for name in names)}


def _resized(key, *shape):
    return make_state_dict() | {key: torch.ones(shape)}


BAD_WEIGHTS = [
    pytest.param({}, _without("layers.1.self_attn.v_proj"), "without weights", id="module_missing"),
    pytest.param({"target_modules": ["q_proj"]}, make_state_dict(), "without a place", id="module_unexpected"),
    pytest.param({}, _without("layers.0.self_attn.q_proj.lora_B"), "found one of them for", id="half_missing"),
    pytest.param({}, {}, "without weights", id="empty"),
    pytest.param({"r": 8}, make_state_dict(), "q_proj.*found rank 4, but LoraConfig says 8", id="rank"),
    pytest.param({}, _resized(f"{Q0}.lora_A.weight", 4, 48), r"\(4, 48\), which does not fit", id="width"),
    pytest.param({}, _resized(f"{V1}.lora_A.weight", 4, 16), "v_proj", id="sides_exchanged"),
    pytest.param(
        {}, {key.replace("model.layers", "transformer.h"): t for key, t in make_state_dict().items()},
        "LlamaForCausalLM.* has no module 'transformer.h.0.self_attn.q_proj'", id="other_base",
    ),
    pytest.param({}, make_state_dict() | {"nonsense": torch.ones(1)}, "nonsense", id="stray_key"),
    pytest.param({"target_modules": ["no_such"]}, make_state_dict(), "no_such", id="no_such_target"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "weights", "message"), BAD_WEIGHTS)
def test_weights_that_do_not_fit_leave_a_base_as_it_was(llama, fields, weights, message):
    llama.train()
    llama.model.norm.eval()
    llama.lm_head.weight.requires_grad_(False)
    before = snapshot(llama)
    with pytest.raises(IncompatibleAdapterError, match=message):
        attach_adapter(llama, CONFIG | fields, weights)
    assert_as_before(llama, before)
    assert attach_adapter(llama, CONFIG, make_state_dict())  # and it can still take one that fits


@pytest.mark.parametrize(("fields", "weights", "message"), BAD_WEIGHTS)
def test_weights_that_do_not_fit_leave_other_adapters_as_they_were(llama, fields, weights, message):
    model = attach_adapter(llama, CONFIG, make_state_dict(), "one")
    before = snapshot(model)
    with pytest.raises(IncompatibleAdapterError, match=message):
        attach_adapter(model, CONFIG | fields, weights, "two")
    assert_as_before(model, before)
    assert list(model.peft_config) == ["one"]
    assert model.active_adapter == "one"


@pytest.mark.parametrize(
    ("fields", "weights", "message"),
    [
        pytest.param(
            {}, _without("layers.1.self_attn.v_proj"), "'one' exists with another layout", id="module_missing"
        ),
        pytest.param({"r": 2}, make_state_dict(rank=2), r"is \(4, 32\) in the model, \(2, 32\) in", id="other_rank"),
        pytest.param({"r": 8}, make_state_dict(), "found rank 4, but LoraConfig says 8", id="rank"),
        pytest.param({}, make_state_dict() | {"nonsense": torch.ones(1)}, "nonsense", id="stray_key"),
        pytest.param({"use_dora": True}, make_state_dict(), "use_dora", id="dora"),
    ],
)
def test_failed_overwriting_leaves_the_adapter_as_it_was(llama, fields, weights, message):
    model = attach_adapter(llama, CONFIG, make_state_dict(), "one")
    before = snapshot(model)
    with pytest.raises(IncompatibleAdapterError, match=message):
        attach_adapter(model, CONFIG | fields, weights, "one")
    assert_as_before(model, before)


def test_overwriting_names_the_first_tensor_that_differs(llama):
    model = attach_adapter(llama, CONFIG, make_state_dict(), "one")
    with pytest.raises(IncompatibleAdapterError, match=re.escape(f"{V1}.lora_A.weight is (4, 32) in the model, None")):
        attach_adapter(model, CONFIG, _without("layers.1.self_attn.v_proj"), "one")


def test_ranks_may_differ_from_module_to_module(llama):
    weights = {key: t if "q_proj" in key else t[:2] if "lora_A" in key else t[:, :2]
               for key, t in make_state_dict().items()}  # fmt: skip
    model = attach_adapter(llama, CONFIG | {"rank_pattern": {"v_proj": 2}}, weights)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in adapter_state_dict(model).items())
    with pytest.raises(IncompatibleAdapterError, match="v_proj.lora_A.weight: found rank 2, but LoraConfig says 4"):
        attach_adapter(make_llama(), CONFIG, weights)


def test_adapter_of_another_architecture_is_refused(llama):
    gpt2 = make_gpt2()
    before = snapshot(gpt2)
    with pytest.raises(IncompatibleAdapterError, match="Load the base model that the adapter was made for"):
        attach_adapter(gpt2, CONFIG, make_state_dict())
    assert_as_before(gpt2, before)


def test_merged_model_answers_like_the_adapter(any_model):
    base, targets = any_model
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=type(base).__name__ == "GPT2LMHeadModel")
    theirs = get_peft_model(copy.deepcopy(base), config)
    weights = {key: 0.2 * torch.randn_like(tensor) for key, tensor in adapter_state_dict(theirs).items()}
    model = attach_adapter(base, config.to_dict(), weights)
    plain, adapted = logits(copy.deepcopy(model).unload()), logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert not torch.allclose(adapted, plain, atol=1e-2)
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-4)
