"""Behavioural training: many adapters in one pass act as PEFT's own, and the base comes back as it was."""

import math

import pytest
import torch
from conftest import (
    LORA_TARGETS,
    SEEN,
    UNSEEN,
    make_gpt2,
    make_llama,
    make_t5,
    make_tasks,
    state_of,
    training_arguments,
)
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_icm_lora import (
    ArgumentError,
    BehaviouralCollator,
    BehaviouralDataset,
    ExampleLoss,
    IcmLoraError,
    IncompatibleAdapterError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraLayout,
    NotFittedError,
    TaskError,
    TaskVectorError,
    attach_adapter,
)
from hf_icm_lora.adapter import adapter_state_dict
from hf_icm_lora.behaviour import batched_lora, behavioural_loss
from hf_icm_lora.completion import CompletionCollator, score_completions
from hf_icm_lora.lora_config import canonical_lora_config
from hf_icm_lora.tasks import Sample, to_sample

MAKE = {"llama": make_llama, "gpt2": make_gpt2, "t5": make_t5}
SIZES = dict(hidden_size=32, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=1, latent_size=16)
NOT_IN_GENERATION = ("encoder", "posterior_proj", "summary_embedding", "in_projections")  # read LoRAs, not tasks


# Many adapters in one pass


def make_adapters(name, gauge, count=3, **fields):
    """A base model, and adapters of one layout: configuration, layout, state dicts, packed and shared weights."""
    lora_config = {"r": 4, "lora_alpha": 6, "target_modules": LORA_TARGETS[name], "fan_in_fan_out": name == "gpt2"}
    lora_config |= fields
    base = MAKE[name]()
    model = get_peft_model(base, LoraConfig(**lora_config))
    start = adapter_state_dict(model)
    base = model.unload()
    state_dicts = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        frozen = torch.Generator().manual_seed(99)
        state_dicts.append(
            {
                key: 0.3 * torch.randn(w.shape, generator=frozen if gauge == "frozen_a" and "_A" in key else generator)
                for key, w in sorted(start.items())
            }
        )
    layout = LoraLayout.from_state_dict(state_dicts[0], lora_config, gauge)
    packed, shared = zip(*(layout.pack(state_dict, lora_config) for state_dict in state_dicts), strict=True)
    return base, lora_config, layout, state_dicts, torch.stack(packed), shared[0]


def make_batch(base, tokenizer, num_rows):
    """Rows of different lengths."""
    samples = [sample for task in make_tasks(3) for sample in task.train[:4]][:num_rows]
    samples = [Sample(s.prompt * (1 + i % 3), s.completion * (1 + i % 2)) for i, s in enumerate(samples)]
    return CompletionCollator(tokenizer, base.config.is_encoder_decoder)(samples)


