"""A zoo of adapters from elsewhere: what they do to the base model survives, whatever form they came in."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import LORA_TARGETS, make_llama, make_tasks
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_icm_lora import (
    ArgumentError,
    IncompatibleAdapterError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraGeneratorTrainingArguments,
    LoraZoo,
    TaskVectorExtractor,
    TaskVectorSpec,
    ZooError,
    attach_adapter,
    import_zoo,
)

IDS = torch.tensor([[5, 17, 3, 99, 42, 8]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def save_foreign(folder: Path, base, seed=0, dtype=torch.float32, frozen_a=None, base_name=None, **fields):
    """Save an adapter with plain PEFT; return the folder and the logits that the base model has with it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGETS["llama"]} | fields)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name and frozen_a is not None:
                parameter.copy_(frozen_a[name])
            elif ".lora_" in name:
                parameter.normal_(0, 0.2)
                parameter.copy_(parameter.to(dtype))
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder, logits(model)


def imported_logits(zoo, name, base):
    state_dict = zoo.layout.unpack(zoo.lora_weights(name), zoo.shared_weights)
    model = attach_adapter(copy.deepcopy(base), zoo.lora_config, state_dict)
    return logits(model)


DIFFERENCES = {
    "plain": {},
    "rank_2": {"r": 2},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    "rank_pattern": {"rank_pattern": {"v_proj": 3}},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "one_kind": {"target_modules": ["v_proj"]},
    "one_layer": {"layers_to_transform": [1]},
    "other_kind": {"target_modules": ["o_proj"]},
}


@pytest.fixture
def foreign(tmp_path, llama):
    """Thirty adapters of ten kinds, each from a seed of its own: (name -> folder, name -> logits)."""
    folders, expected = {}, {}
    for index in range(30):
        kind = list(DIFFERENCES)[index % len(DIFFERENCES)]
        name = f"{kind}_{index}"
        folders[name], expected[name] = save_foreign(tmp_path / name, llama, seed=index, **DIFFERENCES[kind])
    return folders, expected


