"""Collecting: every task's LoRA starts alike and learns, the base comes back as it was, and a rerun resumes."""

import pytest
import torch
from conftest import LORA_TARGETS, make_llama, make_t5, make_tasks, odd_base, state_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainingArguments

import hf_icm_lora.collection
from hf_icm_lora import (
    CollectionArguments,
    IncompatibleAdapterError,
    LoraZoo,
    Task,
    TaskError,
    TrainingError,
    ZooError,
    attach_adapter,
    collect_zoo,
)
from hf_icm_lora.base_model import base_model_fingerprint
from hf_icm_lora.completion import CompletionCollator, score_completions


def lora_config(**fields):
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | fields)


def arguments(tmp_path, **fields):
    fields = {"max_steps": 24, "eval_steps": 4, "num_snapshots": 3, "learning_rate": 3e-2} | fields
    return CollectionArguments(output_dir=tmp_path / "trainer", **fields)


def matrices(zoo, factor):
    """Each task's matrices of one factor, as one vector."""
    return {
        name: torch.cat(
            [t.flatten() for key, t in sorted(zoo.load_snapshot(name).items()) if f".lora_{factor}." in key]
        )
        for name in zoo
    }


def weight_files(zoo):
    return {str(path.relative_to(zoo.path)): path.read_bytes() for path in zoo.path.rglob("*.safetensors")}


def loss_on_test(model, tokenizer, task):
    batch = CompletionCollator(tokenizer, model.config.is_encoder_decoder)(task.test)
    with torch.no_grad():
        scores = score_completions(model.eval(), batch)
    return (scores.loss.sum() / scores.num_tokens.sum()).item()


