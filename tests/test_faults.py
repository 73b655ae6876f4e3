"""What can go wrong with files, tasks and numbers, one test per fault; docs/source/reliability.md lists them all.

Each fault must end in the error, or the result, that the page promises.
"""

import copy
import json
import math
import re
import resource
import shutil
import socket
import struct
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_llama, make_tasks, training_arguments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from hf_icm_lora import (
    AlreadyExistsError,
    BehaviouralDataset,
    CompletionCollator,
    CorruptAdapterError,
    IcmLoraError,
    IncompatibleAdapterError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraLayout,
    LoraZoo,
    PublishingError,
    Sample,
    Task,
    TaskError,
    TaskVectorError,
    TaskVectorExtractor,
    TaskVectors,
    TaskVectorSpec,
    ZooError,
    attach_adapter,
    load_adapter,
    save_adapter,
)
from hf_icm_lora.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_state_dict,
)
from hf_icm_lora.base_model import base_model_fingerprint
from hf_icm_lora.layout import PREFIX, LoraModule
from hf_icm_lora.lora_config import lora_config_to_dict
from hf_icm_lora.provenance import is_local

DATA = Path(__file__).parent / "data"
ADAPTER = next(DATA.glob("zoo-1/adapters/capital-*")) / "step-4"
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
SPEC = TaskVectorSpec(num_demonstrations=4, num_draws=3)
EXAMPLES = [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")]


@pytest.fixture
def folder(tmp_path):
    """An adapter of rank 2 for the tiny Llama."""
    return Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))


@pytest.fixture
def zoo(tmp_path):
    """A zoo of two tasks with two snapshots and three task vectors each."""
    return LoraZoo(shutil.copytree(DATA / "zoo-1", tmp_path / "zoo"))


@pytest.fixture
def generator_folder(tmp_path):
    return Path(shutil.copytree(DATA / "generator-1", tmp_path / "generator"))


@pytest.fixture
def generator():
    return LoraGeneratorModel.from_pretrained(DATA / "generator-1")


@pytest.fixture
def warned(monkeypatch):
    """The warnings of the package."""
    said = []
    for name in ("trainer", "completion", "task_vectors"):
        logger = logging.get_logger(f"hf_icm_lora.{name}")
        monkeypatch.setattr(logger, "warning", said.append)
        monkeypatch.setattr(logger, "warning_once", lambda message: message in said or said.append(message))
    return said


@pytest.fixture
def nothing_foreign(monkeypatch):
    """Fail if anything is fetched, unpickled or imported that a file names."""

    def refuse(*args, **kwargs):
        pytest.fail(f"It was opened: {args}.")

    class Watch:
        def find_spec(self, name, path=None, target=None):
            if "evil" in name or name.startswith("megatron"):
                pytest.fail(f"{name} was imported.")

    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch, "load", refuse)


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields))


def write_header(path: Path, header: str, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)


def trainer_of(zoo, tmp_path, train=None, held_out=None, model=None, **kwargs):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_encoder_layers=1, num_decoder_layers=1, latent_size=16)
    model = model or LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo, **sizes))
    args = training_arguments(tmp_path, **{"max_steps": 2, "per_device_train_batch_size": 4} | kwargs)
    return LoraGeneratorTrainer(model, args, train_dataset=train or zoo.as_dataset(), eval_dataset=held_out)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 17, 3, 99, 42, 8]])).logits


# Files


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"<html></html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_F1_truncated_or_other_file(folder, content):
    weights = folder / WEIGHTS_FILE
    whole = weights.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for spoiled in (content, whole[:8], whole[: header - 1], whole[:header], whole[:-1], whole + b"\0"):
        weights.write_bytes(spoiled)
        with pytest.raises(CorruptAdapterError, match=WEIGHTS_FILE) as caught:
            load_adapter(folder)
        assert caught.value.__cause__ is not None


def test_F2_pickle(folder, nothing_foreign):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(CorruptAdapterError, match=r"is missing \(found .*adapter_model.bin.*Only safetensors"):
        load_adapter(folder)


def test_F2_pickle_of_a_generator(generator_folder, nothing_foreign):
    (generator_folder / "model.safetensors").rename(generator_folder / "pytorch_model.bin")
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match="safetensors"):
            LoraGeneratorModel.from_pretrained(generator_folder, **options)