def test_thirty_adapters_with_ten_kinds_of_difference(tmp_path, llama, foreign):
    folders, expected = foreign
    before = logits(llama)
    zoo, table = import_zoo(tmp_path / "zoo", folders, llama)
    assert len(zoo) == len(table) == 30
    assert zoo.layout.gauge == "free"
    assert {module.rank for module in zoo.layout.modules} == {4}
    assert len(zoo.layout.modules) == 6  # q, v and o of two layers
    assert {row["status"] for row in table} == {"converted"}
    assert {row["lost_energy"] for row in table} == {0.0}
    changes = {row["task"].rpartition("_")[0]: row["changes"] for row in table}
    assert changes["rslora"] == ["rsLoRA scaling folded in", "2 of 6 modules filled with zeros"]
    assert "bfloat16 -> float32" in changes["bfloat16"]
    assert "rank 2 -> 4 (exact)" in changes["rank_2"]
    assert "rank 3, 4 -> 4 (exact)" in changes["rank_pattern"]
    assert "5 of 6 modules filled with zeros" not in changes["one_layer"]
    assert "4 of 6 modules filled with zeros" in changes["one_layer"]
    for name in folders:
        assert not torch.allclose(expected[name], before, atol=1e-2)
        torch.testing.assert_close(imported_logits(zoo, name, llama), expected[name], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(logits(llama), before, atol=0, rtol=0)


def test_imported_zoo_trains_and_generates(tmp_path, llama, tokenizer, foreign):
    tasks = make_tasks(30)
    names = [task.name for task in tasks]
    folders = dict(zip(names, foreign[0].values(), strict=True))
    zoo, _ = import_zoo(tmp_path / "zoo", folders, llama, base_model_name_or_path="user/base")
    spec = TaskVectorSpec(num_draws=1)
    zoo.add_task_vectors(TaskVectorExtractor(spec).extract(llama, tokenizer, tasks))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_encoder_layers": 1, "num_decoder_layers": 1}
    generator = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo, latent_size=4, num_attention_heads=2, **sizes))
    arguments = LoraGeneratorTrainingArguments(
        tmp_path / "run", max_steps=300, learning_rate=5e-3, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = LoraGeneratorTrainer(generator, arguments, train_dataset=zoo.as_dataset())
    trainer.train()
    assert trainer.evaluate(zoo.as_dataset())["eval_generation_loss"] < 0.3
    model = generator.generate_adapter(
        llama, processing_class=tokenizer, examples=tasks[0].demo[:4], adapter_name="generated"
    )
    model.save_pretrained(tmp_path / "out", save_embedding_layers=False)
    saved = json.loads((tmp_path / "out" / "generated" / "adapter_config.json").read_text())
    assert saved["r"] == saved["lora_alpha"] == 4
    assert saved["base_model_name_or_path"] == "user/base"
    assert saved["task_type"] == "CAUSAL_LM"


def test_adapters_of_one_frozen_a_keep_it(tmp_path, llama):
    a = {}
    model = get_peft_model(copy.deepcopy(llama), LoraConfig(r=4, target_modules=LORA_TARGETS["llama"]))
    a = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_A." in name}
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    mixed = {name: mix @ matrix for name, matrix in a.items()}
    made = {
        "one": save_foreign(tmp_path / "one", llama, 1, frozen_a=a),
        "two": save_foreign(tmp_path / "two", llama, 2, frozen_a=a, use_rslora=True),
        "half": save_foreign(tmp_path / "half", llama, 3, frozen_a=a, dtype=torch.float16),
        "mixed": save_foreign(tmp_path / "mixed", llama, 4, frozen_a=mixed),  # the same rows in other coordinates
        "part": save_foreign(tmp_path / "part", llama, 5, frozen_a=a, layers_to_transform=[0]),
    }
    zoo, _ = import_zoo(tmp_path / "zoo", {name: folder for name, (folder, _) in made.items()}, llama)
    assert zoo.layout.gauge == "frozen_a"
    for name, (_, expected) in made.items():
        torch.testing.assert_close(imported_logits(zoo, name, llama), expected, atol=5e-3, rtol=1e-2)

    # One of another A is no reason to give that up later.
    other, _ = save_foreign(tmp_path / "other", llama, 6)
    _, (row,) = import_zoo(tmp_path / "zoo", {"other": other}, llama)
    assert row["status"] == "refused"
    assert "does not span" in row["reason"]
    # But among those that a zoo is made of, it is.
    sources = {"one": made["one"][0], "two": made["two"][0], "other": other}
    assert import_zoo(tmp_path / "zoo-2", sources, llama)[0].layout.gauge == "free"


def test_smaller_rank_keeps_the_largest_singular_values(tmp_path, llama):
    folder, _ = save_foreign(tmp_path / "big", llama, r=8, lora_alpha=8)
    zoo, (row,) = import_zoo(tmp_path / "zoo", [folder], llama, rank=3)
    assert row["task"] == row["source"] == "big"
    assert {module.rank for module in zoo.layout.modules} == {3}
    own = load_file(folder / "adapter_model.safetensors")
    found = zoo.layout.unpack(zoo.lora_weights("big"), zoo.shared_weights)
    lost = total = 0.0
    for name in {key.rsplit(".lora_", 1)[0] for key in own}:
        target, product = (x[f"{name}.lora_B.weight"] @ x[f"{name}.lora_A.weight"] for x in (own, found))
        u, s, vh = torch.linalg.svd(target)
        torch.testing.assert_close(product, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-4, rtol=1e-3)
        lost, total = lost + s[3:].square().sum(), total + s.square().sum()
    assert row["lost_energy"] == pytest.approx((lost / total).item(), rel=1e-4)
    assert row["changes"] == [f"rank 8 -> 3 ({row['lost_energy']:.2%} of the energy lost)"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "LoraConfig.use_dora"),
        ({"modules_to_save": ["lm_head"]}, "LoraConfig.modules_to_save"),
        ({"bias": "all"}, "LoraConfig.bias"),
        ({"base_model_name_or_path": "other/base"}, "expected 'user/base', found 'other/base'"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_its_reason(tmp_path, llama, change, reason):
    good, _ = save_foreign(tmp_path / "good", llama, base_name="user/base")
    bad, _ = save_foreign(tmp_path / "bad", llama, base_name="user/base")
    file = bad / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    zoo, table = import_zoo(tmp_path / "zoo", [good, bad], llama, base_model_name_or_path="user/base")
    assert list(zoo) == ["good"]
    assert [row["status"] for row in table] == ["converted", "refused"]
    assert reason in table[1]["reason"]
    with pytest.raises(IncompatibleAdapterError, match="None of 1 adapters"):
        import_zoo(tmp_path / "none", [bad], llama, base_model_name_or_path="user/base")
    assert not (tmp_path / "none").exists()


def test_other_base_models_and_missing_folders_are_refused(tmp_path, llama):
    good, _ = save_foreign(tmp_path / "good", llama)
    wide = copy.deepcopy(llama.config)
    wide.hidden_size, wide.head_dim = 48, 12
    other, _ = save_foreign(tmp_path / "other", type(llama)(wide))
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"not opened")
    sources = [good, other, tmp_path / "empty", tmp_path / "pickle", tmp_path / "missing"]
    zoo, table = import_zoo(tmp_path / "zoo", sources, llama)
    assert list(zoo) == ["good"]
    reasons = {row["task"]: row["reason"] for row in table if row["status"] == "refused"}
    assert "does not fit the base weight" in reasons["other"]
    assert "adapter_config.json" in reasons["empty"]
    assert "Only safetensors files are read" in reasons["pickle"]
    assert "is no folder, and no id on the Hub" in reasons["missing"]


def test_more_adapters_join_a_zoo_as_it_is(tmp_path, llama):
    first, _ = save_foreign(tmp_path / "first", llama, 1)
    second, expected = save_foreign(tmp_path / "second", llama, 2, r=2)
    third, _ = save_foreign(tmp_path / "third", llama, 3, target_modules=["o_proj"])
    zoo, _ = import_zoo(tmp_path / "zoo", [first], llama)
    weights = zoo.lora_weights("first")
    zoo, table = import_zoo(tmp_path / "zoo", [first, second, third], llama)
    assert [row["status"] for row in table] == ["held", "converted", "refused"]
    assert "modules that the zoo has not" in table[2]["reason"]
    assert torch.equal(zoo.lora_weights("first"), weights)
    torch.testing.assert_close(imported_logits(zoo, "second", llama), expected, atol=2e-4, rtol=1e-3)
    with pytest.raises(ZooError, match="rank 4"):
        import_zoo(tmp_path / "zoo", [second], llama, rank=8)
    with pytest.raises(ArgumentError, match="one name"):
        import_zoo(tmp_path / "zoo", [first, tmp_path / "zoo" / "first"], llama)


@pytest.mark.parametrize("shares_a", [False, True])
def test_each_adapter_is_read_once_and_what_the_zoo_holds_not_again(tmp_path, llama, monkeypatch, shares_a):
    first = get_peft_model(copy.deepcopy(llama), LoraConfig(r=4, target_modules=LORA_TARGETS["llama"]))
    a = {name: p.detach().clone() for name, p in first.named_parameters() if ".lora_A." in name} if shares_a else None
    folders = [save_foreign(tmp_path / str(seed), llama, seed, frozen_a=a)[0] for seed in range(4)]
    reads, opened = Counter(), open

    def counting(file, *args, **kwargs):
        reads[str(file)] += 1
        return opened(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", counting)
    zoo, _ = import_zoo(tmp_path / "zoo", folders[:3], llama)
    assert zoo.layout.gauge == ("frozen_a" if shares_a else "free")
    files = [str(folder / "adapter_model.safetensors") for folder in folders]
    assert [reads[file] for file in files] == [1, 1, 1, 0]
    _, table = import_zoo(tmp_path / "zoo", folders, llama)
    assert [row["status"] for row in table] == ["held", "held", "held", "converted"]
    assert [reads[file] for file in files] == [1, 1, 1, 1]


def test_interrupted_import_is_finished_by_the_same_call(tmp_path, llama, monkeypatch):
    sources = [save_foreign(tmp_path / str(seed), llama, seed)[0] for seed in range(3)]
    whole, _ = import_zoo(tmp_path / "whole", sources, llama)
    add, calls = LoraZoo.add, []

    def fail_at_the_second(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add(self, *args, **kwargs)

    monkeypatch.setattr(LoraZoo, "add", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        import_zoo(tmp_path / "zoo", sources, llama)
    monkeypatch.undo()
    zoo, table = import_zoo(tmp_path / "zoo", sources, llama)
    assert [row["status"] for row in table] == ["held", "converted", "converted"]
    for name in whole:
        assert torch.equal(zoo.lora_weights(name), whole.lora_weights(name))


def test_wrapped_base_model_is_refused(tmp_path, llama):
    folder, _ = save_foreign(tmp_path / "one", llama)
    wrapped = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(IncompatibleAdapterError, match="without adapters"):
        import_zoo(tmp_path / "zoo", [folder], wrapped)


def test_imported_adapter_folder_is_an_ordinary_one(tmp_path, llama):
    llama.save_pretrained(tmp_path / "base")
    folder, expected = save_foreign(tmp_path / "one", llama, use_rslora=True, rank_pattern={"v_proj": 3})
    zoo, _ = import_zoo(tmp_path / "zoo", [folder], llama, base_model_name_or_path=str(tmp_path / "base"))
    model = AutoPeftModelForCausalLM.from_pretrained(zoo.task_folder("one") / "step-0")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-3)


def test_source_paths_stay_out_of_the_zoo(tmp_path, llama):
    folder, _ = save_foreign(tmp_path / "secret-place" / "one", llama)
    zoo, _ = import_zoo(tmp_path / "zoo", [folder], llama)
    text = "".join(file.read_text() for file in zoo.path.rglob("*.json"))
    assert "secret-place" not in text
    assert '"source": "one"' in text
    assert zoo.records["one"]["lost_energy"] == 0.0


def test_full_names_where_short_ones_would_mean_more(tmp_path, llama):
    folder, expected = save_foreign(tmp_path / "one", llama, layers_to_transform=[1])
    zoo, _ = import_zoo(tmp_path / "zoo", [folder], llama)
    assert zoo.lora_config["target_modules"] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    torch.testing.assert_close(imported_logits(zoo, "one", llama), expected, atol=2e-4, rtol=1e-3)
