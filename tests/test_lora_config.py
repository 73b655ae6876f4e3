"""Configurations: what a plain LoRA is, and what is made of one."""

import json
import math

import pytest
from conftest import make_llama
from peft import LoraConfig

from hf_icm_lora import IncompatibleAdapterError, LoraLayout
from hf_icm_lora.lora_config import (
    canonical_lora_config,
    check_module_name,
    check_plain_lora,
    lora_config_to_dict,
    shortest_target_modules,
    with_named_targets,
)

CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"LoraConfig\.use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"LoraConfig\.modules_to_save"),
        ({"bias": "all"}, r"LoraConfig\.bias='all'"),
        ({"lora_bias": True}, r"LoraConfig\.lora_bias"),
        ({"trainable_token_indices": [1]}, r"LoraConfig\.trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, r"LoraConfig\.layer_replication"),
        ({"target_parameters": ["w"]}, r"LoraConfig\.target_parameters"),
        (
            {"init_lora_weights": "pissa"},
            r"LoraConfig\.init_lora_weights='pissa'",
        ),  # PEFT then changes the base itself
        ({"init_lora_weights": "olora"}, r"LoraConfig\.init_lora_weights='olora'"),
        ({"init_lora_weights": "pissa_niter_4"}, r"LoraConfig\.init_lora_weights='pissa_niter_4'"),
        ({"r": 0}, r"LoraConfig\.r: .* found 0"),
        ({"r": 10**9}, r"LoraConfig\.r: .* found 1000000000"),
        ({"r": -4}, r"LoraConfig\.r: .* found -4"),
        ({"r": True}, r"LoraConfig\.r: .* found True"),
        ({"r": "8"}, r"LoraConfig\.r: .* found '8'"),
        ({"r": None}, r"LoraConfig\.r: .* found None"),
        ({"lora_alpha": math.nan}, r"LoraConfig\.lora_alpha: .* found nan"),
        ({"alpha_pattern": ["q_proj"]}, r"LoraConfig\.alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "big"}}, r"LoraConfig\.alpha_pattern"),
        ({"alpha_pattern": {"q_proj": math.inf}}, r"LoraConfig\.alpha_pattern"),
        ({"alpha_pattern": {"q_proj(": 4}}, r"LoraConfig\.alpha_pattern"),
        ({"peft_type": "IA3"}, "peft_type 'LORA', found 'IA3'"),
    ],
)
def test_configurations_that_are_no_plain_lora_are_refused_by_field(change, message):
    check_plain_lora(CONFIG)
    with pytest.raises(IncompatibleAdapterError, match=message):
        check_plain_lora(CONFIG | change)
    with pytest.raises(IncompatibleAdapterError, match=message):
        LoraLayout.from_state_dict({}, CONFIG | change, "frozen_a")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_plain(init):
    check_plain_lora(LoraConfig(**CONFIG, init_lora_weights=init).to_dict())


def test_plain_configuration_survives_json_and_peft():
    config = LoraConfig(r=4, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM", rank_pattern={"q_proj": 2})
    plain = json.loads(json.dumps(lora_config_to_dict(config)))
    assert plain == {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM", "rank_pattern": {"q_proj": 2},
    }  # fmt: skip
    assert LoraConfig(**plain).to_dict() == config.to_dict()
    assert lora_config_to_dict(plain | {"target_modules": ["v_proj", "q_proj"]}) == plain  # the order means nothing


def test_canonical_configuration_scales_by_one():
    config = canonical_lora_config(
        CONFIG
        | {"use_rslora": True, "alpha_pattern": {"q": 2}, "rank_pattern": {"q": 2}, "lora_dropout": 0.1}
        | {"init_lora_weights": "olora", "inference_mode": False},
        rank=8,
    )
    assert config == CONFIG | {"r": 8, "lora_alpha": 8, "inference_mode": True}


@pytest.mark.parametrize(
    ("fields", "targets"),
    [
        ({}, ["q_proj", "v_proj"]),
        ({"target_modules": ".*q_proj"}, ["a.q_proj", "b.q_proj"]),
        ({"target_modules": None}, ["a.q_proj", "b.q_proj"]),
        ({"layers_to_transform": [1]}, ["a.q_proj", "b.q_proj"]),
        ({"exclude_modules": ["v_proj"]}, ["a.q_proj", "b.q_proj"]),
    ],
    ids=["list", "regex", "none", "layers", "excluded"],
)
def test_modules_that_are_chosen_by_a_rule_are_named_instead(fields, targets):
    named = with_named_targets(CONFIG | fields, {"b.q_proj", "a.q_proj"})
    assert named["target_modules"] == targets
    assert not any(named.get(field) for field in ("layers_to_transform", "layers_pattern", "exclude_modules"))


def test_short_targets_are_taken_where_they_mean_the_same():
    base = make_llama()
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    assert shortest_target_modules(paths, base) == ["q_proj", "v_proj"]
    assert shortest_target_modules(paths[:2], base) == paths[:2]  # the short names would mean layer 1, too


@pytest.mark.parametrize("name", ["", "..", "a..b", "a/b", "é", "a" * 201, "layers.123456.q", None])
def test_names_that_are_no_path_of_a_module(name):
    check_module_name("model.layers.12345.self_attn.q-proj_1")
    with pytest.raises(IncompatibleAdapterError, match="the path of a module"):
        check_module_name(name)