def test_F3_duplicate_tensor_key(folder):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    write_header(folder / WEIGHTS_FILE, f'{{"{Q0}.lora_A.weight":{entry},"{Q0}.lora_A.weight":{entry}}}', bytes(4))
    load_file(folder / WEIGHTS_FILE)  # the library says nothing
    with pytest.raises(CorruptAdapterError, match=r"q_proj\.lora_A\.weight' twice"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: weights.clear(), "holds no tensors"),
        (lambda weights: weights.pop(f"{Q0}.lora_B.weight"), "q_proj: lora_B.weight is missing"),
        (lambda weights: weights.update({"lm_head.weight": torch.ones(2)}), "found .*lm_head.weight"),
    ],
)
def test_F4_no_half_or_stray_tensors(folder, spoil, message):
    weights = load_file(folder / WEIGHTS_FILE)
    spoil(weights)
    save_file(weights, folder / WEIGHTS_FILE)
    with pytest.raises(CorruptAdapterError, match=message):
        LoraLayout.from_state_dict(*reversed(load_adapter(folder)), "frozen_a")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_F5_value_that_is_not_finite(zoo, value):
    folder = zoo.task_folder("capital") / "step-4"
    weights = load_file(folder / WEIGHTS_FILE)
    weights[f"{Q0}.lora_B.weight"][3, 1] = value
    save_file(weights, folder / WEIGHTS_FILE)
    with pytest.raises(CorruptAdapterError, match=r"capital.*q_proj\.lora_B\.weight holds values"):
        zoo.as_dataset()


def test_F6_constant_tensors(zoo, tmp_path):
    untrained = {key: t * (".lora_A." in key) for key, t in zoo.load_snapshot("capital").items()}
    for index in range(2):
        zoo.add(f"untrained {index}", {1: untrained})
    banks = {f"untrained {index}": {"demonstrations": torch.randn(3, 2, 32)} for index in range(2)}
    constant = zoo.subset(banks)
    constant.add_task_vectors(TaskVectors(zoo.task_vectors.spec, zoo.base_model_fingerprint, banks))
    normalizer = trainer_of(constant, tmp_path).model.zoo_normalizer
    weights = constant.lora_weights("untrained 0")
    assert not weights.any()
    assert torch.equal(normalizer.denormalize(normalizer.normalize(weights)), weights)


def test_F7_file_larger_than_allowed(folder):
    size = (folder / WEIGHTS_FILE).stat().st_size
    load_adapter(folder, max_bytes=size)
    with pytest.raises(CorruptAdapterError, match=f"expected up to {size - 1} bytes, found {size}; .*max_bytes"):
        load_adapter(folder, max_bytes=size - 1)


