"""LoraGeneratorTrainer: what it logs is what it says, and a run can be resumed, accumulated and trusted."""

import math

import pytest
import torch
from conftest import SEEN, UNSEEN, training_arguments
from transformers import HfArgumentParser, TrainerCallback

from hf_icm_lora import (
    IcmLoraError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraGeneratorTrainingArguments,
)
from hf_icm_lora.modeling_lora_generator import kl_per_unit

# 16 latent units: PyTorch's normal noise for 8 samples is then the noise for 2, 2, 2 and 2.
SIZES = dict(hidden_size=32, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=1, latent_size=16)


@pytest.fixture(scope="module")
def zoo(world):
    return world.zoo


@pytest.fixture(scope="module")
def datasets(zoo):
    return zoo.subset(SEEN).as_dataset(), zoo.subset(UNSEEN).as_dataset()


@pytest.fixture
def make_trainer(tmp_path, zoo, datasets):
    def make(model=None, seed=0, callbacks=None, model_kwargs=None, **kwargs):
        torch.manual_seed(seed)
        model = model or LoraGeneratorModel(
            LoraGeneratorConfig.from_zoo(zoo.subset(SEEN), **SIZES, **(model_kwargs or {}))
        )
        args = training_arguments(tmp_path, **kwargs)
        train, unseen = datasets
        return LoraGeneratorTrainer(model, args, train_dataset=train, eval_dataset=unseen, callbacks=callbacks)

    return make


def logged(trainer, *names):
    return [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def by_hand(model, dataset, args):
    """What evaluation should say, in one batch and with formulas of its own."""
    items = [dataset[i] for i in range(len(dataset))]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    with torch.no_grad():
        model.eval()
        output = model(**batch)
        generated = model(task_vector=batch["task_vector"]).lora_weights
    scale = model.zoo_normalizer.weight_scale.repeat_interleave(torch.tensor(model.zoo_normalizer.sizes))
    units = kl_per_unit(output.posterior_mean, output.posterior_logvar, output.prior_mean, output.prior_logvar)
    reconstruction = (((output.lora_weights - batch["lora_weights"]) / scale) ** 2).mean()
    return {
        "eval_loss": (reconstruction + args.kl_weight * units.clamp(min=args.free_bits).mean()).item(),
        "eval_reconstruction_loss": reconstruction.item(),
        "eval_generation_loss": (((generated - batch["lora_weights"]) / scale) ** 2).mean().item(),
        "eval_kl": units.sum(1).mean().item(),
        "eval_active_units": int((units.mean(0) > 0.01).sum()),
    }


@pytest.mark.parametrize("model_kwargs", [{}, {"prior": "standard"}, {"architecture": "conv1d"}])
def test_training_logs_a_loss_and_changes_every_parameter(make_trainer, model_kwargs):
    trainer = make_trainer(model_kwargs=model_kwargs, free_bits=0.0)
    before = weights(trainer)
    result = trainer.train()
    assert math.isfinite(result.training_loss)
    rows = logged(trainer, "loss", "reconstruction_loss", "kl", "active_units", "grad_norm", "learning_rate")
    assert len(rows) == 6
    assert all(math.isfinite(value) for row in rows for value in row)
    assert [name for name, after in weights(trainer).items() if torch.equal(before[name], after)] == []


def test_training_lowers_the_generation_loss(make_trainer, datasets):
    trainer = make_trainer(max_steps=80, learning_rate=3e-3)
    before = trainer.evaluate(datasets[0])["eval_generation_loss"]
    trainer.train()
    assert trainer.evaluate(datasets[0])["eval_generation_loss"] < 0.9 * before


@pytest.mark.parametrize("batch_size", [1, 7, 32, 100])
def test_evaluation_equals_a_computation_by_hand(make_trainer, datasets, batch_size):
    trainer = make_trainer(max_steps=10, per_device_eval_batch_size=batch_size, free_bits=0.03, kl_weight=0.2)
    trainer.train()
    for dataset in datasets:
        assert batch_size == 1 or len(dataset) % batch_size
        expected = by_hand(trainer.model, dataset, trainer.args)
        metrics = trainer.evaluate(dataset)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected["eval_reconstruction_loss"] != pytest.approx(expected["eval_generation_loss"], rel=1e-6)


def test_evaluation_during_training_is_logged_and_is_on_unseen_tasks(make_trainer, datasets):
    trainer = make_trainer(eval_strategy="steps", eval_steps=3)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in rows] == [3, 6]
    names = ("reconstruction_loss", "generation_loss", "kl", "active_units")
    assert all(f"eval_{name}" in row for row in rows for name in names)
    unseen, seen = (trainer.evaluate(dataset)["eval_generation_loss"] for dataset in reversed(datasets))
    assert rows[-1]["eval_generation_loss"] == pytest.approx(unseen, rel=1e-6)
    assert rows[-1]["eval_generation_loss"] != pytest.approx(seen, rel=1e-3)


