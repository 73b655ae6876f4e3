"""One change at a time, three seeds: `python benchmarks/suite/ablate.py`, after `collect.py` and `train.py`.

Every arm is a call of `train_generator` and gets the same budget: steps on the LoRAs of 48 seen tasks, then steps
through the base model. It is scored on the validation tasks of `splits.json`, by mean recovered gain, and its seconds
are kept. Finished runs are kept in the output and not repeated, so an interrupted call goes on and `--arms` adds to
it. Calls side by side need an `--output` each: it names their work folder, too.

The output also keeps arms that no call of `train_generator` makes: two snapshots of each LoRA; 8 to 512 tasks in the
second stage with the LoRAs of 48 in the first; and one distilled from LoRAs, which is gone.

The arms with 24 LoRAs compare A shared with A trained; the second needs a zoo of its own:
`python benchmarks/suite/collect.py --train_a --zoo build/suite/zoo-train-a --splits seen --per_split 24`.
"""

import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from bench import SPLITS, Bench, options_of, run_arms, with_lora
from page import ablations
from train import SIZES

from hf_icm_lora import LoraZoo, RecipeArguments, TaskVectorExtractor, TaskVectors, recovered_gain, train_generator
from hf_icm_lora.task_vectors import MODES


@dataclass
class Arm:
    """What differs from the default."""

    config: dict = field(default_factory=dict)  # of the generator
    args: dict = field(default_factory=dict)  # of its training
    layers: tuple[int, ...] | None = None  # of the task vector, out of those that were extracted
    pooling: tuple[str, ...] | None = None
    modes: tuple[str, ...] = MODES
    draws: tuple[int | None, int | None] = (None, None)  # from, to; the first has most demonstrations, the last fewest
    num_loras: int = 48
    zoo: str | None = None  # beside the other arms' zoo: LoRAs of the same tasks, made in another way
    with_lora: bool = False  # the tasks alone that have a LoRA


ARMS = {
    "default": Arm(),
    "a token per rank component": Arm(config={"token_granularity": "rank"}),
    "width 128": Arm(config={"hidden_size": 128, "intermediate_size": 320}),
    "width 384": Arm(config={"hidden_size": 384, "intermediate_size": 960}),
    "1 decoder layer": Arm(config={"num_decoder_layers": 1}),
    "6 decoder layers": Arm(config={"num_decoder_layers": 6}),
    "basis of 16": Arm(config={"basis_size": 16}),
    "basis of 64": Arm(config={"basis_size": 64}),
    "condition of 64": Arm(config={"condition_size": 64}),
    "condition of 1024": Arm(config={"condition_size": 1024}),
    "latent of 8": Arm(config={"latent_size": 8}),
    "latent of 128": Arm(config={"latent_size": 128}),
    "prior N(0, I)": Arm(config={"prior": "standard"}),
    "no latent": Arm(config={"prior": "none"}),
    "layer 30 (last)": Arm(layers=(30,)),
    "layer 22": Arm(layers=(22,)),
    "layer 14": Arm(layers=(14,)),
    "prompts only": Arm(pooling=("prompts",)),
    "completions only": Arm(pooling=("completions",)),
    "demonstrations alone": Arm(modes=("demonstrations",)),
    "description alone": Arm(modes=("description",)),
    "one draw, 12 demonstrations": Arm(draws=(0, 1)),
    "one draw, 3 demonstrations": Arm(draws=(-1, None)),
    "loss on B @ A": Arm(config={"reconstruction": "products"}),
    "in bf16": Arm(args={"bf16": True}),
    "2 LoRAs": Arm(num_loras=2),
    "24 LoRAs": Arm(num_loras=24),
    "24 LoRAs, A trained": Arm(num_loras=24, zoo="zoo-train-a"),
    "tasks with a LoRA, labels": Arm(with_lora=True),
    "LoRAs alone": Arm(args={"max_steps": 0}),
    "LoRAs alone, the paper's network": Arm(config={"architecture": "conv1d"}, args={"max_steps": 0}),
}


@dataclass
class AblateOptions:
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Names of arms, by default all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    reconstruction_steps: int = field(default=100)
    behavioural_steps: int = field(default=50)
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py."})
    output: str = field(default="benchmarks/results/ablations.json", metadata={"help": "Where the figures go."})