def test_F7_huge_declared_shapes(folder):
    huge, entry = 2**40, '{{"dtype":"F32","shape":[{0},1],"data_offsets":[0,{1}]}}'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_header(folder / WEIGHTS_FILE, f'{{"{Q0}.lora_A.weight":{entry.format(huge, 4 * huge)}}}')
    with pytest.raises(CorruptAdapterError, match="not a whole safetensors file"):
        load_adapter(folder)
    with open(folder / WEIGHTS_FILE, "r+b") as file:  # a file with holes, as large as it says
        file.truncate(file.seek(0, 2) + 2**36)
    with pytest.raises(CorruptAdapterError, match=f"expected up to {2**33} bytes"):
        load_adapter(folder)
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CorruptAdapterError, match=f"its header would have {2**60} bytes"):
        load_adapter(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_F8_mixed_dtypes(folder):
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    weights = {key: t.to(dtypes[i % 4]) for i, (key, t) in enumerate(load_file(folder / WEIGHTS_FILE).items())}
    save_file(weights, folder / WEIGHTS_FILE)
    config, state_dict = load_adapter(folder)
    layout = LoraLayout.from_state_dict(state_dict, config, "frozen_a")
    assert {vector.dtype for vector in layout.pack(state_dict, config)} == {torch.float32}
    assert {t.dtype for t in adapter_state_dict(attach_adapter(make_llama(), config, state_dict)).values()} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_F8_dtypes_of_no_lora(folder, dtype):
    save_file({key: t.to(dtype) for key, t in load_file(folder / WEIGHTS_FILE).items()}, folder / WEIGHTS_FILE)
    with pytest.raises(CorruptAdapterError, match="lora_A.weight': expected one of .*BF16"):
        load_adapter(folder)


def test_F9_shared_and_transposed_tensors(tmp_path, folder):
    config, state_dict = load_adapter(folder)
    storage = torch.randn(2, 32)
    given = {key: storage if ".lora_A." in key else storage[:, : len(t)].T for key, t in state_dict.items()}
    save_adapter(tmp_path / "saved", config, given)
    _, again = load_adapter(tmp_path / "saved")
    assert all(torch.equal(again[key], tensor) for key, tensor in given.items())


BOMB, DEEP = "(a+)+$", "[" * 100_000
CONFIGS = [
    *({"r": r} for r in (0, -1, 10**9, 4.5, "8", None, True)),
    *({"peft_type": kind} for kind in ("IA3", None, 3, ["LORA"])),
    {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"trainable_token_indices": [1]},
    *({field: {"a": 1}} for field in ("arrow_config", "kasa_config", "corda_config", "lora_ga_config")),
    *({field: {"a": 1}} for field in ("velora_config", "monteclora_config", "megatron_config", "loftq_config")),
    {"alora_invocation_tokens": [1]}, {"use_bdlora": {}, "target_parameters": ["w"]}, {"of_some_later_version": 1},
    {"ensure_weight_tying": True}, {"qalora_group_size": 8}, {"layer_replication": [[0, 2]]},
    *({field: {BOMB: 2}} for field in ("rank_pattern", "alpha_pattern")),
    *({"alpha_pattern": {key: 2}} for key in ("(a|a)(a|a)(a|a)", "a?a?a?aaa", ".*.*.*x", "(?=a)", r"(a)\1", "a{9}")),
    {"alpha_pattern": {"a" * 257: 2}}, {"alpha_pattern": {f"a{i}": 2 for i in range(513)}}, {"alpha_pattern": [BOMB]},
    {"alpha_pattern": {f"{i}.*": 2 for i in range(33)}}, {"rank_pattern": {"q_proj": 1.5}},
    {"alpha_pattern": {"a": "b"}}, {"alpha_pattern": {"(": 2}},
    {"lora_alpha": math.nan}, {"lora_alpha": "x"}, {"lora_dropout": 2}, {"lora_dropout": "0"}, {"use_rslora": "no"},
    {"target_modules": 3}, {"target_modules": [["q"]]}, {"target_modules": {"q_proj": 1}}, {"exclude_modules": [1]},
    {"task_type": ["CAUSAL_LM"]}, {"task_type": "DANCE"}, {"base_model_name_or_path": 5}, {"revision": {}},
    {"init_lora_weights": "pissa"}, {"init_lora_weights": ["eva"]}, {"fan_in_fan_out": 1},
]  # fmt: skip


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: str(fields)[:40])
def test_F10_configuration_that_is_no_plain_lora(folder, fields):
    change(folder / CONFIG_FILE, **fields)
    start = time.monotonic()
    with pytest.raises(IncompatibleAdapterError, match=f"{CONFIG_FILE}: .*{list(fields)[-1]}"):
        load_adapter(folder)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", [None, "", "{r: 4}", DEEP, "\x00", '{"r": ' + "1" * 5000 + "}"])
def test_F10_configuration_that_is_no_json(folder, text):
    (folder / CONFIG_FILE).unlink() if text is None else (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(CorruptAdapterError, match=CONFIG_FILE):
        load_adapter(folder)
    (folder / CONFIG_FILE).write_text("[]")
    with pytest.raises(IncompatibleAdapterError, match="JSON object, found list"):
        load_adapter(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"((.*)*)*\.(q_proj|v_proj)x"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"exclude_modules": "((.*)*)*x"},
        {"layers_to_transform": [0, 1], "layers_pattern": ["((.*)*)*x"]},
        {"alpha_pattern": {r"layers\.(0|1)\..*q_proj": 3}},
    ],
    ids=str,
)
def test_F10_patterns_do_not_hang_and_weights_say_where_they_belong(folder, fields):
    """PEFT itself would run these on every module of the base model."""
    change(folder / CONFIG_FILE, **fields)
    config, state_dict = load_adapter(folder)
    start = time.monotonic()
    model = attach_adapter(make_llama(), config, state_dict)
    attach_adapter(model, config, state_dict)
    assert time.monotonic() - start < 20
    assert adapter_state_dict(model).keys() == state_dict.keys()


