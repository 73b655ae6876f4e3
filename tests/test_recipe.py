"""train_generator: one call from a zoo and tasks to a generator, that keeps its promises about both stages."""

import dataclasses

import pytest
import torch
from conftest import copy_zoo, make_llama
from transformers import HfArgumentParser, TrainerCallback, set_seed

from hf_icm_lora import (
    BehaviouralDataset,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    RecipeArguments,
    TaskError,
    TaskVectorSpec,
    TrainingError,
    ZooError,
    train_generator,
)

SIZES = dict(hidden_size=32, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=1, latent_size=8)
QUIET = dict(use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, per_device_train_batch_size=4)


@pytest.fixture
def tasks(world):
    return world.tasks


@pytest.fixture
def zoo(world, tmp_path):
    """LoRAs of four of six tasks, without task vectors."""
    return copy_zoo(world.zoo, tmp_path / "zoo")


@pytest.fixture
def train(tmp_path, zoo, tokenizer, tasks):
    def train(tasks=tasks[:5], eval_tasks=(), base=None, callbacks=None, zoo=zoo, config=SIZES, **fields):
        args = RecipeArguments(str(tmp_path / "out"), **QUIET | {"max_steps": 3, "reconstruction_steps": 2} | fields)
        base = base or make_llama()
        return train_generator(zoo, base, tokenizer, tasks, args, eval_tasks=eval_tasks, callbacks=callbacks, **config)

    return train


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_generator_of_all_tasks_is_saved_with_its_history(train, tmp_path, tasks, zoo):
    generator = train(seed=3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "trainer_state.json", "checkpoint-3", "reconstruction"
    }  # fmt: skip
    assert equal(LoraGeneratorModel.from_pretrained(tmp_path / "out"), generator)
    config = generator.config
    assert sorted(config.training_tasks) == [task.name for task in tasks[:5]]
    assert not config.has_encoder
    assert [(run["trained_on"], run["steps"], run["learning_rate"]) for run in config.training_runs] == [
        ("adapters", 2, 2e-3), ("samples, through the base model", 3, 8e-3)
    ]  # fmt: skip
    spec = TaskVectorSpec(**config.task_vector_spec)
    assert spec == zoo.task_vectors.spec == TaskVectorSpec.for_base_model(make_llama(), template=zoo.template)
    assert sorted(zoo.task_vectors.banks) == [task.name for task in tasks[:5]]


def test_it_does_what_the_calls_that_it_stands_for_do(train, zoo, tasks, tokenizer, tmp_path):
    """The statistics are fitted on both kinds of data, and the second stage starts where the first one ended."""
    generator = train(seed=3)
    args = RecipeArguments(str(tmp_path / "again"), **QUIET, max_steps=3, reconstruction_steps=2, seed=3)
    seen = zoo.subset([task.name for task in tasks[:4]])
    adapters = seen.as_dataset(num_snapshots=1)
    behaviour = BehaviouralDataset(tasks[:5], zoo.task_vectors, num_samples=8)
    set_seed(3)
    again = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(seen, **SIZES))
    again.fit_normalizer(adapters, behaviour)
    LoraGeneratorTrainer(again, args.reconstruction(), train_dataset=adapters).train()
    again = again.without_encoder()
    LoraGeneratorTrainer(
        again, args, base_model=make_llama(), processing_class=tokenizer, train_dataset=behaviour
    ).train()
    assert equal(generator, again)