def rows_of(spec, arm: Arm) -> tuple[list[int], dict]:
    """Return which rows of a task vector an arm keeps, and what that changes in the specification."""
    layers, pooling = arm.layers or spec.layers, arm.pooling or spec.pooling
    rows = [
        p * len(spec.layers) + index
        for p, kind in enumerate(spec.pooling)
        for index, layer in enumerate(spec.layers)
        if layer in layers and kind in pooling
    ]
    return rows, {"layers": tuple(layers), "pooling": tuple(pooling)}


def narrowed(vectors: TaskVectors, arm: Arm) -> TaskVectors:
    rows, changes = rows_of(vectors.spec, arm)
    banks = {
        task: {mode: bank[slice(*arm.draws)][:, rows] for mode, bank in modes.items() if mode in arm.modes}
        for task, modes in vectors.banks.items()
    }
    return TaskVectors(replace(vectors.spec, **changes), vectors.base_model_fingerprint, banks)


class Ablation:
    """What all runs share: the bench, task vectors, and what the validation tasks' examples and descriptions give."""

    def __init__(self, options: AblateOptions, bench: Bench):
        self.options, self.bench = options, bench
        self.work = Path(options.zoo).with_name(Path(options.output).stem)
        self.vectors = self.bench.zoo.task_vectors  # as train.py left them
        extractor, base, tokenizer = TaskVectorExtractor(self.vectors.spec), self.bench.base, self.bench.tokenizer
        self.read = {}
        for name in SPLITS["validation"]:
            if name in self.bench.zoo:
                task = self.bench.suite[name]
                self.read[name] = {
                    "demonstrations": extractor.vector(base, tokenizer, task.demo[:12]),
                    "description": extractor.vector(base, tokenizer, description=task.description),
                }

    def run(self, arm: Arm, seed: int) -> dict:
        options, vectors = self.options, narrowed(self.vectors, arm)
        # Arms store their vectors in the zoo, so they get one of their own; files there are replaced, never changed.
        shutil.rmtree(self.work, ignore_errors=True)
        path = Path(options.zoo).with_name(arm.zoo) if arm.zoo else options.zoo
        shutil.copytree(path, self.work / "zoo", copy_function=os.link)
        seen = LoraZoo(self.work / "zoo").subset(with_lora("seen")[: arm.num_loras])
        seen.add_task_vectors(vectors)
        names = list(seen) if arm.with_lora else SPLITS["seen"] + SPLITS["samples"]
        args = {
            "output_dir": str(self.work / "generator"),
            "reconstruction_steps": options.reconstruction_steps,
            "max_steps": options.behavioural_steps,
            "learning_rate": 6e-3,
            "lr_scheduler_type": "cosine",
            "seed": seed,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": not torch.accelerator.is_available(),
        }
        start = time.perf_counter()
        generator = train_generator(
            seen,
            self.bench.base,
            self.bench.tokenizer,
            [self.bench.suite[name] for name in names],
            RecipeArguments(**args | arm.args),
            **SIZES[arm.config.get("architecture", "transformer")] | arm.config,
        )
        seconds = time.perf_counter() - start
        mode = "description" if arm.modes == ("description",) else "demonstrations"
        rows, _ = rows_of(self.vectors.spec, arm)
        bench = self.bench.beside(seen)
        losses = {
            name: bench.loss(generator.decode_task_vector(read[mode][:, rows]), name)
            for name, read in self.read.items()
        }
        gains = {}
        for name, loss in losses.items():
            base_loss, task_lora_loss = self.bench.bounds(name)
            gains[name] = recovered_gain(base_loss, loss, task_lora_loss)
        return {"seconds": round(seconds), "losses": losses, "recovered_gains": gains}


def main() -> None:
    options = options_of(AblateOptions)
    ablation = Ablation(options, Bench(options.zoo))
    about = {
        "reconstruction_steps": options.reconstruction_steps,
        "behavioural_steps": options.behavioural_steps,
        "num_loras": len(ablation.bench.zoo),
    }
    arms = {name: ARMS[name] for name in options.arms}
    print(ablations({"arms": run_arms(options.output, arms, options.seeds, ablation.run, about)}))


if __name__ == "__main__":
    main()