def test_F10_simple_patterns_take_bounded_time():
    name = ".".join("a" * 100)  # as long as a name may be
    patterns = {f"{'[a.]*' * 2}{'x' * i}": 2 for i in range(1, 17)}
    layout = LoraLayout((LoraModule(name, 2, 2, 1),), "frozen_a")
    state_dict = {f"{PREFIX}{name}.lora_{factor}.weight": torch.ones(*shape) for factor, shape in
                  (("A", (1, 2)), ("B", (2, 1)))}  # fmt: skip
    start = time.monotonic()
    layout.pack(state_dict, {"r": 1, "lora_alpha": 1, "alpha_pattern": patterns})
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "name", ["q" * 201, "..", "a..b", "../../etc", "/abs", "a b", "a.9999999.b", "², é", "", "a\n"]
)
def test_F10_names_that_are_no_module(name):
    with pytest.raises(IncompatibleAdapterError, match="path of a module|its path|LoRA layout"):
        LoraLayout.from_dict({"gauge": "frozen_a", "modules": [[name, 2, 2, 1]]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}}, None),
        ({"base_model_name_or_path": "evil/base", "revision": "../evil"}, None),
        ({"peft_version": ["evil"]}, None),
        ({"megatron_core": "evil"}, "megatron_core='evil'"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config"),
    ],
)
def test_F11_nothing_that_a_configuration_names_is_imported_or_fetched(folder, nothing_foreign, fields, message):
    change(folder / CONFIG_FILE, **fields)
    if message:
        with pytest.raises(IncompatibleAdapterError, match=message):
            load_adapter(folder)
        return
    config, state_dict = load_adapter(folder)
    assert "evil" not in str({k: v for k, v in config.items() if k not in ("base_model_name_or_path", "revision")})
    model = attach_adapter(make_llama(), config, state_dict)
    assert logits(model).isfinite().all()


MODULE = ["model.layers.0.q_proj", 32, 32, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"latent_size": size}, "latent_size|parameters") for size in (-1, "x", 10**12, 1.5, None)),
        ({"num_encoder_layers": 65536}, "num_encoder_layers"),
        ({"task_vector_size": 65536, "num_task_vectors": 65536, "condition_size": 65536}, "parameters, .*directions"),
        ({"hidden_size": 65536, "intermediate_size": 65536}, r"parameters, .*_proj\.weight"),
        ({"basis_size": 65536, "condition_size": 65536}, "parameters, .*bases"),
        ({"layout": {"gauge": "frozen_a", "modules": [[MODULE[0], 2**24, 2**24, 2**24]]}}, "parameters, .*bases"),
        ({"layout": {"gauge": "frozen_a", "modules": [[MODULE[0], 32, 10**12, 2]]}}, "positive sizes"),
        ({"layout": {"gauge": "frozen_a", "modules": [["../../q_proj", 32, 32, 2]]}}, "path of a module"),
        ({"layout": {"gauge": "frozen_a", "modules": [["layers.999999.q", 32, 32, 2]]}}, "up to five digits"),
        ({"layout": {"gauge": "frozen_a", "modules": [MODULE, MODULE]}}, "stands twice"),
        ({"layout": {"gauge": "frozen_a", "modules": [MODULE[:3]]}}, "Not a LoRA layout"),
        ({"lora_config": {"r": 2, "lora_alpha": 2, "use_dora": True}}, "use_dora"),
        ({"lora_config": {"r": 2, "lora_alpha": 2, "alpha_pattern": {BOMB: 2}}}, "alpha_pattern"),
        ({"task_vector_spec": {"layers": 3}}, "task_vector_spec"),
        ({"task_vector_spec": {"max_length": "long"}}, "task_vector_spec"),
        ({"dtype": "load"}, "dtype"),
        ({"model_type": "llama"}, "no generator of adapters"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_F12_hostile_configuration_of_a_generator(generator_folder, fields, message):
    change(generator_folder / "config.json", **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Exception, match=message) as caught:  # a field's own check comes as huggingface_hub's error
        LoraGeneratorModel.from_pretrained(generator_folder)
    assert isinstance(caught.value, (IcmLoraError, ValueError)) or "Strict" in type(caught.value).__name__
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_F12_no_code_kernel_or_quantizer_is_chosen_by_a_file(generator_folder, generator, nothing_foreign):
    evil = {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}, "attn_implementation": "evil/kernels"}
    evil |= {"quantization_config": {"quant_method": "evil"}, "_attn_implementation": "evil/kernels"}
    (generator_folder / "evil.py").write_text("raise SystemExit('run')")
    change(generator_folder / "config.json", **evil)
    for load in (LoraGeneratorModel.from_pretrained, AutoModel.from_pretrained):
        model = load(generator_folder)
        assert type(model) is LoraGeneratorModel
        assert not evil.keys() & model.config.to_dict().keys()
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in generator.state_dict().items())
    LoraGeneratorModel.from_pretrained(generator_folder, trust_remote_code=True)