@pytest.fixture(scope="module")
def collected(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("collected")
    return collect_zoo(path / "zoo", make_llama(), tokenizer, make_tasks(3), lora_config(), arguments(path))


def test_every_task_is_in_the_zoo(collected):
    assert sorted(collected) == ["shift/1", "shift/2", "shift/3"]
    assert collected.base_model_fingerprint == base_model_fingerprint(make_llama())
    assert collected.layout.gauge == "frozen_a"
    assert collected.lora_config["r"] == 2
    record = collected.records["shift/2"]
    assert (record["description"], record["family"], record["seed"]) == ("Shift each letter by 2.", "shift", 42)
    assert record["seconds"] > 0
    assert not list(collected.path.rglob(".tmp-*"))


def test_all_tasks_share_one_a_and_differ_in_b(collected):
    a, b = (list(matrices(collected, factor).values()) for factor in "AB")
    assert torch.equal(a[0], a[1])
    assert torch.equal(a[0], a[2])
    assert a[0].any()
    assert not any(torch.allclose(b[i], b[j], atol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))
    steps = collected.records["shift/1"]["snapshots"]
    assert len({collected.lora_weights("shift/1", step).norm().item() for step in steps}) == len(steps)  # it moves


def test_snapshots_end_at_the_best_and_losses_say_so(collected):
    for record in collected.records.values():
        losses = {int(step): loss for step, loss in record["validation_losses"].items()}
        assert record["best_step"] == min(losses, key=losses.get)
        assert 1 <= len(record["snapshots"]) <= 3
        assert max(record["snapshots"]) == record["best_step"]
        up_to_best = [step for step in sorted(losses) if step <= record["best_step"]]
        assert record["snapshots"] == up_to_best[-3:]
        later = [step for step in losses if step > record["best_step"]]
        assert len(later) <= 2  # patience
        assert max(losses) == 24 or len(later) == 2


@pytest.mark.parametrize("patience", [1, 3])
def test_task_ends_when_patience_does_and_keeps_nothing_after_the_best(tmp_path, tokenizer, patience):
    (task,) = make_tasks(1)
    misleading = Task("t", train=[(p, "aa") for p, _ in task.train], demo=[(p, "zzzz") for p, _ in task.demo])
    args = arguments(tmp_path, max_steps=60, eval_steps=2, patience=patience)
    zoo = collect_zoo(tmp_path / "zoo", make_llama(), tokenizer, [misleading], lora_config(), args)
    record = zoo.records["t"]
    losses = {int(step): loss for step, loss in record["validation_losses"].items()}
    assert record["best_step"] == min(losses, key=losses.get)
    assert max(losses) == record["best_step"] + 2 * patience < 60
    assert max(record["snapshots"]) == record["best_step"]
    folders = {path.name for path in zoo.task_folder("t").iterdir()} - {"task.json"}
    assert folders == {f"step-{step}" for step in record["snapshots"]}


def test_adapter_of_a_seen_task_lowers_its_loss_on_test_samples(collected, tokenizer):
    plain, adapted = [], []
    for task in make_tasks(3):
        plain.append(loss_on_test(make_llama(), tokenizer, task))
        model = PeftModel.from_pretrained(make_llama(), collected.task_folder(task.name) / _best(collected, task.name))
        adapted.append(loss_on_test(model, tokenizer, task))
    assert all(after < before for after, before in zip(adapted, plain, strict=True))
    assert sum(adapted) < 0.93 * sum(plain)


def _best(zoo, name):
    return f"step-{zoo.records[name]['best_step']}"


def test_best_loss_is_that_of_the_best_snapshot(collected, tokenizer):
    task = make_tasks(1)[0]
    model = attach_adapter(make_llama(), collected.lora_config, collected.load_snapshot(task.name))
    found = loss_on_test(model, tokenizer, Task("demo", test=task.demo))
    losses = collected.records[task.name]["validation_losses"]
    assert found == pytest.approx(losses[str(collected.records[task.name]["best_step"])], rel=1e-4)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(collected, tmp_path, tokenizer):
    torch.manual_seed(99)  # the global state is not what counts
    again = collect_zoo(tmp_path / "again", make_llama(), tokenizer, make_tasks(3), lora_config(), arguments(tmp_path))
    assert weight_files(again) == weight_files(collected)
    args = arguments(tmp_path, seed=7, max_steps=4)
    other = collect_zoo(tmp_path / "other", make_llama(), tokenizer, make_tasks(1), lora_config(), args)
    assert not torch.equal(matrices(other, "A")["shift/1"], matrices(collected, "A")["shift/1"])


@pytest.mark.parametrize(
    "fields", [{}, {"init_lora_weights": "pissa"}, {"lora_dropout": 0.5}], ids=["plain", "pissa", "dropout"]
)
def test_base_comes_back_unchanged(tmp_path, tokenizer, fields):
    base = odd_base()
    before = state_of(base)
    args = arguments(tmp_path, max_steps=4)
    zoo = collect_zoo(tmp_path / "zoo", base, tokenizer, make_tasks(1), lora_config(**fields), args)
    assert state_of(base) == before
    assert "init_lora_weights" not in zoo.lora_config
    assert get_peft_model(base, lora_config())  # and PEFT can wrap it again, without a warning


@pytest.mark.parametrize("fails_at", [1, 2, 9])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_base_comes_back_unchanged_after_an_error(tmp_path, tokenizer, monkeypatch, fails_at, error):
    base = odd_base()
    before = state_of(base)
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise error("stop")
        return score_completions(*args)

    monkeypatch.setattr(hf_icm_lora.collection, "score_completions", fail)
    args = arguments(tmp_path)
    with pytest.raises(error, match="stop"):
        collect_zoo(tmp_path / "zoo", base, tokenizer, make_tasks(1), lora_config(), args)
    assert state_of(base) == before
    assert len(LoraZoo(tmp_path / "zoo")) == 0


def test_processes_of_one_group_are_refused(tmp_path, tokenizer, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(TrainingError, match=r"a group of 2, .* call processes\.leave_group\(\) before"):
        collect_zoo(tmp_path / "zoo", make_llama(), tokenizer, make_tasks(1), lora_config(), args)
    assert not (tmp_path / "zoo").exists()


def test_base_comes_back_unchanged_when_no_module_is_targeted(tmp_path, tokenizer):
    base = odd_base()
    before = state_of(base)
    with pytest.raises(ValueError, match="no_such"):
        collect_zoo(
            tmp_path, base, tokenizer, make_tasks(1), lora_config(target_modules=["no_such"]), arguments(tmp_path)
        )
    assert state_of(base) == before


def test_interrupted_collection_is_resumed_without_training_anew(collected, tmp_path, tokenizer, monkeypatch):
    collect_task, started = hf_icm_lora.collection._collect_task, []

    def stop_at_second(zoo, model, processing_class, task, *args):
        started.append(task.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        collect_task(zoo, model, processing_class, task, *args)

    base = make_llama()
    call = (tmp_path / "zoo", base, tokenizer, make_tasks(3), lora_config(), arguments(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(hf_icm_lora.collection, "_collect_task", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            collect_zoo(*call)
        assert list(LoraZoo(tmp_path / "zoo")) == ["shift/1"]
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "zoo" / "adapters").rglob("*.*")}
        zoo = collect_zoo(*call)
    assert started == ["shift/1", "shift/2", "shift/2", "shift/3"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert weight_files(zoo) == weight_files(collected)  # as if it had never stopped


def test_complete_zoo_is_returned_at_once(collected, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(hf_icm_lora.collection, "_collect_task", lambda *_: pytest.fail("A task was trained again."))
    again = collect_zoo(collected.path, make_llama(), tokenizer, make_tasks(2), lora_config(), arguments(tmp_path))
    assert sorted(again) == sorted(collected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": lambda: make_llama(seed=1)}, "another base_model_fingerprint"),
        ({"lora_config": lambda: lora_config(r=4)}, "another lora_config"),
        ({"template": "{prompt}>{completion}"}, "another template"),
        ({"freeze_a": False}, "another layout"),
    ],
    ids=["base", "config", "template", "gauge"],
)
def test_zoo_of_something_else_is_not_continued(collected, tmp_path, tokenizer, change, message):
    base = change.pop("base_model", make_llama)()
    config = change.pop("lora_config", lora_config)()
    before = state_of(base)
    with pytest.raises(ZooError, match=message):
        collect_zoo(collected.path, base, tokenizer, make_tasks(4), config, arguments(tmp_path, **change))
    assert state_of(base) == before


def test_a_is_trained_too_unless_frozen(tmp_path, tokenizer):
    args = arguments(tmp_path, freeze_a=False, max_steps=8, num_snapshots=9)
    zoo = collect_zoo(tmp_path / "zoo", make_llama(), tokenizer, make_tasks(2), lora_config(), args)
    assert zoo.layout.gauge == "shared_init"
    assert zoo.layout.num_shared_weights == 0
    a, b = (list(matrices(zoo, factor).values()) for factor in "AB")
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(b[0], b[1])
    assert torch.nn.functional.cosine_similarity(a[0], a[1], dim=0) > 0.5  # from one start


def test_encoder_decoder_learns_too(tmp_path, tokenizer):
    config = lora_config(target_modules=LORA_TARGETS["t5"])
    base = make_t5()
    before = state_of(base)
    (task,) = make_tasks(1)
    zoo = collect_zoo(tmp_path / "zoo", base, tokenizer, [task], config, arguments(tmp_path))
    assert state_of(base) == before
    adapted = attach_adapter(make_t5(), zoo.lora_config, zoo.load_snapshot(task.name))
    assert loss_on_test(adapted, tokenizer, task) < loss_on_test(base, tokenizer, task)


@pytest.mark.parametrize(("max_steps", "eval_steps", "steps"), [(6, 4, {4, 6}), (3, 4, {3}), (4, 4, {4})])
def test_last_steps_are_evaluated_too(tmp_path, tokenizer, max_steps, eval_steps, steps):
    args = arguments(tmp_path, max_steps=max_steps, eval_steps=eval_steps, patience=9)
    zoo = collect_zoo(tmp_path / "zoo", make_llama(), tokenizer, make_tasks(1), lora_config(), args)
    assert {int(step) for step in zoo.records["shift/1"]["validation_losses"]} == steps


@pytest.mark.parametrize("inner", [False, True], ids=["peft_model", "its_base"])
def test_base_with_adapters_is_refused_and_kept(tmp_path, tokenizer, inner):
    base = make_llama()
    model = get_peft_model(base, lora_config())
    with pytest.raises(IncompatibleAdapterError, match="without adapters, found one with"):
        collect_zoo(
            tmp_path / "zoo", base if inner else model, tokenizer, make_tasks(1), lora_config(), arguments(tmp_path)
        )
    assert list(model.peft_config) == ["default"]
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("tasks", "config", "error", "message"),
    [
        ([Task("t", demo=["x"])], {}, TaskError, "'t' has 0 'train' samples, but a LoRA needs"),
        ([Task("t", train=["x"])], {}, TaskError, "'t' has 0 'demo' samples, but early stopping needs"),
        (make_tasks(1) * 2, {}, TaskError, "Two tasks are named"),
        (make_tasks(1), {"use_dora": True}, IncompatibleAdapterError, r"LoraConfig\.use_dora"),
        (make_tasks(1), {"modules_to_save": ["lm_head"]}, IncompatibleAdapterError, r"LoraConfig\.modules_to_save"),
    ],
    ids=["train", "demo", "names", "dora", "modules_to_save"],
)
def test_unusable_input_is_refused_before_anything_is_done(tmp_path, tokenizer, tasks, config, error, message):
    base = odd_base()
    before = state_of(base)
    with pytest.raises(error, match=message):
        collect_zoo(tmp_path / "zoo", base, tokenizer, tasks, lora_config(**config), arguments(tmp_path))
    assert state_of(base) == before
    assert not (tmp_path / "zoo").exists()


def test_given_configuration_is_not_changed(tmp_path, tokenizer):
    config = lora_config()
    before = config.to_dict()
    args = arguments(tmp_path, max_steps=4)
    collect_zoo(tmp_path / "zoo", make_llama(), tokenizer, make_tasks(1), config, args)
    assert config.to_dict() == before


def test_activation_checkpointing_gives_the_same_adapters_and_is_off_again(tmp_path, tokenizer):
    zoos = []
    for checkpointing in (False, True):
        base = odd_base()
        before, flags = state_of(base), [getattr(module, "gradient_checkpointing", None) for module in base.modules()]
        args = arguments(tmp_path, max_steps=4, activation_checkpointing=checkpointing)
        zoos.append(
            collect_zoo(tmp_path / f"zoo-{checkpointing}", base, tokenizer, make_tasks(1), lora_config(), args)
        )
        assert state_of(base) | {"attributes": None} == before | {"attributes": None}  # a class's flag is now its own
        assert [getattr(module, "gradient_checkpointing", None) for module in base.modules()] == flags
    plain, checkpointed = (matrices(zoo, "B")["shift/1"] for zoo in zoos)
    assert torch.allclose(plain, checkpointed, atol=1e-5)
    assert plain.abs().max() > 0.01
