"""What the benchmarks share: SmolLM2-135M and the suite, how an adapter is scored, how arms are run, and their files.

Scripts in this folder import it as `bench`, those above it as `suite.bench`.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import (
    CompletionCollator,
    LoraGeneratorModel,
    LoraZoo,
    TaskVectorExtractor,
    TaskVectorSpec,
    built_in_tasks,
    fast_dtype,
    recovered_gain,
    smollm2_path,
)
from hf_icm_lora.behaviour import ExampleLoss, behavioural_loss
from hf_icm_lora.files import write_json
from hf_icm_lora.provenance import run_metadata

Options = TypeVar("Options")
Arm = TypeVar("Arm")

# Which task of the suite is for what: see `split.py`.
SPLITS: dict[str, list[str]] = json.loads((Path(__file__).parent / "splits.json").read_text(encoding="utf-8"))
GENERATOR = "build/suite/generator/int8"  # where train.py leaves it
PER_FAMILY = 12  # tasks with a LoRA of a family that no training touches
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
FINE_TUNING = {"max_steps": 48, "eval_steps": 12, "per_device_train_batch_size": 8}  # of a task's LoRA
SPEC = TaskVectorSpec(num_draws=3, layers=(14, 22, 30))
SUMMARIES: dict[str, Callable] = {"mean": statistics.mean, "median": statistics.median, "min": min}


def with_lora(split: str) -> list[str]:
    """Return the tasks of a split that get a LoRA, in an order that takes from all families alike."""
    families: dict[str, list[str]] = {}
    for name in SPLITS[split]:
        families.setdefault(name.split("/")[0], []).append(name)
    if split.endswith("family"):
        families = {family: names[:PER_FAMILY] for family, names in families.items()}
    ranked = [(rank, family, name) for family, names in families.items() for rank, name in enumerate(names)]
    return [name for *_, name in sorted(ranked)]


def options_of(kind: type[Options]) -> Options:
    """Read the options of a script, a dataclass, from its command line."""
    (options,) = HfArgumentParser(kind).parse_args_into_dataclasses()
    return options


def load_base(dtype: torch.dtype | None = None) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=dtype or fast_dtype())


def load_tokenizer():
    return AutoTokenizer.from_pretrained(smollm2_path())


class Bench:
    """The base model with its tokenizer, the suite, and what a benchmark asks for of a zoo and a generator.

    Args:
        zoo (`str`, *optional*): The folder of a zoo, whose LoRAs are the oracles.
        generator (`str`, *optional*): The folder of a generator; by default what `train.py` made.
        dtype (`torch.dtype`, *optional*): Of the base model; by default the fast one of the machine.
    """

    def __init__(self, zoo: str | None = None, generator: str | None = None, dtype: torch.dtype | None = None):
        self.base, self.tokenizer = load_base(dtype), load_tokenizer()
        self.suite = {task.name: task for task in built_in_tasks()}
        self.zoo = LoraZoo(zoo) if zoo else None
        self.generator_path = Path(generator or GENERATOR)
        self.known_bounds: dict[str, tuple[float, float]] = {}

    @cached_property
    def generator(self) -> LoraGeneratorModel:
        return LoraGeneratorModel.from_pretrained(self.generator_path)

    @cached_property
    def extractor(self) -> TaskVectorExtractor:
        """Makes the task vectors that the generator reads."""
        return TaskVectorExtractor(TaskVectorSpec(**self.generator.config.task_vector_spec))

    def beside(self, zoo: LoraZoo) -> "Bench":
        """Return the same with another zoo."""
        other = copy.copy(self)
        other.zoo, other.known_bounds = zoo, {}
        return other

    def names(self, split: str) -> list[str]:
        """Return the tasks of a split whose LoRA is in the zoo."""
        return [name for name in with_lora(split) if name in self.zoo]

    def vector(self, examples=None, description: str | None = None) -> torch.Tensor:
        """Return the task vector of examples, of a description, or of both."""
        return self.extractor.vector(self.base, self.tokenizer, examples, description)

    def example_loss(self, examples) -> ExampleLoss:
        """Return what tells an adapter's loss on examples of a task, and refines it on them."""
        layout, shared = self.zoo.layout, self.zoo.shared_weights
        return ExampleLoss(self.base, self.tokenizer, layout, shared, examples, self.zoo.template)

    @torch.no_grad()
    def loss(self, lora_weights: torch.Tensor, name: str, batch: dict | None = None) -> float:
        """Return the loss of an adapter on a task's test samples, or on a batch of them that is made otherwise."""
        if batch is None:
            collate = CompletionCollator(self.tokenizer, template=self.zoo.template, row_length=64)
            batch = collate(self.suite[name].test)
        layout, shared = self.zoo.layout, self.zoo.shared_weights
        return behavioural_loss(self.base, layout, lora_weights[None], shared, batch).item()

    def bounds(self, name: str) -> tuple[float, float]:
        """Return the losses of the base model and of the zoo's own LoRA on a task."""
        if name not in self.known_bounds:
            no_adapter = torch.zeros(self.zoo.layout.num_weights)
            self.known_bounds[name] = self.loss(no_adapter, name), self.loss(self.zoo.lora_weights(name), name)
        return self.known_bounds[name]

    def gain(self, lora_weights: torch.Tensor, name: str, batch: dict | None = None) -> float | None:
        """Return the recovered gain of an adapter on a task; none where the LoRA gains nothing."""
        base_loss, task_lora_loss = self.bounds(name)
        return recovered_gain(base_loss, self.loss(lora_weights, name, batch), task_lora_loss)

    def gains(
        self, names: Collection[str], adapters: Callable[[str], Mapping[str, torch.Tensor]], label: str
    ) -> dict[str, dict[str, float]]:
        """Return row -> task -> recovered gain, where `adapters(task)` gives row -> adapter."""
        rows: dict[str, dict[str, float]] = {}
        for name in tqdm(names, desc=label):
            for row, lora_weights in adapters(name).items():
                gain = self.gain(lora_weights, name)
                if gain is not None:
                    rows.setdefault(row, {})[name] = gain
        return rows