def test_F12_file_that_lacks_what_its_configuration_promises(generator_folder):
    change(generator_folder / "config.json", hidden_size=4096, intermediate_size=4096)
    save_file({"network.extra": torch.ones(1)}, generator_folder / "model.safetensors", {"format": "pt"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptAdapterError, match="lacks .* tensors of .* numbers, such as"):
        LoraGeneratorModel.from_pretrained(generator_folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_F12_truncated_generator(generator_folder):
    file = generator_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptAdapterError, match="generator: not a whole safetensors file"):
        LoraGeneratorModel.from_pretrained(generator_folder)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("zoo.json", {"lora_config": []}, "lora_config"),
        ("zoo.json", {"format_version": ""}, "expected format version 1, found ''"),
        ("zoo.json", {"lora_config": {"r": 2, "lora_alpha": 2, "alpha_pattern": {BOMB: 2}}}, "alpha_pattern"),
        ("zoo.json", {"template": 3}, "template"),
        ("zoo.json", {"layout": {"gauge": "frozen_a", "modules": [["..", 1, 1, 1]]}}, "path of a module"),
        ("task.json", {"name": 3}, "expected a name"),
        ("task.json", {"snapshots": ["../../x"]}, "snapshots as whole numbers"),
        ("task.json", {"best_step": "../../x"}, "best_step"),
    ],
)
def test_F12_hostile_zoo(zoo, file, fields, message):
    change(zoo.path / file if file == "zoo.json" else zoo.task_folder("capital") / file, **fields)
    with pytest.raises(IcmLoraError, match=message):
        LoraZoo(zoo.path)


def _changed(data, original: bytes) -> bytes:
    start = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(start, min(len(original), start + 40)))
    return original[:start] + data.draw(st.binary(max_size=40)) + original[end:]


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mutated_adapter_is_refused_or_read_as_it_stands(tmp_path, data):
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ADAPTER, folder)
    file = folder / data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    file.write_bytes(_changed(data, file.read_bytes()))
    try:
        config, state_dict = load_adapter(folder)
        LoraLayout.from_state_dict(state_dict, config, "shared_init").pack(state_dict, config)
    except IcmLoraError:
        return
    assert all(torch.equal(state_dict[key], tensor) for key, tensor in load_file(folder / WEIGHTS_FILE).items())
    stored = json.loads((folder / CONFIG_FILE).read_text())
    assert lora_config_to_dict(config).items() <= (stored | lora_config_to_dict(stored)).items()


# Compatibility


def test_C1_other_weights_under_the_same_name(generator):
    one, other = make_llama(0), make_llama(1)
    one.config._name_or_path = other.config._name_or_path = "tiny/llama"
    generator.config.base_model_fingerprint = base_model_fingerprint(one)
    with pytest.raises(IncompatibleAdapterError, match=rf"{base_model_fingerprint(other)[:12]}"):
        generator.check_base_model(other)
    one.config._name_or_path = "another/place"
    generator.check_base_model(one)


def test_C2_other_rank_in_a_zoo(zoo):
    weights = {k: t[:1] if ".lora_A." in k else t[:, :1] for k, t in zoo.load_snapshot("capital").items()}
    with pytest.raises(IncompatibleAdapterError, match="q_proj: expected rank 2.*found rank 1.*and 1 more"):
        zoo.add("new", {1: weights})
    for fields in ({"lora_alpha": 7}, {"use_rslora": True}, {"target_modules": ["q_proj"]}):
        about = {name: zoo.about[name] for name in ("base_model_name_or_path", "base_model_fingerprint", "template")}
        with pytest.raises(ZooError, match="another lora_config"):
            LoraZoo.create(zoo.path, layout=zoo.layout, lora_config=zoo.lora_config | fields, **about)


def test_C3_order_of_keys(zoo):
    weights = zoo.load_snapshot("capital")
    shuffled = {key: weights[key] for key in reversed(weights)}
    for one, other in zip(*(zoo.layout.pack(w, zoo.lora_config) for w in (weights, shuffled)), strict=True):
        assert torch.equal(one, other)


def test_C4_task_vectors_of_another_size_or_layer(zoo, generator):
    with pytest.raises(TaskVectorError, match=r"\(batch, 2, 32\), found \(1, 2, 33\)"):
        generator.decode_task_vector(torch.zeros(2, 33))
    banks = {"capital": {"demonstrations": torch.zeros(3, 2, 32)}}
    other = TaskVectors(TaskVectorSpec(num_draws=3, layers=(0,)), zoo.base_model_fingerprint, banks)
    with pytest.raises(TaskVectorError, match=r"made with .*layers=\(-1,\).*layers=\(0,\)"):
        zoo.subset(["capital"]).add_task_vectors(other)


