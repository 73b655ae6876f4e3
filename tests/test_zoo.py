"""Zoos: a task is in one completely or not at all, everything in it fits together, and PEFT reads every snapshot."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch
from conftest import files, make_llama
from peft import PeftModel

import hf_icm_lora.zoo
from hf_icm_lora import (
    AlreadyExistsError,
    ArgumentError,
    CorruptAdapterError,
    IncompatibleAdapterError,
    LoraLayout,
    LoraZoo,
    TaskVectorError,
    TaskVectors,
    TaskVectorSpec,
    ZooError,
    attach_adapter,
    save_adapter,
)
from hf_icm_lora.completion import DEFAULT_TEMPLATE
from hf_icm_lora.layout import PREFIX
from hf_icm_lora.training_data import LoraZooDataset

CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
A0 = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"
NAMES = ["capital", "Größe/日本", "capital "]


def make_state_dict(seed, seed_of_a=0, rank=2):
    """A state dict for `CONFIG` on the tiny Llama, all with the same A unless told otherwise."""
    state_dict = {}
    for factor, generator in (("A", seed_of_a), ("B", seed)):
        generator = torch.Generator().manual_seed(generator)
        for layer in range(2):
            for name, width in (("q_proj", 32), ("v_proj", 16)):
                shape = (rank, 32) if factor == "A" else (width, rank)
                key = f"{PREFIX}model.layers.{layer}.self_attn.{name}.lora_{factor}.weight"
                state_dict[key] = 0.3 * torch.randn(shape, generator=generator)
    return state_dict


ABOUT = {
    "layout": LoraLayout.from_state_dict(make_state_dict(0), CONFIG, "frozen_a"),
    "lora_config": CONFIG,
    "base_model_name_or_path": "tiny/llama",
    "base_model_fingerprint": "f" * 64,
    "template": DEFAULT_TEMPLATE,
}


def banks(names, draws=4, size=3, modes=("demonstrations", "both", "description")):
    """Vectors that say which task, mode and draw they are."""
    return {
        name: {
            mode: torch.tensor([[[t, m, d]] for d in range(1 if mode == "description" else draws)]).float()[..., :size]
            for m, mode in enumerate(modes)
        }
        for t, name in enumerate(names)
    }


def vectors(names, **kwargs):
    return TaskVectors(TaskVectorSpec(pooling="prompts"), ABOUT["base_model_fingerprint"], banks(names, **kwargs))


@pytest.fixture
def zoo(tmp_path):
    """An empty zoo."""
    return LoraZoo.create(tmp_path / "zoo", **ABOUT)


@pytest.fixture
def full(zoo):
    """A zoo of three tasks with three snapshots each, the second of which is the best, and task vectors."""
    for i, name in enumerate(NAMES):
        snapshots = {step: make_state_dict(10 * i + step) for step in (8, 4, 12)}
        zoo.add(name, snapshots, best_step=8, description=f"Do {i}.", family="f")
    zoo.add_task_vectors(vectors(NAMES))
    return zoo


# Create and open


def test_created_zoo_is_opened_with_all_it_is_about(zoo):
    for opened in (zoo, LoraZoo(zoo.path), LoraZoo(str(zoo.path)), LoraZoo.create(zoo.path, **ABOUT)):
        assert {field: getattr(opened, field) for field in ABOUT} == ABOUT
        assert len(opened) == 0
        assert list(opened) == []
    assert list(files(zoo.path)) == ["zoo.json"]
    assert json.loads((zoo.path / "zoo.json").read_text()).keys() == {"format_version", *ABOUT}


@pytest.mark.parametrize(
    "change",
    [
        {"base_model_fingerprint": "e" * 64},
        {"lora_config": CONFIG | {"lora_alpha": 7}},
        {"template": "{prompt}>{completion}"},
        {"layout": LoraLayout.from_state_dict(make_state_dict(0), CONFIG, "shared_init")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_zoo_of_something_else_is_kept(full, change):
    before = files(full.path)
    with pytest.raises(ZooError, match=f"is a zoo with another {next(iter(change))}: expected .* found"):
        LoraZoo.create(full.path, **ABOUT | change)
    assert files(full.path) == before


def test_target_modules_in_another_order_are_the_same_zoo(zoo):
    LoraZoo.create(zoo.path, **ABOUT | {"lora_config": CONFIG | {"target_modules": ["v_proj", "q_proj"]}})


def test_directory_of_something_else_is_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ZooError, match=r"neither empty nor a zoo: expected zoo\.json"):
        LoraZoo.create(tmp_path, **ABOUT)
    assert files(tmp_path) == {"thesis.tex": b"dear"}


def test_empty_and_missing_directories_become_zoos(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "deep" / "missing"):
        assert len(LoraZoo.create(path, **ABOUT)) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is not a zoo: zoo\.json is missing"),
        ("", r"zoo\.json: expected JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"format_version": 1}', r"zoo\.json: .*layout"),
        ("{}", "expected format version 1, found None"),
        ('{"format_version": 99}', "expected format version 1, found 99. .* upgrade hf_icm_lora"),
    ],
    ids=["missing", "empty", "list", "without_fields", "without_version", "newer"],
)
def test_what_is_no_zoo_is_not_opened(tmp_path, content, message):
    if content is not None:
        (tmp_path / "zoo.json").write_text(content)
    with pytest.raises(ZooError, match=message):
        LoraZoo(tmp_path)


def test_zoo_of_a_newer_version_is_not_touched(full):
    path = full.path / "zoo.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    before = files(full.path)
    for open_it in (lambda: LoraZoo(full.path), lambda: LoraZoo.create(full.path, **ABOUT)):
        with pytest.raises(ZooError, match="found 2. If that is newer"):
            open_it()
    assert files(full.path) == before


# Add


def test_added_tasks_are_found_when_reopened(full):
    for opened in (full, LoraZoo(full.path)):
        assert sorted(opened) == sorted(NAMES)
        assert len(opened) == 3
        assert "capital" in opened
        assert "Capital" not in opened
        for i, name in enumerate(NAMES):
            record = opened.records[name]
            assert record["snapshots"] == [4, 8, 12]
            assert (record["best_step"], record["description"], record["family"]) == (8, f"Do {i}.", "f")
            for step, expected in ((4, 4), (12, 12), (8, 8), (None, 8)):
                state_dict = opened.load_snapshot(name, step)
                assert all(torch.equal(state_dict[key], t) for key, t in make_state_dict(10 * i + expected).items())
    assert repr(full) == f"LoraZoo({str(full.path)!r}: 3 tasks, 192 weights per adapter)"


def test_records_in_memory_are_those_on_disk(zoo):
    zoo.add("a", {4: make_state_dict(1)}, validation_losses={0: 2.5, 4: 1.5})
    assert zoo.records == LoraZoo(zoo.path).records


def test_record_is_json_also_if_a_loss_is_not_finite(zoo):
    zoo.add("a", {4: make_state_dict(1)}, validation_losses={0: float("inf"), 4: 1.5})
    text = (zoo.task_folder("a") / "task.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["validation_losses"] == {"0": None, "4": 1.5}
    assert LoraZoo(zoo.path).records == zoo.records


def test_best_snapshot_is_the_last_unless_told(zoo):
    zoo.add("a", {12: make_state_dict(1), 4: make_state_dict(2)})
    assert zoo.records["a"]["best_step"] == 12


def test_packed_weights_are_those_of_the_layout(full):
    for i, name in enumerate(NAMES):
        packed, shared = full.layout.pack(make_state_dict(10 * i + 8), CONFIG)
        assert torch.equal(full.lora_weights(name), packed)
        assert torch.equal(full.shared_weights, shared)


def test_every_snapshot_is_an_ordinary_peft_folder(full):
    for i, name in enumerate(NAMES):
        for step in (4, 8, 12):
            theirs = PeftModel.from_pretrained(make_llama(), full.task_folder(name) / f"step-{step}")
            ours = attach_adapter(make_llama(), CONFIG, make_state_dict(10 * i + step))
            ids = torch.tensor([[3, 1, 4, 1, 5]])
            with torch.no_grad():
                assert torch.equal(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_failed_add_is_no_task_and_can_be_repeated(zoo, monkeypatch):
    save, calls = hf_icm_lora.zoo.save_adapter, []

    def fail_at_second(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("disk full")
        save(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(hf_icm_lora.zoo, "save_adapter", fail_at_second)
        with pytest.raises(OSError, match="disk full"):
            zoo.add("a", {4: make_state_dict(1), 8: make_state_dict(2)})
    assert list(files(zoo.path)) == ["zoo.json"]  # though a snapshot was there
    for opened in (zoo, LoraZoo(zoo.path)):
        assert "a" not in opened
        with pytest.raises(ZooError, match=r"no complete task \['a'\]"):
            opened.subset(["a"])
    zoo.add("a", {5: make_state_dict(3), 9: make_state_dict(4)})
    assert LoraZoo(zoo.path).records["a"]["snapshots"] == [5, 9]
    assert sorted(path.name for path in zoo.task_folder("a").iterdir()) == ["step-5", "step-9", "task.json"]


def test_folder_that_is_no_task_is_left_alone(zoo):
    save_adapter(zoo.task_folder("a") / "step-4", CONFIG, make_state_dict(1))
    assert "a" not in LoraZoo(zoo.path)
    before = files(zoo.path)
    with pytest.raises(AlreadyExistsError, match=rf"{zoo.task_folder('a').name} exists in it"):
        zoo.add("a", {5: make_state_dict(3)})
    assert files(zoo.path) == before


def test_zoo_that_cannot_be_uploaded_says_so(full):
    with pytest.raises(ZooError, match="no complete task to upload"):
        full.subset([]).push_to_hub("user/it")
    full.remote = {"repo_id": "user/it"}
    with pytest.raises(ZooError, match="a streamed zoo is for reading"):
        full.push_to_hub("user/it")


def test_task_is_added_once(full):
    before = files(full.path)
    for opened in (full, LoraZoo(full.path)):
        with pytest.raises(AlreadyExistsError, match="already holds the task 'capital'"):
            opened.add("capital", {4: make_state_dict(9)})
    assert files(full.path) == before


def _nan():
    state_dict = make_state_dict(1)
    state_dict[B0][1, 1] = math.nan
    return state_dict


def _without_b():
    state_dict = make_state_dict(1)
    del state_dict[B0]
    return state_dict


@pytest.mark.parametrize("with_others", [False, True], ids=["first_task", "later_task"])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: make_state_dict(1, rank=3),
            IncompatibleAdapterError,
            "another layout.*expected rank 2.*found rank 3",
        ),
        (_nan, CorruptAdapterError, r"q_proj\.lora_B\.weight holds 1 values"),
        (_without_b, CorruptAdapterError, r"q_proj: lora_B\.weight is missing"),
        (
            lambda: make_state_dict(1, seed_of_a=1),
            IncompatibleAdapterError,
            "Task 'new', step 8: lora_A differs from the zoo's",
        ),
    ],
    ids=["layout", "nan", "half", "other_a"],
)
def test_adapter_that_does_not_fit_writes_nothing(zoo, full, with_others, make, error, message, tmp_path):
    target = full if with_others else LoraZoo.create(tmp_path / "other", **ABOUT)
    before = files(target.path)
    with pytest.raises(error, match=message):
        target.add("new", {4: make_state_dict(1), 8: make()})
    assert files(target.path) == before
    assert "new" not in target
    target.add("new", {4: make_state_dict(1)})


@pytest.mark.parametrize(
    ("snapshots", "record", "message"),
    [
        ({}, {}, "'new' needs at least one snapshot"),
        ({4: None}, {"best_step": 5}, r"'new' has no snapshot of its best step 5"),
    ],
    ids=["no_snapshots", "best_step"],
)
def test_record_that_does_not_fit_its_snapshots_writes_nothing(zoo, snapshots, record, message):
    before = files(zoo.path)
    with pytest.raises(ZooError, match=message):
        zoo.add("new", {step: make_state_dict(1) for step in snapshots}, **record)
    assert files(zoo.path) == before


@pytest.mark.parametrize("name", NAMES)
def test_snapshot_whose_a_was_exchanged_on_disk_is_noticed(full, name):
    folder = full.task_folder(name) / "step-8"
    shutil.rmtree(folder)
    save_adapter(folder, CONFIG, make_state_dict(1, seed_of_a=5))
    with pytest.raises(CorruptAdapterError, match="its lora_A is not the zoo's"):
        LoraZoo(full.path).as_dataset()


# Subsets


def test_subset_keeps_order_and_names(full):
    subset = full.subset([NAMES[2], NAMES[0]])
    assert list(subset) == [NAMES[2], NAMES[0]]
    assert NAMES[1] not in subset
    assert torch.equal(subset.lora_weights(NAMES[0]), full.lora_weights(NAMES[0]))
    assert len(full) == 3


def test_subset_of_unknown_names(full):
    with pytest.raises(
        ZooError, match=r"no complete task \['nowhere'\]; it has \['Größe/日本', 'capital', 'capital '\]"
    ):
        full.subset(["capital", "nowhere"])


# Task vectors


def test_task_vectors_are_stored_and_replaced(full):
    assert list(LoraZoo(full.path).task_vectors.banks) == NAMES
    full.add_task_vectors(vectors(NAMES, draws=2))
    again = LoraZoo(full.path).task_vectors
    assert again.spec == TaskVectorSpec(pooling="prompts")
    assert again.banks["capital"]["both"].shape == (2, 1, 3)


def test_task_vectors_of_some_tasks_keep_those_of_the_others(full):
    full.subset(NAMES[:1]).add_task_vectors(vectors([NAMES[0], "without a LoRA"], draws=2))
    stored = LoraZoo(full.path).task_vectors.banks
    assert {name: len(bank["both"]) for name, bank in stored.items()} == {
        NAMES[0]: 2, NAMES[1]: 4, NAMES[2]: 4, "without a LoRA": 2
    }  # fmt: skip
    expected = banks(NAMES)[NAMES[2]]
    assert all(torch.equal(stored[NAMES[2]][mode], expected[mode]) for mode in expected)
    assert {len(item["task_vector"]) for item in full.as_dataset()} == {1}


def test_task_vectors_of_some_tasks_in_another_way_are_refused(full):
    """One zoo has one specification: a generator reads it from there."""
    before = files(full.path)
    other = TaskVectors(TaskVectorSpec(pooling="mean"), ABOUT["base_model_fingerprint"], banks(NAMES[:1]))
    with pytest.raises(TaskVectorError, match=r"holds vectors of .*pooling=\('prompts'.*pooling=\('mean'.* all tasks"):
        full.subset(NAMES[:1]).add_task_vectors(other)
    assert files(full.path) == before


def test_task_vectors_of_all_tasks_in_another_way_replace_the_old_ones(full):
    full.add_task_vectors(vectors([*NAMES, "without a LoRA"]))
    other = TaskVectors(TaskVectorSpec(pooling="mean"), ABOUT["base_model_fingerprint"], banks(NAMES))
    full.add_task_vectors(other)
    again = LoraZoo(full.path).task_vectors
    assert again.spec == other.spec
    assert sorted(again.banks) == sorted(NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_fingerprint": "0" * 64}, "come from the base model 000000000000, .* for ffffffffffff"),
        ({"spec": TaskVectorSpec(template="{prompt}>{completion}")}, "with the zoo's template '- "),
        ({"banks": banks(NAMES[:2])}, r"no task vectors for \['capital '\]"),
    ],
    ids=["base", "template", "tasks"],
)
def test_task_vectors_of_something_else_are_refused(full, change, message):
    before = files(full.path)
    fields = {"spec": TaskVectorSpec(), "base_model_fingerprint": "f" * 64, "banks": banks(NAMES)} | change
    with pytest.raises(TaskVectorError, match=message):
        full.add_task_vectors(TaskVectors(**fields))
    assert files(full.path) == before


def test_zoo_without_task_vectors_says_so(zoo):
    zoo.add("a", {4: make_state_dict(1)})
    with pytest.raises(ZooError, match="no task vectors yet: call add_task_vectors"):
        zoo.as_dataset()


# Datasets


def step_of(dataset, full, item):
    """Which (task, step) an item's adapter is."""
    for name in full:
        for step in full.records[name]["snapshots"]:
            if torch.equal(full.lora_weights(name, step), item["lora_weights"]):
                return name, step
    raise AssertionError("An item's weights are no snapshot's.")


