"""LoraGeneratorConfig: a round trip through JSON, strict fields, errors that name the field."""

import json
from pathlib import Path

import pytest
from conftest import copy_zoo, make_llama
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_icm_lora import (
    IcmLoraError,
    IncompatibleAdapterError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    TaskVectorExtractor,
    TaskVectorSpec,
    ZooError,
)

LAYOUT = {"gauge": "frozen_a", "modules": [["model.layers.0.self_attn.q_proj", 8, 6, 2]]}


@pytest.fixture(scope="module")
def zoo(world, tokenizer, tmp_path_factory):
    """LoRAs of a base model that was loaded from a local folder, and vectors of two layers."""
    zoo = copy_zoo(world.zoo, tmp_path_factory.mktemp("configuration") / "zoo")
    spec = TaskVectorSpec(num_demonstrations=4, num_draws=2, layers=(1, -1))
    zoo.add_task_vectors(TaskVectorExtractor(spec).extract(make_llama(), tokenizer, world.tasks[:4]))
    return zoo


def test_json_round_trip(tmp_path, zoo):
    config = LoraGeneratorConfig.from_zoo(zoo, architecture="conv1d", prior="none", latent_size=7, dropout=0.1)
    config.save_pretrained(tmp_path)
    for again in (LoraGeneratorConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is LoraGeneratorConfig
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert again.lora_layout == zoo.layout
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "icm_lora_generator"


def test_defaults_make_a_configuration():
    config = LoraGeneratorConfig()
    assert (config.architecture, config.token_granularity, config.prior) == ("transformer", "matrix", "learned")
    assert config.layout is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("layout", "q_proj"), ("hidden_size", "256"), ("latent_size", 1.5), ("training_tasks", "capital"),
     ("dropout", "0.1"), ("architecture", 1), ("task_vector_spec", [1]), ("base_model_name_or_path", 5)],
)  # fmt: skip
def test_wrong_types_are_rejected(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        LoraGeneratorConfig(**{field: value})


@pytest.mark.parametrize("field", ["architecture", "token_granularity", "prior"])
def test_unknown_choices_are_rejected(field):
    with pytest.raises(StrictDataclassError, match=f"{field}: expected one of .*'matrices'"):
        LoraGeneratorConfig(**{field: "matrices"})


@pytest.mark.parametrize("value", [0, -4, 65537])
@pytest.mark.parametrize(
    "field",
    ["num_task_vectors", "task_vector_size", "hidden_size", "intermediate_size", "num_encoder_layers",
     "num_decoder_layers", "num_attention_heads", "latent_size"],
)  # fmt: skip
def test_sizes_out_of_range_are_rejected(field, value):
    with pytest.raises(StrictDataclassError, match=f"{field}: expected a number from 1 to (512|65536), found {value}"):
        LoraGeneratorConfig(**{field: value})


@pytest.mark.parametrize("dtype", ["", "rand", "os", "int8", "complex64", ["float32"], {"a": 1}])
def test_dtype_is_looked_up_nowhere(dtype):
    with pytest.raises(IncompatibleAdapterError, match="dtype: expected one of"):
        LoraGeneratorConfig.from_dict({"dtype": dtype})


@pytest.mark.parametrize("content", ["1", "[]", '"model_type"', "null", "true", '["model_type"]'])
def test_a_file_that_holds_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for auto_class in (LoraGeneratorConfig, LoraGeneratorModel):
        with pytest.raises(IncompatibleAdapterError, match="expected an object in config.json"):
            auto_class.from_pretrained(tmp_path)


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(StrictDataclassError, match="hidden_size 30 is no multiple of 4 heads"):
        LoraGeneratorConfig(hidden_size=30)


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
def test_dropout_is_a_probability(dropout):
    with pytest.raises(StrictDataclassError, match="dropout"):
        LoraGeneratorConfig(dropout=dropout)


def test_newer_format_asks_for_an_upgrade(tmp_path):
    LoraGeneratorConfig(layout=LAYOUT).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"format_version": 2}))
    with pytest.raises(IncompatibleAdapterError, match="format version 1, found version 2.* upgrade hf_icm_lora"):
        LoraGeneratorConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [({}, "Not a LoRA layout"), (LAYOUT | {"modules": [["q_proj", 8]]}, "Not a LoRA layout"),
     (LAYOUT | {"gauge": "any"}, "gauge"), (LAYOUT | {"modules": []}, "at least one"),
     (LAYOUT | {"modules": [["q_proj", 8, -6, 2]]}, "positive sizes")],
)  # fmt: skip
def test_malformed_layout_is_rejected(layout, message):
    with pytest.raises(IncompatibleAdapterError, match=message):
        LoraGeneratorConfig(layout=layout)


@pytest.mark.parametrize("spec", [{"pooling": "max"}, {"num_draws": 0}, {"pools": "last"}])
def test_malformed_task_vector_spec_is_rejected(spec):
    with pytest.raises(IcmLoraError, match="pool|num_draws"):
        LoraGeneratorConfig(task_vector_spec=spec)


def test_model_without_layout_is_refused():
    with pytest.raises(IncompatibleAdapterError, match="from_zoo"):
        LoraGeneratorModel(LoraGeneratorConfig())


def test_from_zoo_fills_everything(zoo):
    config = LoraGeneratorConfig.from_zoo(zoo.subset(["shift/2"]), hidden_size=64)
    assert config.lora_layout == zoo.layout
    assert config.lora_config == zoo.lora_config
    assert config.lora_config["target_modules"] == ["q_proj", "v_proj"]
    assert config.base_model_name_or_path == zoo.base_model_name_or_path
    assert config.base_model_fingerprint == zoo.base_model_fingerprint
    assert TaskVectorSpec(**config.task_vector_spec) == zoo.task_vectors.spec
    assert config.training_tasks == ["shift/2"]
    assert config.template == zoo.template
    assert config.num_task_vectors == 4  # two layers, two poolings
    assert (config.task_vector_size, config.hidden_size) == (32, 64)


def test_from_zoo_without_task_vectors_says_what_to_call(tmp_path, zoo):
    bare = type(zoo).create(
        tmp_path / "bare",
        layout=zoo.layout,
        lora_config=zoo.lora_config,
        base_model_name_or_path="base",
        base_model_fingerprint="0" * 64,
        template=zoo.template,
    )
    with pytest.raises(ZooError, match="add_task_vectors"):
        LoraGeneratorConfig.from_zoo(bare)


def test_no_path_of_this_machine_is_stored_but_that_of_a_local_base(tmp_path, world, zoo):
    LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo, hidden_size=32)).save_pretrained(tmp_path / "one")
    LoraGeneratorModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    stored = json.loads((tmp_path / "two" / "config.json").read_text())
    assert stored.pop("base_model_name_or_path") == str(world.folder / "base")
    text = json.dumps(stored)
    for place in (tmp_path.parent, zoo.path.parent, world.folder, Path.cwd(), Path.home()):
        assert str(place) not in text