def test_unseen_tasks_are_evaluated_and_not_trained_on(train, tasks):
    steps = []

    class Note(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            steps.append((state.global_step, metrics["eval_behavioural_loss"]))

    generator = train(tasks[:3], eval_tasks=tasks[3:], eval_strategy="steps", eval_steps=2, callbacks=[Note()])
    assert sorted(generator.config.training_tasks) == [task.name for task in tasks[:3]]
    assert [step for step, _ in steps] == [2, 3, 3]  # the last one is of the generator that is handed out
    assert generator.config.training_runs[-1]["unseen_loss"] == steps[-1][1]
    with pytest.raises(TaskError, match="in train_dataset too"):
        train(tasks[:3], eval_tasks=tasks[2:4])


def test_vectors_of_a_zoo_are_used_and_those_that_it_lacks_made_alike(train, zoo, tasks):
    train(tasks[:4])
    before = (zoo.path / "task_vectors.safetensors").read_bytes()
    generator = train(tasks)
    assert (zoo.path / "task_vectors.safetensors").read_bytes() == before
    assert sorted(generator.config.training_tasks) == [task.name for task in tasks]


def test_a_run_goes_on_from_its_last_whole_checkpoint(train, tmp_path):
    whole = train(max_steps=4, save_steps=2)
    (tmp_path / "out" / "checkpoint-4" / "model.safetensors").unlink()
    (tmp_path / "out" / "reconstruction" / "trainer_state.json").unlink()
    assert equal(train(max_steps=4, save_steps=2, resume_from_checkpoint="True"), whole)
    assert not (tmp_path / "out" / "reconstruction" / "trainer_state.json").exists()  # the first stage is over
    folder = str(tmp_path / "out" / "checkpoint-2")
    again = train(max_steps=4, save_steps=2, resume_from_checkpoint=folder)
    assert equal(again, whole)
    assert [run["steps"] for run in again.config.training_runs] == [2, 4]


def test_the_second_stage_can_be_left_out(train):
    generator = train(max_steps=0)
    assert [run["trained_on"] for run in generator.config.training_runs] == ["adapters"]


def test_the_base_comes_back_as_it_was(train, tokenizer):
    base = make_llama().train()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    train(base=base)
    assert base.training
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_what_cannot_be_trained_is_said(train, tasks, zoo):
    with pytest.raises(ZooError, match="holds no LoRA of the 2 tasks"):
        train(tasks[4:])
    with pytest.raises(TrainingError, match="expected a whole checkpoint"):
        train(resume_from_checkpoint="True")


def test_arguments_come_from_the_command_line_and_are_the_measured_ones(tmp_path):
    (args,) = HfArgumentParser(RecipeArguments).parse_args_into_dataclasses([])
    assert (args.reconstruction_steps, args.max_steps, args.num_samples, args.row_length) == (300, 1600, 8, 48)
    assert (args.reconstruction_learning_rate, args.learning_rate) == (2e-3, 8e-3)
    assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("warmup_stable_decay", {"num_decay_steps": 800})
    assert args.per_device_train_batch_size == 16
    given = ["--max_steps", "10", "--output_dir", str(tmp_path), "--seed", "5", "--run_name", "mine",
             "--max_grad_norm", "0.5",
             "--eval_strategy", "steps", "--load_best_model_at_end", "True", "--push_to_hub", "True",
             ]  # fmt: skip
    (args,) = HfArgumentParser(RecipeArguments).parse_args_into_dataclasses(given)
    assert args.lr_scheduler_kwargs == {"num_decay_steps": 5}
    first = args.reconstruction()
    assert (first.max_steps, first.learning_rate, first.lr_scheduler_type.value) == (300, 2e-3, "cosine")
    assert (first.seed, first.max_grad_norm, first.run_name) == (5, 0.5, "mine-reconstruction")
    assert (first.push_to_hub, first.load_best_model_at_end, first.save_strategy.value) == (False, False, "no")
    assert first.output_dir == str(tmp_path / "reconstruction")
    args = dataclasses.replace(args, lr_scheduler_type="linear", lr_scheduler_kwargs=None)
    assert not args.lr_scheduler_kwargs


def test_layers_are_relative_to_the_depth_of_the_base():
    base = make_llama()
    for depth, layers in ((30, (14, 22, 30)), (2, (1, 2)), (1, (1,)), (12, (6, 9, 12))):
        base.config.num_hidden_layers = depth
        assert TaskVectorSpec.for_base_model(base).layers == layers
    assert TaskVectorSpec.for_base_model(base, layers=(3,), num_draws=2) == TaskVectorSpec(layers=(3,), num_draws=2)