def test_a_large_zoo_is_read_from_disk_item_by_item(full, monkeypatch):
    kept = full.as_dataset()
    monkeypatch.setattr(LoraZooDataset, "most_in_memory", 4 * full.layout.num_weights)
    read = full.as_dataset()
    assert read.lora_weights is None
    assert len(read) == len(kept)
    for one, other in zip(read, kept, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())
    adapters = list(read.each_adapter())
    assert len(adapters) == 3 * 2
    assert all(torch.equal(one, other) for one, other in zip(adapters, kept.each_adapter(), strict=True))


def test_items_pair_each_snapshot_with_each_vector_of_its_own_task(full):
    dataset = full.as_dataset()
    pairs = Counter()
    for item in dataset:
        assert {key: (tuple(t.shape), t.dtype) for key, t in item.items()} == {
            "lora_weights": ((full.layout.num_weights,), torch.float32), "task_vector": ((1, 3), torch.float32),
        }  # fmt: skip
        name, step = step_of(dataset, full, item)
        task, mode, draw = item["task_vector"][0].int().tolist()
        assert NAMES[task] == name
        pairs[name, step, mode, draw] += 1
    # The snapshots up to the best (step 8); 4 draws of two modes, and the one description as often.
    expected = {(n, s, m, d): 1 for n in NAMES for s in (4, 8) for m in (0, 1) for d in range(4)}
    assert pairs == expected | {(n, s, 2, 0): 4 for n in NAMES for s in (4, 8)}
    assert len(dataset) == pairs.total() == 3 * 2 * 3 * 4
    assert torch.equal(dataset.shared_weights, full.shared_weights)