def summary(gains: Iterable[float], *kinds: str) -> dict[str, float]:
    """Return figures over gains, such as `mean_recovered_gain`, by the names of `SUMMARIES`."""
    gains = list(gains)
    return {f"{kind}_recovered_gain": SUMMARIES[kind](gains) for kind in kinds}


def run_arms(
    output: str | Path, arms: Mapping[str, Arm], seeds: Iterable[int], run: Callable[[Arm, int], dict], about: dict
) -> dict[str, list[dict]]:
    """Run every arm once from every seed, and keep each run in a file as soon as it is finished.

    Args:
        output (`str` or `Path`): The file. Runs that it holds are not repeated.
        arms (`Mapping[str, Arm]`): Name -> what makes the arm, as `run` takes it.
        seeds (`Iterable[int]`): Each is run with all arms before the next.
        run (`Callable[[Arm, int], dict]`): Returns the figures of an arm and a seed.
        about (`dict`): What else the file tells.

    Returns:
        `dict[str, list[dict]]`: Arm -> the figures of its runs, each with its `seed`.
    """
    runs = kept(output, {}).get("arms", {})
    for seed in seeds:
        for name, arm in arms.items():
            own = runs.setdefault(name, [])
            if all(other["seed"] != seed for other in own):
                own.append({"seed": seed, **run(arm, seed)})
                write(output, {**about, "arms": runs})
    return runs


def kept(path: str | Path, otherwise: dict[str, Any]) -> dict[str, Any]:
    """Return the report that an earlier call has written."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else otherwise


def write(path: str | Path, report: Mapping[str, Any], seed: int = 0) -> None:
    """Write a report, headed by the command, the versions and the machine of this call."""
    metadata = run_metadata(seed)
    write_json(path, {**metadata, **report, **metadata})


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