class Scored(torch.nn.Module):
    """The loss per token of a model, as a module, so that `functional_call` can exchange its weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        scores = score_completions(self.model, batch)
        return scores.loss.sum() / scores.num_tokens.sum()


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def logits(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        inputs["labels"] = batch["labels"]
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("gauge", ["frozen_a", "shared_init", "free"])
@pytest.mark.parametrize("name", list(MAKE))
@torch.no_grad()
def test_rows_go_through_their_own_adapter_as_in_peft(tokenizer, name, gauge):
    base, lora_config, layout, state_dicts, packed, shared = make_adapters(name, gauge)
    batch = make_batch(base, tokenizer, 12)  # 4 rows for each of 3 adapters
    without = logits(base, batch)
    with batched_lora(base, layout, packed, shared):
        together = logits(base, batch)
    losses = behavioural_loss(base, layout, packed, shared, batch)
    assert hooks(base) == 0
    assert torch.equal(logits(base, batch), without)
    model = base
    for i, state_dict in enumerate(state_dicts):
        model = attach_adapter(model, lora_config, state_dict)
        rows = {key: tensor[4 * i : 4 * i + 4] for key, tensor in batch.items()}
        alone = logits(model, rows)
        torch.testing.assert_close(together[4 * i : 4 * i + 4], alone, rtol=1e-5, atol=1e-5)
        scores = score_completions(model, rows)
        torch.testing.assert_close(losses[i], scores.loss.sum() / scores.num_tokens.sum(), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(alone, without[4 * i : 4 * i + 4], atol=1e-2)
    assert losses.dtype == torch.float32
    assert len(set(losses.tolist())) == 3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_have_the_losses_and_gradients_of_their_samples(tokenizer, name):
    base, _, layout, _, packed, shared = make_adapters(name, "frozen_a")
    base.requires_grad_(False)
    packed.requires_grad_()
    given = [task.train[:count] for task, count in zip(make_tasks(3), (1, 3, 8), strict=True)]
    collate = CompletionCollator(tokenizer, row_length=60)
    batch = BehaviouralCollator(collate)(
        [{"task_vector": torch.zeros(1, 32), "samples": samples} for samples in given]
    )
    kept = [len(next(collate.fill_rows(samples))) for samples in given]
    assert kept == [1, 3, 6]  # what no longer fits is left out
    assert {key: tuple(tensor.shape) for key, tensor in batch.items() if key != "task_vector"} == {
        "input_ids": (3, 54), "position_ids": (3, 54), "labels": (3, 54),
    }  # fmt: skip
    together = behavioural_loss(base, layout, packed, shared, batch)
    (gradient,) = torch.autograd.grad(together.sum(), packed)
    for i, samples in enumerate(given):
        loss = behavioural_loss(
            base, layout, packed[i : i + 1], shared, CompletionCollator(tokenizer)(samples[: kept[i]])
        )
        torch.testing.assert_close(together[i], loss[0], rtol=1e-5, atol=1e-5)
        (expected,) = torch.autograd.grad(loss, packed)
        torch.testing.assert_close(gradient[i], expected[i], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ranks_and_scalings_of_their_own_per_module(tokenizer):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 1}, "use_rslora": True}
    base, lora_config, layout, state_dicts, packed, shared = make_adapters("llama", "frozen_a", **patterns)
    batch = make_batch(base, tokenizer, 6)
    losses, model = behavioural_loss(base, layout, packed, shared, batch), base
    for i, state_dict in enumerate(state_dicts):
        model = attach_adapter(model, lora_config, state_dict)
        scores = score_completions(model, {key: tensor[2 * i : 2 * i + 2] for key, tensor in batch.items()})
        torch.testing.assert_close(losses[i], scores.loss.sum() / scores.num_tokens.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gauge", ["frozen_a", "shared_init"])
@pytest.mark.parametrize("name", list(MAKE))
def test_gradient_is_that_of_a_peft_model(tokenizer, name, gauge):
    base, lora_config, layout, _, packed, shared = make_adapters(name, gauge, count=2)
    batch = make_batch(base, tokenizer, 6)
    base.requires_grad_(False)
    packed.requires_grad_()
    behavioural_loss(base, layout, packed, shared, batch).sum().backward()
    assert all(parameter.grad is None for parameter in base.parameters())

    plain, model = canonical_lora_config(lora_config, layout.max_rank), base  # scaling 1, as the weights are packed
    for i in range(2):
        model = attach_adapter(model, plain, layout.unpack(packed[i].detach(), shared))
        rows = {key: tensor[3 * i : 3 * i + 3] for key, tensor in batch.items()}
        parameters = {n: p for n, p in model.named_parameters() if ".lora_" in n}

        scored = Scored(model)
        values = {f"model.{n}": p.detach().clone().requires_grad_() for n, p in parameters.items()}
        gradients = torch.autograd.grad(torch.func.functional_call(scored, values, (rows,)), list(values.values()))
        by_key = {n.replace(".default.", "."): g for n, g in zip(parameters, gradients, strict=True)}
        expected, _ = layout.pack(by_key, plain)
        torch.testing.assert_close(packed.grad[i], expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 1e-3


def test_rows_of_other_adapters_give_no_gradient(tokenizer):
    base, _, layout, _, packed, shared = make_adapters("llama", "frozen_a")
    packed.requires_grad_()
    behavioural_loss(base, layout, packed, shared, make_batch(base, tokenizer, 6))[1].backward()
    assert packed.grad[1].abs().max() > 1e-3
    assert packed.grad[[0, 2]].abs().max() == 0


def test_hooks_are_removed_after_any_error(tokenizer):
    base, _, layout, _, packed, shared = make_adapters("llama", "frozen_a")

    def fail():
        with batched_lora(base, layout, packed, shared):
            assert hooks(base) == 4
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert hooks(base) == 0
    with pytest.raises(RuntimeError):  # 5 rows for 3 adapters
        behavioural_loss(base, layout, packed, shared, make_batch(base, tokenizer, 5))
    assert hooks(base) == 0
    del base.model.layers[1]
    with pytest.raises(AttributeError), batched_lora(base, layout, packed, shared):
        raise AssertionError("the second layer's modules are missing")
    assert hooks(base) == 0


def test_base_in_bf16_gives_gradients_in_fp32(tokenizer):
    base, _, layout, _, packed, shared = make_adapters("llama", "frozen_a")
    batch = make_batch(base, tokenizer, 6)
    exact = behavioural_loss(base, layout, packed, shared, batch)
    packed.requires_grad_()
    losses = behavioural_loss(base.to(torch.bfloat16), layout, packed, shared, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)
    losses.sum().backward()
    assert packed.grad.dtype == torch.float32
    assert packed.grad.isfinite().all()
    assert packed.grad.abs().max() > 1e-3


# The loss on examples


EXAMPLES = [("ab", "bc"), ("cde", "def"), {"prompt": "f", "completion": "g"}, ("ghij", "hijk")] * 4  # several rows


def loss_in_peft(base, lora_config, state_dict, tokenizer):
    """The same in another way: one sample a row, one adapter after the other."""
    model = attach_adapter(base, lora_config, state_dict)
    batch = CompletionCollator(tokenizer, base.config.is_encoder_decoder)([to_sample(raw) for raw in EXAMPLES])
    with torch.no_grad():
        scores = score_completions(model, batch)
    model.unload()
    return (scores.loss.sum() / scores.num_tokens.sum()).item()


@pytest.mark.parametrize("name", list(MAKE))
def test_losses_on_examples_are_those_of_each_adapter_in_peft(tokenizer, name):
    base, lora_config, layout, state_dicts, packed, shared = make_adapters(name, "shared_init")
    expected = [loss_in_peft(MAKE[name](), lora_config, state_dict, tokenizer) for state_dict in state_dicts]
    example_loss = ExampleLoss(base, tokenizer, layout, shared, EXAMPLES)
    losses = example_loss(packed)
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 3
    example_loss.most_labels = 1  # one adapter at a time, where there are many examples
    torch.testing.assert_close(example_loss(packed), losses)
    assert not losses.requires_grad
    assert hooks(base) == 0


def test_examples_are_tokenized_once(tokenizer):
    base, _, layout, _, packed, shared = make_adapters("llama", "frozen_a")
    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return tokenizer(*args, **kwargs)

    example_loss = ExampleLoss(base, counting, layout, shared, EXAMPLES)
    read = len(calls)
    assert read == 2 * len(EXAMPLES)  # prompt and completion
    example_loss(packed)
    example_loss.at_scales(packed[0])
    example_loss.refine(packed[0], 2)
    assert len(calls) == read


def test_loss_on_examples_is_that_of_the_base_alone(tokenizer):
    """Whatever adapters it carries, which are as before after it."""
    base, lora_config, layout, state_dicts, packed, shared = make_adapters("llama", "frozen_a")
    expected = ExampleLoss(base, tokenizer, layout, shared, EXAMPLES)(packed)
    model = attach_adapter(base, lora_config, state_dicts[0])
    batch = make_batch(base, tokenizer, 4)
    before = logits(model, batch)
    torch.testing.assert_close(ExampleLoss(model, tokenizer, layout, shared, EXAMPLES)(packed), expected)
    assert torch.equal(logits(model, batch), before)


def test_losses_at_scales_and_gain(tokenizer):
    base, lora_config, layout, state_dicts, packed, shared = make_adapters("llama", "shared_init")
    example_loss = ExampleLoss(base, tokenizer, layout, shared, EXAMPLES)
    losses = example_loss.at_scales(packed[0])
    assert list(losses) == [0.0, 0.25, 0.5, 0.75, 1.0]
    halved = {k: 0.5 * w if "lora_B" in k else w for k, w in state_dicts[0].items()}
    nothing = {k: 0.0 * w for k, w in state_dicts[0].items()}
    for scale, state_dict in ((0.0, nothing), (0.5, halved), (1.0, state_dicts[0])):
        expected = loss_in_peft(make_llama(), lora_config, state_dict, tokenizer)
        assert losses[scale] == pytest.approx(expected, rel=1e-4)
    gain = example_loss.gain(packed[0])
    assert gain == pytest.approx((losses[0.0] - losses[1.0]) / losses[0.0], rel=1e-3)
    assert example_loss.gain(torch.zeros_like(packed[0])) == pytest.approx(0.0, abs=1e-6)
    assert example_loss.at_scales(packed[0], (2.0,)).keys() == {2.0}


def test_refining_lowers_the_loss_and_keeps_what_is_shared(tokenizer):
    base, _, layout, _, packed, shared = make_adapters("llama", "frozen_a")
    before, state = {n: t.clone() for n, t in base.state_dict().items()}, state_of(base)
    example_loss = ExampleLoss(base, tokenizer, layout, shared, EXAMPLES)
    start, nothing = packed[0].clone(), torch.zeros_like(packed[0])
    refined = [example_loss.refine(nothing, 5, learning_rate=1e-2) for _ in range(2)]
    assert torch.equal(*refined)
    assert example_loss.gain(refined[0]) > 0.02
    assert example_loss.gain(example_loss.refine(packed[0], 5)) > example_loss.gain(packed[0])
    assert torch.equal(packed[0], start)
    assert torch.equal(example_loss.refine(start, 0), start)
    assert state_of(base) == state
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_what_are_no_examples_is_said(tokenizer):
    base, _, layout, _, _, shared = make_adapters("llama", "frozen_a")
    with pytest.raises(TaskError, match="at least one example"):
        ExampleLoss(base, tokenizer, layout, shared, [])
    with pytest.raises(TaskError, match=r"Expected examples\[1\] to be"):
        ExampleLoss(base, tokenizer, layout, shared, [("a", "b"), ("a", "b", "c")])


# The dataset


@pytest.fixture
def tasks(world):
    return world.tasks


@pytest.fixture
def zoo(world):
    """LoRAs of four tasks, vectors of all six."""
    return world.zoo


@pytest.fixture
def vectors(zoo):
    return zoo.task_vectors


def test_an_epoch_shows_all_vectors_and_all_samples(tasks, vectors):
    for task in tasks:
        dataset = BehaviouralDataset([task], vectors, num_samples=3)
        assert len(dataset) == 12  # 4 draws for each of 3 modes; 24 samples would need 8 items
        assert {sample for item in dataset for sample in item["samples"]} == set(task.train)  # neither demo nor test
        assert all(len(set(item["samples"])) == 3 for item in dataset)
        shown = [tuple(item["task_vector"].flatten().tolist()) for item in dataset]
        banks = {mode: [tuple(v.flatten().tolist()) for v in bank] for mode, bank in vectors.banks[task.name].items()}
        assert set(shown) == {vector for bank in banks.values() for vector in bank}
        assert [sum(vector in bank for vector in shown) for bank in banks.values()] == [4, 4, 4]  # modes count alike
    assert len(BehaviouralDataset(tasks, vectors, num_samples=3)) == 6 * 12  # two of them have no LoRA


def test_many_samples_make_many_items(tasks, vectors):
    dataset = BehaviouralDataset(tasks[:1], vectors, num_samples=1, modes=["demonstrations"])
    assert len(dataset) == 24
    assert len({item["samples"] for item in dataset}) == 24
    assert len({tuple(item["task_vector"].flatten().tolist()) for item in dataset}) == 4


def test_items_are_the_same_each_time(tasks, vectors):
    dataset, again = BehaviouralDataset(tasks, vectors), BehaviouralDataset(tasks, vectors)
    state = torch.random.get_rng_state()
    one = [dataset[i]["samples"] for i in range(len(dataset))]
    torch.rand(3)
    assert [again[i]["samples"] for i in reversed(range(len(again)))] == one[::-1]
    torch.random.set_rng_state(state)
    dataset[0]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_the_given_modes_are_used(tasks, vectors):
    dataset = BehaviouralDataset(tasks, vectors, num_samples=4, modes=["description"])
    assert len(dataset) == 6 * len(tasks)  # 24 samples, 4 at a time
    assert torch.equal(dataset[12]["task_vector"], vectors.banks["shift/3"]["description"][0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": lambda tasks: [*tasks, tasks[0]]}, TaskError, "named 'shift/1'"),
        ({"tasks": lambda tasks: make_tasks(7)}, TaskVectorError, "'shift/7' has no task vectors"),
        ({"tasks": lambda tasks: []}, TaskError, "at least one task and one sample, found 0 and 4"),
        ({"num_samples": 25}, TaskError, "'shift/1' has 24 'train' samples, but behavioural training needs at le"),
        ({"num_samples": 0}, TaskError, "at least one task and one sample, found 6 and 0"),
        ({"modes": ["nothing"]}, TaskVectorError, r"'shift/1' has no task vectors of the modes \('nothing',\)"),
        ({"modes": []}, TaskVectorError, "'shift/1' has no task vectors"),
    ],
)
def test_what_makes_no_dataset_is_said(tasks, vectors, change, error, message):
    arguments = {"num_samples": 4} | change
    chosen = arguments.pop("tasks", lambda tasks: tasks)(tasks)
    with pytest.raises(error, match=message):
        BehaviouralDataset(chosen, vectors, **arguments)


def test_samples_of_an_item_are_adjacent_rows(tasks, vectors, tokenizer):
    dataset = BehaviouralDataset(tasks, vectors, num_samples=2)
    collate_samples = CompletionCollator(tokenizer)
    items = [dataset[i] for i in (0, 9, 4)]
    batch = BehaviouralCollator(collate_samples)(items)
    assert torch.equal(batch["task_vector"], torch.stack([item["task_vector"] for item in items]))
    rows = collate_samples([sample for item in items for sample in item["samples"]])
    assert all(torch.equal(batch[key], rows[key]) for key in rows)
    assert len(batch["labels"]) == 6


# Training


@pytest.fixture
def make_trainer(tmp_path, zoo, tasks, vectors, tokenizer):
    def make(base=None, seed=0, callbacks=None, train=tasks, unseen=None, fit=True, **kwargs):
        seen = zoo.subset(SEEN)
        torch.manual_seed(seed)
        model = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(seen, **SIZES))
        if fit:
            model.fit_normalizer(seen.as_dataset())
        train = BehaviouralDataset(train, vectors, num_samples=3)
        return LoraGeneratorTrainer(
            model,
            training_arguments(tmp_path, **{"max_steps": 4, "per_device_train_batch_size": 4} | kwargs),
            base_model=make_llama() if base is None else base,
            train_dataset=train,
            eval_dataset=train if unseen is None else unseen,
            data_collator=BehaviouralCollator(CompletionCollator(tokenizer)),
            callbacks=callbacks,
        )

    return make


def logged(trainer, *names):
    return [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_training_lowers_the_base_models_loss(make_trainer):
    trainer = make_trainer(max_steps=100, learning_rate=1e-2, per_device_train_batch_size=8)
    base, before = trainer.frozen_base, weights(trainer)
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    first = trainer.evaluate()["eval_behavioural_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_behavioural_loss"] < 0.95 * first
    still = [name for name, after in weights(trainer).items() if torch.equal(before[name], after)]
    assert still == [name for name in before if any(part in name for part in NOT_IN_GENERATION)]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())
    assert hooks(base) == 0


def test_logs_have_the_terms_of_the_loss(make_trainer):
    trainer = make_trainer()
    trainer.train()
    rows = logged(trainer, "loss", "behavioural_loss", "grad_norm")
    assert len(rows) == 4
    assert all(math.isfinite(value) for row in rows for value in row)
    assert [row[0] for row in rows] == pytest.approx([row[1] for row in rows], rel=1e-5)
    assert not any("reconstruction_loss" in row for row in trainer.state.log_history)


def test_loss_is_that_of_the_generated_adapters_in_peft(make_trainer, tasks, vectors, tokenizer):
    trainer = make_trainer(per_device_eval_batch_size=5)
    trainer.train()
    metrics, losses = trainer.evaluate(), []
    for item in trainer.train_dataset:
        model = trainer.model.generate_adapter(make_llama(), task_vector=item["task_vector"])
        with torch.no_grad():
            scores = score_completions(model, CompletionCollator(tokenizer)(item["samples"]))
        losses.append((scores.loss.sum() / scores.num_tokens.sum()).item())
    expected = sum(losses) / len(losses)
    assert metrics["eval_behavioural_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_during_training_is_on_the_evaluation_tasks(make_trainer, tasks, vectors, zoo):
    behaviour = BehaviouralDataset(tasks[3:4], vectors, num_samples=3)
    trainer = make_trainer(train=tasks[:3], unseen=behaviour, eval_strategy="steps", eval_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    unseen = trainer.evaluate(behaviour)["eval_behavioural_loss"]
    assert rows[-1]["eval_behavioural_loss"] == pytest.approx(unseen, rel=1e-6)
    assert unseen != pytest.approx(trainer.evaluate(trainer.train_dataset)["eval_behavioural_loss"], rel=1e-5)


def test_resuming_repeats_the_losses_exactly(make_trainer, tmp_path):
    full = make_trainer(max_steps=8, save_strategy="steps", save_steps=3)
    full.train()
    resumed = make_trainer(max_steps=8, seed=99)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    names = ("step", "loss", "behavioural_loss", "grad_norm", "learning_rate")
    assert logged(resumed, *names)[3:] == logged(full, *names)[3:]
    assert len(logged(resumed, *names)) == 8
    one, other = weights(full), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_samples_become_batches_with_the_tokenizer_alone(make_trainer, tokenizer, zoo, tasks, vectors, tmp_path):
    explicit = make_trainer()
    model, args = explicit.model, explicit.args
    given = {"base_model": make_llama(), "train_dataset": explicit.train_dataset}
    with pytest.raises(ArgumentError, match="pass its processing_class too"):
        LoraGeneratorTrainer(model, args, **given)
    trainer = LoraGeneratorTrainer(model, args, processing_class=tokenizer, **given)
    items = [explicit.train_dataset[i] for i in range(3)]
    expected = BehaviouralCollator(CompletionCollator(tokenizer, template=zoo.template, row_length=48))(items)
    batch = trainer.data_collator(items)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in batch)
    trainer.save_model()
    assert not list((tmp_path / "out").glob("tokenizer*"))  # the base model has it


def test_checkpoints_do_not_hold_the_base_model(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=4)
    trainer.train()
    restored = LoraGeneratorModel.from_pretrained(tmp_path / "out" / "checkpoint-4")
    assert restored.state_dict().keys() == trainer.model.state_dict().keys()
    assert restored.config.training_tasks == [f"shift/{i}" for i in range(1, 7)]


def test_gradient_accumulation_changes_nothing(make_trainer):
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0.3
        )
        before = weights(trainer)
        trainer.train()
        runs.append((weights(trainer), logged(trainer, "loss", "behavioural_loss")))
    (one, log_one), (other, log_other) = runs
    assert max((one[name] - before[name]).abs().max() for name in one) > 1e-3
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(log_one), torch.tensor(log_other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_base_is_frozen_meanwhile_and_comes_back_as_it_was(make_trainer, fails):
    base, seen = make_llama(), []
    base.model.layers[0].train()
    base.model.embed_tokens.requires_grad_(False)
    before = state_of(base)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((any(p.requires_grad for p in base.parameters()), any(m.training for m in base.modules())))
            if fails:
                raise KeyError("mine")

    trainer = make_trainer(base, callbacks=[Look()], eval_strategy="steps", eval_steps=1)
    if fails:
        with pytest.raises(KeyError, match="mine"):
            trainer.train()
    else:
        trainer.train()
    assert set(seen) == {(False, False)}
    assert state_of(base) == before
    assert hooks(base) == 0
    assert all(parameter.grad is None for parameter in base.parameters())


def test_dropout_of_the_base_is_off(make_trainer):
    losses = []
    for training in (False, True):
        base = make_llama().train(training)
        for layer in base.model.layers:
            layer.self_attn.attention_dropout = 0.5
        trainer = make_trainer(base)
        trainer.train()
        losses.append([*logged(trainer, "loss"), trainer.evaluate()["eval_loss"]])
        assert base.training is training
    assert losses[0] == losses[1]


def test_base_in_bf16_trains(make_trainer):
    trainer = make_trainer(make_llama(dtype=torch.bfloat16), max_steps=10, learning_rate=3e-3)
    first = trainer.evaluate()["eval_behavioural_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_behavioural_loss"] < first
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_tasks_become_training_tasks_also_without_a_lora(make_trainer, zoo, tasks, tmp_path):
    trainer = make_trainer(train=[tasks[5], tasks[0]])
    assert trainer.model.config.training_tasks == [*SEEN, "shift/6"]
    trainer.model.save_pretrained(tmp_path / "saved")
    assert LoraGeneratorConfig.from_pretrained(tmp_path / "saved").training_tasks == [*SEEN, "shift/6"]


def test_evaluated_tasks_do_not_become_training_tasks(make_trainer, tasks, vectors):
    trainer = make_trainer(train=tasks[:2], unseen=BehaviouralDataset(tasks[3:], vectors))
    trainer.evaluate()
    assert trainer.model.config.training_tasks == SEEN


def test_behaviour_can_be_evaluated_while_reconstruction_is_trained(zoo, tasks, vectors, tokenizer, tmp_path):
    seen = zoo.subset(SEEN)
    model = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(seen, **SIZES))
    args = training_arguments(tmp_path, max_steps=2)
    trainer = LoraGeneratorTrainer(model, args, train_dataset=seen.as_dataset(), base_model=make_llama())
    trainer.train()
    assert "eval_generation_loss" in trainer.evaluate(zoo.subset(UNSEEN).as_dataset())
    trainer.data_collator = BehaviouralCollator(CompletionCollator(tokenizer))
    assert "eval_behavioural_loss" in trainer.evaluate(BehaviouralDataset(tasks[3:4], vectors))
    assert model.config.training_tasks == SEEN


# What is refused


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_base_model_is_needed(zoo, tasks, vectors, tmp_path, part):
    model = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo.subset(SEEN), **SIZES))
    args = training_arguments(tmp_path)
    with pytest.raises(IcmLoraError, match="pass base_model too"):
        LoraGeneratorTrainer(model, args, **{part: BehaviouralDataset(tasks, vectors)})
    assert model.config.training_tasks == SEEN


def test_another_base_model_is_refused(make_trainer):
    with pytest.raises(IncompatibleAdapterError, match="made for"):
        make_trainer(make_llama(seed=1))


@pytest.mark.parametrize("unwrapped", [False, True])
def test_base_with_adapters_is_refused(make_trainer, unwrapped):
    base = make_llama()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(IncompatibleAdapterError, match="without adapters"):
        make_trainer(base if unwrapped else model)


def test_generator_without_statistics_is_refused(make_trainer):
    with pytest.raises(NotFittedError, match="fit_normalizer"):
        make_trainer(fit=False).train()


def test_loss_that_is_not_finite_is_an_error(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.network.latent_proj.bias[0] = float("nan")
    with pytest.raises(IcmLoraError, match="loss became nan by step"):
        trainer.train()
    assert hooks(trainer.frozen_base) == 0