@pytest.mark.parametrize(("num_snapshots", "steps"), [(None, {4, 8}), (1, {8}), (2, {4, 8}), (9, {4, 8})])
def test_latest_snapshots_up_to_the_best_are_used(full, num_snapshots, steps):
    dataset = full.subset(["capital"]).as_dataset(["both"], num_snapshots)
    assert {step_of(dataset, full, item)[1] for item in dataset} == steps


@pytest.mark.parametrize("num_snapshots", [0, -1])
def test_number_of_snapshots_is_positive(full, num_snapshots):
    with pytest.raises(ArgumentError, match=f"num_snapshots >= 1, .* found {num_snapshots}"):
        full.as_dataset(num_snapshots=num_snapshots)


@pytest.mark.parametrize("modes", [["both"], ["description"], ["description", "demonstrations"]])
def test_only_the_given_modes_are_used(full, modes):
    order = ["demonstrations", "both", "description"]
    found = {order[int(item["task_vector"][0, 1])] for item in full.as_dataset(modes)}
    assert found == set(modes)


def test_subset_gives_items_of_its_tasks_alone(full):
    dataset = full.subset(NAMES[:1]).as_dataset()
    assert {step_of(dataset, full, item)[0] for item in dataset} == {NAMES[0]}


def test_task_without_description_lacks_that_mode_only(zoo):
    for i, name in enumerate("ab"):
        zoo.add(name, {4: make_state_dict(i)})
    both = banks("ab")
    del both["b"]["both"], both["b"]["description"]
    zoo.add_task_vectors(TaskVectors(TaskVectorSpec(pooling="prompts"), ABOUT["base_model_fingerprint"], both))
    assert len(zoo.as_dataset()) == 3 * 4 + 4
    with pytest.raises(TaskVectorError, match="'b' has no task vectors of the modes"):
        zoo.as_dataset(["description"])


def test_unknown_modes_are_named(full):
    with pytest.raises(ArgumentError, match=r"modes among .* found \['poetry'\]"):
        full.as_dataset(["both", "poetry"])


def test_no_tasks_make_no_dataset(full):
    with pytest.raises(ZooError, match="no tasks to make a dataset of"):
        full.subset([]).as_dataset()