def test_C5_task_vectors_of_another_base(zoo):
    other = TaskVectors(zoo.task_vectors.spec, "0" * 64, zoo.task_vectors.banks)
    with pytest.raises(TaskVectorError, match="base model 000000000000, the zoo's adapters are for ffffffffffff"):
        zoo.add_task_vectors(other)


def test_C6_mismatched_shapes(generator_folder):
    change(generator_folder / "config.json", latent_size=7)
    with pytest.raises(
        RuntimeError, match="(?s)latent_proj.*size mismatch|size mismatch.*latent_proj|ignore_mismatched"
    ):
        LoraGeneratorModel.from_pretrained(generator_folder)


def test_C7_missing_and_unexpected_keys(folder):
    config, state_dict = load_adapter(folder)
    fewer = {key: tensor for key, tensor in state_dict.items() if not key.startswith(Q0)}
    more = state_dict | {f"{Q0.replace('q_proj', 'o_proj')}.lora_{f}.weight": t for f, t in
                         (("A", torch.ones(2, 32)), ("B", torch.ones(32, 2)))}  # fmt: skip
    for weights in (fewer, more, state_dict | {"stray": torch.ones(1, 1)}):
        with pytest.raises(IncompatibleAdapterError, match="without weights|without a place|stray"):
            attach_adapter(make_llama(), config, weights)


def test_C8_golden_files_give_the_same_numbers():
    """Folders that the first release wrote. A new format gets new folders beside them."""
    zoo, generator = LoraZoo(DATA / "zoo-1"), LoraGeneratorModel.from_pretrained(DATA / "generator-1")
    assert list(zoo) == ["Größe/日本", "capital"]
    for index, name in enumerate(["capital", "Größe/日本"]):
        expected = load_file(DATA / f"expected-{index}.safetensors")
        assert torch.equal(zoo.lora_weights(name), expected["best"])
        assert torch.equal(zoo.lora_weights(name, 8), expected["last"])
        assert torch.equal(zoo.task_vectors.banks[name]["demonstrations"], expected["task_vectors"])
        found = generator.decode_task_vector(expected["task_vectors"])
        torch.testing.assert_close(found, expected["generated"], rtol=1e-4, atol=1e-5)


def test_C8_newer_formats_ask_for_an_upgrade(zoo, generator_folder):
    change(zoo.path / "zoo.json", format_version=2)
    with pytest.raises(ZooError, match="upgrade hf_icm_lora"):
        LoraZoo(zoo.path)
    change(generator_folder / "config.json", format_version=2)
    with pytest.raises(IncompatibleAdapterError, match="upgrade hf_icm_lora"):
        LoraGeneratorModel.from_pretrained(generator_folder)


# Tasks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task("capital"), "'capital' has no samples"),
        (lambda: Task("capital", train=[]).train, "'capital' has no samples"),
        (lambda: Task("capital", train=[("France", "")]), "'capital', train.* an empty one"),
        (lambda: Task("capital", train=EXAMPLES).require("demo", 1, "a task vector"), "'capital' has 0 'demo'"),
    ],
)
def test_T1_no_samples(make, message):
    with pytest.raises(TaskError, match=message):
        make()


@pytest.mark.parametrize(("one", "other", "apart"), [("é", "e\u0301", False), ("a", "A", True), ("a", "a", False)])
def test_T2_twins_among_names(zoo, one, other, apart):
    assert unicodedata.normalize("NFC", other) == other or not apart
    weights = zoo.load_snapshot("capital")
    zoo.add(one, {1: weights})
    if apart:
        zoo.add(other, {1: weights})
        assert zoo.task_folder(one).name.lower() != zoo.task_folder(other).name.lower()
    else:
        with pytest.raises(AlreadyExistsError, match="already holds"):
            zoo.add(other, {1: weights})