def test_evaluation_does_not_leak_into_the_training_log(make_trainer):
    """Without a latent: the data loader of an evaluation moves the global random state, as in any Trainer."""
    runs = []
    for kwargs in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make_trainer(model_kwargs={"prior": "none"}, **kwargs)
        trainer.train()
        runs.append(logged(trainer, "loss", "reconstruction_loss", "kl", "active_units"))
    assert runs[0] == runs[1]


def test_each_log_is_the_mean_over_the_steps_since_the_last_one(make_trainer):
    runs = []
    for logging_steps in (1, 3):
        trainer = make_trainer(logging_steps=logging_steps)
        trainer.train()
        runs.append(torch.tensor(logged(trainer, "loss", "reconstruction_loss", "kl")))
    rows, means = runs
    torch.testing.assert_close(rows.unflatten(0, (2, 3)).mean(1), means, rtol=1e-4, atol=1e-5)


def test_metrics_carry_the_prefix_of_evaluation(make_trainer, datasets):
    trainer = make_trainer()
    assert "unseen_generation_loss" in trainer.evaluate(datasets[1], metric_key_prefix="unseen")
    assert "test_generation_loss" in trainer.predict(datasets[1]).metrics
    both = trainer.evaluate({"seen": datasets[0], "unseen": datasets[1]})
    alone = trainer.evaluate(datasets[0])
    assert both["eval_seen_generation_loss"] == pytest.approx(alone["eval_generation_loss"], rel=1e-6)
    assert both["eval_unseen_generation_loss"] != pytest.approx(alone["eval_generation_loss"], rel=1e-3)


@pytest.mark.parametrize("prior", ["none", "learned"])
def test_gradient_accumulation_changes_nothing(make_trainer, prior):
    """8 samples at once or 4 times 2: the same steps, with the same noise."""
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0.3,
            model_kwargs={"prior": prior}, kl_weight=1.0, free_bits=0.0,
        )  # fmt: skip
        before = weights(trainer)
        trainer.train()
        runs.append((weights(trainer), logged(trainer, "loss", "reconstruction_loss", "kl")))
    (one, log_one), (other, log_other) = runs
    assert max((one[name] - before[name]).abs().max() for name in one) > 1e-2
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(log_one), torch.tensor(log_other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("step", [3, 11])  # in the first epoch (9 steps) and in the second
def test_resuming_repeats_the_losses_exactly(make_trainer, tmp_path, step):
    full = make_trainer(max_steps=14, save_strategy="steps", save_steps=step, save_only_model=False)
    full.train()
    resumed = make_trainer(max_steps=14, seed=99)  # another initialization, which the checkpoint replaces
    torch.rand(7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    names = ("step", "loss", "reconstruction_loss", "kl", "active_units", "grad_norm", "learning_rate")
    rows = logged(full, *names)[step:]
    assert [row[0] for row in rows] == list(range(step + 1, 15))
    assert logged(resumed, *names)[step:] == rows
    one, other = weights(full), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.5, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1]), (0.0, [1] * 10), (1.0, [i / 10 for i in range(1, 11)])],
)
def test_kl_weight_rises_over_the_warmup(make_trainer, ratio, expected):
    trainer = make_trainer(max_steps=10, kl_warmup_ratio=ratio, kl_weight=50.0, free_bits=0.0, learning_rate=1e-4)
    trainer.train()
    risen = [(loss - mse) / (50.0 * kl / 16) for loss, mse, kl in logged(trainer, "loss", "reconstruction_loss", "kl")]
    assert risen == pytest.approx(expected, rel=2e-2)


def test_evaluation_uses_the_full_kl_weight_during_the_warmup(make_trainer, datasets):
    trainer = make_trainer(kl_warmup_ratio=1.0, kl_weight=50.0, eval_strategy="steps", eval_steps=1)
    rows = []

    class Check(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            rows.append((metrics["eval_loss"], by_hand(model, datasets[1], args)["eval_loss"]))

    trainer.add_callback(Check())
    trainer.train()
    assert len(rows) == 6
    assert [row[0] for row in rows] == pytest.approx([row[1] for row in rows], rel=1e-4)


def test_free_bits_cost_nothing_and_pull_nothing(make_trainer):
    """Below its free bits a unit adds a constant to the loss, and no gradient."""
    runs = {}
    for free_bits, kl_weight in ((100.0, 0.5), (0.0, 0.5), (0.0, 0.0)):
        trainer = make_trainer(free_bits=free_bits, kl_weight=kl_weight, optim="sgd", learning_rate=0.1)
        trainer.train()
        runs[free_bits, kl_weight] = weights(trainer)
        if free_bits:
            metrics = trainer.evaluate()
            assert metrics["eval_loss"] == pytest.approx(metrics["eval_reconstruction_loss"] + 50.0, rel=1e-5)
    free, bound, without = runs.values()
    assert all(torch.equal(free[name], without[name]) for name in free)
    assert not all(torch.equal(bound[name], without[name]) for name in bound)


@pytest.mark.parametrize("logging_steps", [1, 500])  # 500 is the default: more than all steps of a short run
def test_loss_that_is_not_finite_is_an_error(make_trainer, logging_steps):
    trainer = make_trainer(logging_steps=logging_steps)
    with torch.no_grad():
        trainer.model.network.latent_proj.bias[0] = float("nan")
    with pytest.raises(IcmLoraError, match="loss became nan by step .*learning rate"):
        trainer.train()


def test_best_model_can_be_chosen_by_its_generation_loss(make_trainer):
    trainer = make_trainer(
        max_steps=9, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, learning_rate=3e-2,
        load_best_model_at_end=True, metric_for_best_model="eval_generation_loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    losses = [row["eval_generation_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_generation_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert len(set(losses)) == 3


def test_normalizer_is_fitted_on_the_training_split_only(make_trainer, zoo, datasets):
    trainer = make_trainer()
    alone = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo.subset(SEEN), **SIZES))
    alone.fit_normalizer(datasets[0])
    everything = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo, **SIZES))
    everything.fit_normalizer(zoo.as_dataset())
    for name, buffer in trainer.model.zoo_normalizer.named_buffers():
        assert torch.equal(buffer, alone.zoo_normalizer.get_buffer(name))
    assert not torch.allclose(trainer.model.zoo_normalizer.weight_mean, everything.zoo_normalizer.weight_mean)


