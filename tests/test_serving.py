"""What leaves the package is read by others: one plain form, honest checks, and llama.cpp's own file."""

import copy
import json
import re

import gguf
import numpy as np
import pytest
import torch
from conftest import LORA_TARGETS, make_gpt2
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from hf_icm_lora import (
    ArgumentError,
    IncompatibleAdapterError,
    attach_adapter,
    check_serving_compatibility,
    export_gguf,
    load_adapter,
    plain_adapter,
    save_adapter,
)
from hf_icm_lora.cli import main
from hf_icm_lora.layout import PREFIX
from hf_icm_lora.serving import SERVERS

IDS = torch.tensor([[5, 17, 3, 99, 42, 8]])
ODD = {"r": 6, "lora_alpha": 9, "use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def adapter(tmp_path, llama):
    """Save an adapter with plain PEFT: (fields) -> (folder, logits of the base model with it)."""

    def make(base_name="user/base", scale=0.2, **fields):
        config = LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": LORA_TARGETS["llama"]} | fields)
        config.task_type = "CAUSAL_LM"
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(llama), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(0, scale)
        model.peft_config["default"].base_model_name_or_path = base_name
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter", logits(model)

    return make


def test_plain_form_acts_as_the_adapter_did(adapter, llama):
    folder, expected = adapter(**ODD)
    config, state_dict, lost = plain_adapter(*load_adapter(folder))
    assert config["r"] == config["lora_alpha"] == 6
    assert lost == 0
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & config.keys()
    assert config["target_modules"] == sorted(LORA_TARGETS["llama"])
    assert {tensor.shape[0] for key, tensor in state_dict.items() if "lora_A" in key} == {6}
    torch.testing.assert_close(logits(attach_adapter(llama, config, state_dict)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("server", SERVERS)
def test_plain_form_of_anything_has_no_problem_anywhere(adapter, tmp_path, server):
    folder, _ = adapter(**ODD)
    config, state_dict, _ = plain_adapter(*load_adapter(folder))
    save_adapter(tmp_path / "plain", config, state_dict)
    problems, _ = check_serving_compatibility(tmp_path / "plain", server)
    assert not problems


def test_smaller_rank_is_the_best_of_its_rank_and_says_what_it_lost(adapter):
    folder, _ = adapter()
    config, state_dict, lost = plain_adapter(*load_adapter(folder), rank=2)
    own = load_file(folder / "adapter_model.safetensors")
    cut = total = 0.0
    for name in {key.rsplit(".lora_", 1)[0] for key in own}:
        target, found = (x[f"{name}.lora_B.weight"] @ x[f"{name}.lora_A.weight"] for x in (own, state_dict))
        s = torch.linalg.svdvals(target)
        cut, total = cut + s[2:].square().sum(), total + s.square().sum()
        torch.testing.assert_close((found - target).square().sum(), s[2:].square().sum(), rtol=1e-3, atol=1e-5)
    assert config["r"] == 2
    assert lost == pytest.approx((cut / total).item(), rel=1e-4)


def test_values_that_do_not_fit_a_dtype_are_refused(adapter):
    folder, _ = adapter(lora_alpha=60000, scale=20.0)
    _, plain, _ = plain_adapter(*load_adapter(folder), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    with pytest.raises(IncompatibleAdapterError, match=r"lora_B: values up to .* do not fit torch.float16"):
        plain_adapter(*load_adapter(folder), dtype=torch.float16)
    with pytest.raises(IncompatibleAdapterError, match="rank: expected a positive number"):
        plain_adapter(*load_adapter(folder), rank=0)


@pytest.mark.parametrize(
    ("server", "fields", "problem"),
    [
        ("vllm", {"rank_pattern": {"v_proj": 2}}, "rank_pattern: vllm takes one rank"),
        ("vllm", {"alpha_pattern": {"v_proj": 2}}, "alpha_pattern: vllm takes one rank"),
        ("lorax", {"alpha_pattern": {"v_proj": 2}}, "alpha_pattern: lorax takes one rank"),
        ("lorax", {"r": 160}, "Rank 160: LoRAX takes up to 128"),
        ("lorax", {"layers_to_transform": [1]}, r"self_attn.q_proj: LoRAX drops this kind .* layers \[0\]"),
        ("llama.cpp", {"use_rslora": True}, "llama.cpp scales by lora_alpha / rank"),
        ("llama.cpp", {"alpha_pattern": {"v_proj": 2}}, "llama.cpp scales by lora_alpha / rank"),
        ("llama.cpp", {"target_modules": ["q_proj", "lm_head"]}, "lm_head: llama.cpp has no place"),
        ("vllm", {"target_modules": r".*\.q_proj"}, "target_modules: expected a list"),
        ("sglang", {"target_modules": r".*\.q_proj"}, "target_modules: expected a list"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_problems_are_found(adapter, server, fields, problem):
    folder, _ = adapter(**fields)
    problems, _ = check_serving_compatibility(folder, server)
    assert len(problems) == 1 or fields.get("layers_to_transform")  # both kinds lack the layer
    assert any(re.search(problem, text) for text in problems)


@pytest.mark.parametrize(
    ("server", "fields", "note"),
    [
        ("vllm", {"r": 32}, "--max-lora-rank 32"),
        ("vllm", {"base_name": "/data/base"}, "base_model_name_or_path is '/data/base'"),
        ("sglang", {"rank_pattern": {"v_proj": 2}}, "older versions of SGLang"),
        ("llama.cpp", {}, "--format gguf"),
    ],
)
def test_notes_are_given(adapter, server, fields, note):
    folder, _ = adapter(**fields)
    problems, notes = check_serving_compatibility(folder, server)
    assert not problems
    assert any(note in text for text in notes)


@pytest.mark.parametrize("server", SERVERS)
def test_what_is_no_plain_lora_is_a_problem_of_every_server(adapter, server, tmp_path):
    folder, _ = adapter()
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"extra": torch.zeros(2)}, file)
    assert "found ['extra']" in check_serving_compatibility(folder, server)[0][0]
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    assert "LoraConfig.use_dora" in check_serving_compatibility(folder, server)[0][0]
    assert "adapter_config.json" in check_serving_compatibility(tmp_path / "missing", server)[0][0]


def test_added_tokens_are_a_problem_for_sglang_alone(adapter):
    folder, _ = adapter()
    (folder / "added_tokens.json").write_text("{}")
    found = {server: len(check_serving_compatibility(folder, server)[0]) for server in SERVERS}
    assert found == {"vllm": 0, "sglang": 1, "lorax": 0, "llama.cpp": 0}
    with pytest.raises(ArgumentError, match="expected one of"):
        check_serving_compatibility(folder, "tgi")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gguf_holds_the_matrices_where_llama_cpp_looks_for_them(adapter, tmp_path, llama, dtype):
    folder, _ = adapter(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], r=2)
    config, state_dict = load_adapter(folder)
    export_gguf(tmp_path / "adapter.gguf", config, state_dict, llama.config, dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 4.0 * 2 / 4  # rank 2 with the scaling of 4 / 2 folded in
    tensors = {tensor.name: torch.tensor(np.array(tensor.data)).float() for tensor in reader.tensors}
    assert len(tensors) == 2 * 6 * 2
    places = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
              "gate_proj": "ffn_gate", "down_proj": "ffn_down"}  # fmt: skip
    processor = LlamaTensorProcessor(llama.config.to_dict())  # what transformers undoes when it reads a GGUF model
    plain = plain_adapter(config, state_dict)[1]
    for key, expected in plain.items():
        name, factor = key.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
        kind = name.rpartition(".")[2]
        found = tensors[f"blk.{name.split('.')[2]}.{places[kind]}.weight.{factor.lower()}"]
        if factor == "lora_B" and kind in ("q_proj", "k_proj"):
            heads = llama.config.num_attention_heads if kind == "q_proj" else llama.config.num_key_value_heads
            assert not torch.allclose(found, expected, atol=1e-3)
            found = torch.tensor(processor._reverse_permute_weights(found.numpy(), heads, heads))
        torch.testing.assert_close(found, expected, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=1e-3)


def test_gguf_of_other_families_is_refused_and_leaves_nothing(tmp_path, adapter, llama):
    folder, _ = adapter()
    with pytest.raises(IncompatibleAdapterError, match="model_type 'llama', found 'gpt2'"):
        export_gguf(tmp_path / "out.gguf", *load_adapter(folder), make_gpt2().config)
    strange = {key.replace("q_proj", "w_proj"): tensor for key, tensor in load_adapter(folder)[1].items()}
    config = load_adapter(folder)[0] | {"target_modules": ["w_proj", "v_proj"]}
    with pytest.raises(IncompatibleAdapterError, match="w_proj: llama.cpp knows no such module"):
        export_gguf(tmp_path / "out.gguf", config, strange, llama.config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_command_line_checks_and_exports(adapter, tmp_path, llama, capsys):
    llama.save_pretrained(tmp_path / "base")
    folder, expected = adapter(base_name=str(tmp_path / "base"), **ODD)
    assert main(["check", str(folder), "--for", "vllm"]) == 1
    assert "vllm takes one rank" in capsys.readouterr().err
    plain, file = str(tmp_path / "plain"), str(tmp_path / "adapter.gguf")
    assert main(["export", str(folder), "--out", plain]) == 0
    assert main(["check", plain, "--for", "vllm"]) == 0
    assert "vllm takes" in capsys.readouterr().out
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(plain)), expected, atol=1e-4, rtol=1e-4)
    assert main(["export", str(folder), "--out", file, "--format", "gguf", "--dtype", "float16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"output": file, "rank": 6, "lost_energy": 0.0}
    assert gguf.GGUFReader(file).tensors[0].tensor_type == gguf.GGMLQuantizationType.F16
    assert main(["export", str(folder), "--out", plain]) == 1
    assert "exists already" in capsys.readouterr().err


def test_command_line_imports(adapter, tmp_path, llama, tokenizer, capsys):
    llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder, _ = adapter(**ODD)
    arguments = ["--zoo", str(tmp_path / "zoo"), "--base_model", str(tmp_path / "base")]
    assert main(["import", "--adapters", str(folder), str(tmp_path / "missing"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "converted\tadapter\trsLoRA scaling folded in" in out
    assert "refused\tmissing" in out
    assert main(["import", "--adapters", str(folder), *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["gauge"], told["rank"], told["adapters"][0]["status"]) == ("free", 6, "held")