NAMES = [
    "../x",
    "/abs",
    "C:\\x",
    "\\\\unc\\x",
    "nul\0",
    "new\nline",
    "CON",
    "x" * 300,
    "😀",
    "\u202egnp",
    "-rf",
    "..",
    ".",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_T3_names_are_never_paths(zoo, name):
    before = set(zoo.path.parent.rglob("*"))
    zoo.add(name, {1: zoo.load_snapshot("capital")})
    added = set(zoo.path.parent.rglob("*")) - before
    assert added
    assert all(path.resolve().is_relative_to(zoo.path.resolve() / "adapters") for path in added)
    assert all(part.isascii() and len(part) < 100 and part[0].isalnum() for p in added for part in [p.name])
    assert name in LoraZoo(zoo.path)


def test_T4_same_task_in_training_and_held_out(zoo, tmp_path, warned):
    seen, mixed = zoo.subset(["capital"]).as_dataset(), zoo.as_dataset()
    assert (seen.task_names, sorted(mixed.task_names)) == (["capital"], ["Größe/日本", "capital"])
    with pytest.raises(
        TaskError, match=r"1 of 2 tasks of eval_dataset are in train_dataset too, such as \['capital'\]"
    ):
        trainer_of(zoo, tmp_path, seen, mixed)
    with pytest.raises(TaskError, match="1 of 2 tasks"):
        trainer_of(zoo, tmp_path, seen, {"a": None, "b": mixed})
    trainer_of(zoo, tmp_path, seen, zoo.subset(["Größe/日本"]).as_dataset())
    assert warned == []
    trainer_of(zoo, tmp_path, mixed, seen)  # on purpose: how well are seen tasks reconstructed?
    assert warned == ["All tasks of eval_dataset are in train_dataset: its losses are of seen tasks."]


def test_T4_behavioural_datasets_know_their_tasks(zoo):
    tasks = [Task(name, train=EXAMPLES) for name in zoo]
    assert BehaviouralDataset(tasks, zoo.task_vectors, num_samples=1).task_names == list(zoo)


def short_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()


def test_T5_prompts_longer_than_the_context(tokenizer, warned):
    """A model of learned positions fails on the 17th token."""
    extractor = TaskVectorExtractor(TaskVectorSpec(pooling="last", num_draws=2))
    found = extractor.vector(short_gpt2(), tokenizer, EXAMPLES * 3)
    assert warned == ["Prompts of more than 16 tokens lose their beginning."]
    prompt = extractor.prompts(tokenizer, [Sample(*pair) for pair in EXAMPLES * 3], None, "demonstrations")[0]
    ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"][:, -16:]
    with torch.no_grad():
        expected = short_gpt2()(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(found[0, 0], expected)


def test_T5_samples_longer_than_the_context(tokenizer, warned):
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 16
    batch = CompletionCollator(short)([Sample("x" * 40, "yes"), Sample("z" * 50, "no")])
    assert batch["input_ids"].shape == (2, 16)
    assert tokenizer.decode(batch["input_ids"][0]).endswith("x: yes\n")
    assert warned == [
        "Samples of more than 16 tokens are cut: of a prompt its beginning, of a longer completion its end."
    ]
    assert short_gpt2()(input_ids=batch["input_ids"]).logits.isfinite().all()


def test_T6_padding_and_batch_size(tokenizer):
    expected = TaskVectorExtractor(SPEC, batch_size=1).extract(make_gpt2(), tokenizer, make_tasks(2))
    for side in ("left", "right"):
        other = copy.deepcopy(tokenizer)
        other.padding_side = side
        found = TaskVectorExtractor(SPEC, batch_size=8).extract(make_gpt2(), other, make_tasks(2))
        for name, bank in expected.banks.items():
            torch.testing.assert_close(found.banks[name]["both"], bank["both"], rtol=1e-4, atol=1e-4)


def test_T7_tokenizer_without_a_pad_token(tokenizer):
    own = copy.deepcopy(tokenizer)
    before = (own.pad_token, own.padding_side, len(own))
    TaskVectorExtractor(SPEC).vector(make_llama(), own, EXAMPLES, "Say the next letter.")
    CompletionCollator(own)([Sample("a", "b"), Sample("ab", "bcd")])
    assert (own.pad_token, own.padding_side, len(own)) == before == (None, "right", len(tokenizer))


def test_T8_model_in_train_mode(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=512, resid_pdrop=0.5)
    model = GPT2LMHeadModel(config).train()
    one, other = (TaskVectorExtractor(SPEC).vector(model, tokenizer, EXAMPLES) for _ in range(2))
    assert torch.equal(one, other)
    assert all(module.training for module in model.modules())


# Training and generation


def test_G1_one_task_and_batches_of_one(zoo, tmp_path):
    trainer = trainer_of(zoo.subset(["capital"]), tmp_path, per_device_train_batch_size=1)
    assert math.isfinite(trainer.train().training_loss)
    vector = zoo.task_vectors.banks["capital"]["demonstrations"]
    torch.testing.assert_close(trainer.model.decode_task_vector(vector), zoo.lora_weights("capital"), atol=0.1, rtol=0)


def test_G2_loss_that_is_not_finite_names_step_and_tensor(zoo, tmp_path):
    trainer = trainer_of(zoo, tmp_path, logging_steps=500)
    with torch.no_grad():
        trainer.model.network.latent_proj.bias[0] = math.nan
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(
        IcmLoraError, match=r"became nan by step 1; not finite: network\.latent_proj\.bias, gradient of"
    ):
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) or name == "network.latent_proj.bias"


def test_G3_collapse_of_the_latent_is_logged(zoo, tmp_path):
    units = {}
    for kl_weight in (0.0, 1e3):
        trainer = trainer_of(zoo, tmp_path, kl_weight=kl_weight, free_bits=0.0, kl_warmup_ratio=0.0, max_steps=150,
                             learning_rate=1e-2, lr_scheduler_type="linear", logging_steps=150)  # fmt: skip
        trainer.train()
        units[kl_weight] = trainer.state.log_history[0]["active_units"]
    assert units[1e3] < units[0.0]


def test_G4_gradient_accumulation(zoo, tmp_path):
    losses = []
    for size, accumulation in ((6, 1), (1, 6)):
        trainer = _without_latent(zoo, tmp_path, size, accumulation)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-4)