def test_fitted_normalizer_is_kept(make_trainer, zoo):
    model = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo.subset(SEEN), **SIZES))
    model.fit_normalizer(zoo.as_dataset())
    before = model.zoo_normalizer.weight_mean.clone()
    assert torch.equal(make_trainer(model).model.zoo_normalizer.weight_mean, before)


def test_checkpoints_hold_no_pickled_datasets(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "README.md", "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json",
    }  # fmt: skip
    for path in files:
        content = path.read_bytes()
        assert b"Dataset" not in content
        assert path.suffix in (".json", ".md") or b"task_vectors" not in content


def test_saved_model_generates_as_the_trained_one(make_trainer, tmp_path, datasets):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    again = LoraGeneratorModel.from_pretrained(tmp_path / "out")
    vector = datasets[1][0]["task_vector"]
    torch.testing.assert_close(again.decode_task_vector(vector), trainer.model.decode_task_vector(vector))


def test_model_without_a_latent_trains(make_trainer):
    trainer = make_trainer(model_kwargs={"prior": "none"}, max_steps=2)
    trainer.train()
    assert [row[0] for row in logged(trainer, "kl")] == [0, 0]
    metrics = trainer.evaluate()
    assert metrics["eval_active_units"] == 0
    assert metrics["eval_generation_loss"] == pytest.approx(metrics["eval_reconstruction_loss"], rel=1e-6)


def test_arguments_come_from_the_command_line(tmp_path):
    (args,) = HfArgumentParser(LoraGeneratorTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--kl_weight", "0.5", "--free_bits", "0", "--kl_warmup_ratio", "0.1",
         "--learning_rate", "2e-4", "--warmup_steps", "7", "--lr_scheduler_type", "linear"]
    )  # fmt: skip
    assert (args.kl_weight, args.free_bits, args.kl_warmup_ratio) == (0.5, 0.0, 0.1)
    assert (args.learning_rate, args.warmup_steps, args.lr_scheduler_type.value) == (2e-4, 7, "linear")
    (defaults,) = HfArgumentParser(LoraGeneratorTrainingArguments).parse_args_into_dataclasses([])
    assert (defaults.kl_weight, defaults.kl_warmup_ratio, defaults.free_bits) == (0.01, 0.2, 0.05)
    assert (defaults.learning_rate, defaults.lr_scheduler_type.value) == (1e-3, "cosine")
    assert defaults.logging_nan_inf_filter is False


def test_activation_checkpointing_is_refused(make_trainer):
    """A generator has few activations beside its weights."""
    with pytest.raises(ValueError, match="LoraGeneratorModel does not support activation checkpointing"):
        make_trainer(activation_checkpointing=True).train()


@pytest.mark.slow  # compiling takes half a minute
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_training_and_generation_give_the_same(make_trainer, datasets):
    plain, compiled = make_trainer(), make_trainer(torch_compile=True)
    for trainer in (plain, compiled):
        trainer.train()
    told = [torch.tensor(logged(trainer, "loss", "reconstruction_loss", "kl")) for trainer in (plain, compiled)]
    assert torch.allclose(*told, rtol=1e-4)
    vector = datasets[1][0]["task_vector"]
    expected = plain.model.decode_task_vector(vector)
    assert torch.allclose(torch.compile(plain.model.decode_task_vector)(vector), expected, atol=1e-6)


def test_training_in_bf16_learns_too(make_trainer):
    trainer = make_trainer(bf16=True, max_steps=30)
    trainer.train()
    losses = [loss for (loss,) in logged(trainer, "loss")]
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
