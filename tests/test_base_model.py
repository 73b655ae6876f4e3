"""The base model at rest: found, told apart from others, and left as it was."""

import copy

import pytest
import torch
from conftest import make_gpt2, make_llama, make_t5
from peft import LoraConfig, get_peft_model
from test_adapter import CONFIG, assert_as_before, logits, make_state_dict, snapshot

from hf_icm_lora import attach_adapter, base_model_fingerprint, fast_dtype
from hf_icm_lora.base_model import frozen_base, load_base_model


@pytest.mark.parametrize("make", [make_llama, make_t5])
def test_base_models_are_loaded_by_their_own_class(tmp_path, tokenizer, make):
    model = make()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base, loaded = load_base_model(tmp_path, torch.float32)
    assert type(base) is type(model)
    assert base_model_fingerprint(base) == base_model_fingerprint(model)
    assert loaded("letter")["input_ids"] == tokenizer("letter")["input_ids"]
    half, _ = load_base_model(str(tmp_path), "bfloat16")
    assert half.dtype == torch.bfloat16


def test_base_model_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match=r"nowhere': expected a folder or a Hub id .*--base_model"):
        load_base_model(tmp_path / "nowhere")


def test_fingerprint_is_of_the_base_and_not_of_its_dtype_or_adapters(any_model):
    base, targets = any_model
    fingerprint = base_model_fingerprint(base)
    assert base_model_fingerprint(copy.deepcopy(base).bfloat16()) == fingerprint
    config = LoraConfig(target_modules=targets, fan_in_fan_out=type(base).__name__ == "GPT2LMHeadModel")
    model = get_peft_model(base, config, adapter_name="some")
    assert base_model_fingerprint(model) == fingerprint
    assert base_model_fingerprint(base) == fingerprint  # which get_peft_model changed in place
    assert base_model_fingerprint(model.unload()) == fingerprint


def test_fingerprint_is_the_one_that_zoos_and_generators_hold():
    model = torch.nn.Linear(40, 40)
    with torch.no_grad():
        model.weight.copy_(torch.arange(1600.0).reshape(40, 40) / 16)
        model.bias.copy_(torch.arange(40.0))
    assert base_model_fingerprint(model) == "272d1e0d0c13267d0b86122d746f8b8a51ea6b97e8237d9d8f5cac98ee4da673"


def test_fingerprint_tells_bases_apart(any_model):
    base, _ = any_model
    fingerprints = {base_model_fingerprint(make_llama(seed)) for seed in range(3)} | {
        base_model_fingerprint(make_gpt2())
    }
    assert len(fingerprints) == 4
    other = copy.deepcopy(base)
    with torch.no_grad():
        list(other.parameters())[-1].add_(0.5)  # one single tensor
    assert base_model_fingerprint(other) != base_model_fingerprint(base)


@pytest.mark.parametrize("inner", [False, True], ids=["peft_model", "its_base"])
@pytest.mark.parametrize("error", [None, KeyError])
def test_frozen_base_is_the_plain_base_and_everything_is_restored(llama, inner, error):
    plain = logits(llama)
    model = attach_adapter(llama, CONFIG, make_state_dict())
    adapted = logits(model)
    model.train()
    llama.model.norm.eval()
    next(iter(model.parameters())).requires_grad_(True)
    given = llama if inner else model
    before = snapshot(given)
    try:
        with frozen_base(given) as base:
            assert base is llama
            assert not any(module.training for module in base.modules())
            assert not torch.is_grad_enabled()
            assert torch.equal(logits(base), plain)
            if error:
                raise error
    except KeyError:
        pass
    assert torch.is_grad_enabled()
    assert_as_before(given, before)
    assert torch.equal(logits(model.eval()), adapted)


def test_frozen_base_leaves_disabled_adapters_disabled(llama):
    model = attach_adapter(llama, CONFIG, make_state_dict())
    with model.disable_adapter():
        plain = logits(model)
        with frozen_base(model) as base:
            assert torch.equal(logits(base), plain)
        assert torch.equal(logits(model), plain)


def test_fast_dtype_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert fast_dtype.__wrapped__() == torch.bfloat16


@pytest.mark.parametrize(("slow", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_fast_dtype_is_the_one_that_this_machine_multiplies_faster(monkeypatch, slow, expected):
    clock = [0.0]

    def matmul(x, other):
        clock[0] += 2.0 if x.dtype == slow else 1.0
        return x

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert fast_dtype.__wrapped__() == expected
