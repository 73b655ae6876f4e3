"""The arms of benchmarks/suite/ablate.py and benchmarks/gauge.py: calls of `train_generator` that differ in a part."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tasks, make_zoo

from hf_icm_lora import LoraGeneratorConfig, LoraZoo, RecipeArguments, TaskVectorSpec

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.syspath_prepend(BENCHMARKS / "suite")
        import ablate
        import bench
        import gauge

        yield ablate, gauge, bench


@pytest.fixture(scope="module")
def tiny(scripts, tmp_path_factory, tokenizer):
    """A bench with a tiny base model, a zoo of two seen tasks and of one to validate on, and vectors of all three."""
    _, _, bench = scripts
    names = [*bench.with_lora("seen")[:2], bench.SPLITS["validation"][0]]
    tasks = [dataclasses.replace(task, name=name) for task, name in zip(make_tasks(3), names, strict=True)]

    class TinyBench(bench.Bench):
        def __init__(self):
            self.base, self.tokenizer = make_llama(), tokenizer
            self.suite, self.known_bounds = {task.name: task for task in tasks}, {}
            spec = TaskVectorSpec(num_demonstrations=4, num_draws=2, layers=(1, 2))
            self.zoo = make_zoo(tmp_path_factory.mktemp("arms"), self.base, tokenizer, tasks, spec=spec)

    return TinyBench()


@pytest.fixture
def ablation(scripts, tiny, tmp_path):
    ablate, *_ = scripts
    options = ablate.AblateOptions(
        zoo=str(tiny.zoo.path), output=str(tmp_path / "out.json"), reconstruction_steps=2, behavioural_steps=2
    )
    return ablate.Ablation(options, tiny)


def test_every_arm_is_made_of_arguments_that_there_are(scripts):
    ablate, *_ = scripts
    fields = {field.name for field in dataclasses.fields(RecipeArguments)}
    for arm in ablate.ARMS.values():
        LoraGeneratorConfig(**arm.config)
        assert arm.args.keys() <= fields
    assert len({repr(arm) for arm in ablate.ARMS.values()}) == len(ablate.ARMS)


def test_an_arm_is_trained_and_scored(scripts, ablation, tiny):
    ablate, *_ = scripts
    changes = {
        "default": {},
        "layer 2": {"layers": (2,)},
        "description": {"modes": ("description",)},
        "without the second stage": {"args": {"max_steps": 0}},
        "one LoRA of a zoo that is named": {"num_loras": 1, "zoo": tiny.zoo.path.name},
    }
    losses = {}
    for name, change in changes.items():
        arm = ablate.Arm(with_lora=True, **{"num_loras": 2} | change)
        figures = ablation.run(arm, seed=0)
        (validated,) = figures["losses"]
        assert -1 <= figures["recovered_gains"][validated] <= 1
        losses[name] = figures["losses"][validated]
        if name == "default":
            assert ablation.run(arm, seed=0)["losses"] == figures["losses"]
            assert ablation.run(arm, seed=1)["losses"] != figures["losses"]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert len(set(losses.values())) == len(losses)


def test_vectors_are_narrowed_to_what_an_arm_reads(scripts, tiny):
    ablate, *_ = scripts
    vectors = tiny.zoo.task_vectors
    narrowed = ablate.narrowed(vectors, ablate.Arm(layers=(2,), pooling=("completions",), modes=("demonstrations",)))
    assert (narrowed.spec.layers, narrowed.spec.pooling) == ((2,), ("completions",))
    for name, banks in narrowed.banks.items():
        assert list(banks) == ["demonstrations"]
        assert torch.equal(banks["demonstrations"], vectors.banks[name]["demonstrations"][:, 3:])
    first = ablate.narrowed(vectors, ablate.Arm(draws=(0, 1))).banks
    last = ablate.narrowed(vectors, ablate.Arm(draws=(-1, None))).banks
    for name, banks in vectors.banks.items():
        assert torch.equal(first[name]["both"], banks["both"][:1])
        assert torch.equal(last[name]["both"], banks["both"][-1:])


def test_an_arm_of_the_gauge_is_trained_on_adapters_alone(scripts, tiny, tmp_path, monkeypatch):
    _, gauge, _ = scripts
    monkeypatch.chdir(tmp_path)
    tasks = list(tiny.suite.values())[:2]
    made = [gauge.train(tiny, tasks, 2, 0, reconstruction=kind) for kind in ("weights", "products", "products")]
    for generator in made:
        assert [(run["trained_on"], run["steps"]) for run in generator.config.training_runs] == [("adapters", 2)]
        assert generator.config.training_tasks == [task.name for task in tasks]
    weights, products, again = (generator.decode_task_vector(torch.ones(4, 32)) for generator in made)
    assert torch.equal(products, again)
    assert not torch.equal(weights, products)
    assert LoraZoo(tiny.zoo.path).task_vectors.banks.keys() == tiny.suite.keys()