def _without_latent(zoo, tmp_path, size, accumulation):
    torch.manual_seed(0)
    model = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo, hidden_size=16, intermediate_size=16, prior="none"))
    return trainer_of(
        zoo, tmp_path, model=model, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        max_steps=4, optim="sgd",
    )  # fmt: skip


def test_G5_bfloat16_on_a_cpu(zoo):
    generator = LoraGeneratorModel.from_pretrained(DATA / "generator-1", dtype=torch.bfloat16)
    vector = zoo.task_vectors.banks["capital"]["demonstrations"]
    state_dict = generator.generate_state_dict(vector)
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float32}
    model = attach_adapter(make_llama(dtype=torch.bfloat16), generator.adapter_config(), state_dict)
    assert logits(model).isfinite().all()


def test_G6_forms_of_a_task_vector(generator, zoo):
    vector = zoo.task_vectors.banks["capital"]["demonstrations"][0]  # (num_task_vectors, task_vector_size)
    expected = generator.decode_task_vector(vector)
    assert torch.equal(generator.decode_task_vector(vector[None]), expected)
    torch.testing.assert_close(generator.decode_task_vector(vector.double()), expected)
    torch.testing.assert_close(generator.decode_task_vector(vector.bfloat16()), expected, rtol=0.1, atol=0.05)
    for bad, message in ((vector.flatten(), "shape"), (vector[:1], "shape"), (vector * math.nan, "not finite")):
        with pytest.raises(TaskVectorError, match=message):
            generator.decode_task_vector(bad)


def test_G7_padding_never_counts(tokenizer, llama):
    collate = CompletionCollator(tokenizer)
    batch = collate([Sample("a", "b"), Sample("abcdefgh", "bcdefghi")])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    changed = batch | {"input_ids": batch["input_ids"].masked_fill(padding, 77)}
    with torch.no_grad():
        one, other = (llama(**inputs).loss for inputs in (batch, changed))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# Hub and command line; what goes over the network is in test_push.py


def test_H7_local_base_is_seen_before_a_push(zoo, tmp_path):
    zoo.about["base_model_name_or_path"] = zoo.base_model_name_or_path = str(tmp_path / "base")
    assert is_local(zoo.base_model_name_or_path)
    with pytest.raises(PublishingError, match="no id on the Hub"):
        zoo.push_to_hub("user/zoo")


def test_H8_command_line_says_it_in_one_line(tmp_path, capsys):
    from hf_icm_lora.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["collect", "--no_such_option", "1"])
    assert caught.value.code == 2
    capsys.readouterr()
    assert main(["train", "--zoo", str(tmp_path / "nowhere")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("hf-icm-lora train: ")
    assert not [line for line in lines if line.startswith("Traceback")]


def test_every_fault_has_a_row_and_every_row_its_test():
    page = (Path(__file__).parent.parent / "docs/source/reliability.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([FCTGH]\d+) \| (.+?) \| .+ \|$", page, re.MULTILINE))
    counts = {"F": 12, "C": 8, "T": 8, "G": 7, "H": 9}
    assert list(rows) == [f"{letter}{number}" for letter, count in counts.items() for number in range(1, count + 1)]
    push = (Path(__file__).parent / "test_push.py").read_text(encoding="utf-8")
    for tests in rows.values():
        for name in re.findall(r"`(?:tests/test_push.py::)?((?:test|check)_\w+)(?:\.\.\.)?`", tests):
            assert any(own.startswith(name) for own in globals()) or f"def {name}(" in push, name
