"""How time and memory grow: `python benchmarks/growth.py`, each point in a process of its own.

    tasks    zoos of 10 to 12,000 tasks, the last one of 20 GiB: to open one, to fit the statistics, to train a step
    weights  adapters of 0.1 to 20 million numbers: a step of training, and generation
    ranks    rank 1 to 64 of one base model: the same

The zoos hold one adapter many times, by hard links, under as many names: their size is apparent, the reading is real,
from the page cache. Vectors are random numbers. Exponents are slopes of log time against log size over the upper half
of each table.
"""

import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from speed import RandomAdapters
from transformers import HfArgumentParser

from hf_icm_lora import LoraGeneratorConfig, LoraGeneratorModel, LoraLayout, LoraZoo, TaskVectors, TaskVectorSpec
from hf_icm_lora.files import safe_dirname, write_json
from hf_icm_lora.layout import PREFIX, LoraModule
from hf_icm_lora.model_card import run_metadata

sys.path.insert(0, str(Path(__file__).parent / "suite"))
from page import growth  # noqa: E402

WORK = Path("build/growth")
BATCH_SIZE, STEPS = 16, 5
SIZES = {"hidden_size": 128, "intermediate_size": 256, "condition_size": 64}


@dataclass
class GrowthOptions:
    tasks: list[int] = field(default_factory=lambda: [10, 100, 1000, 12000])
    weights: list[float] = field(default_factory=lambda: [0.1, 0.5, 2.5, 10, 20], metadata={"help": "In millions."})
    ranks: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    output: str = field(default="benchmarks/results/growth.json", metadata={"help": "Where the figures go."})


def layout_of(num_layers: int, width: int, rank: int) -> LoraLayout:
    names = (f"model.layers.{i}.self_attn.{name}" for i in range(num_layers) for name in ("q_proj", "v_proj"))
    return LoraLayout(tuple(LoraModule(name, width, width, rank) for name in names), "frozen_a")


def config_of(layout: LoraLayout, rank: int) -> LoraGeneratorConfig:
    lora_config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"]}
    spec = TaskVectorSpec().to_dict()
    return LoraGeneratorConfig(
        layout=layout.to_dict(), lora_config=lora_config, task_vector_spec=spec, num_task_vectors=2, **SIZES
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def trained(model: LoraGeneratorModel, batches: Callable[[], dict]) -> float:
    """Return the seconds of a step, reading its batch included; the first step is not counted."""
    optimizer, times = torch.optim.AdamW(model.train().parameters()), []

    def step() -> None:
        model(**batches()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(STEPS + 1):
        times.append(seconds(step))
    return sorted(times[1:])[STEPS // 2]


def of_size(num_layers: int, width: int, rank: int) -> dict:
    layout = layout_of(num_layers, width, rank)
    dataset, model = RandomAdapters(layout, BATCH_SIZE), LoraGeneratorModel(config_of(layout, rank))
    model.fit_normalizer(dataset)
    batch = {"lora_weights": dataset.lora_weights, "task_vector": dataset.task_vectors}
    step = trained(model, lambda: batch)
    model.decode_task_vector(dataset.task_vectors[0])
    return {
        "size": layout.num_weights,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step": step,
        "generate": min(seconds(lambda: model.decode_task_vector(dataset.task_vectors[0])) for _ in range(5)),
    }


def of_tasks(num_tasks: int) -> dict:
    path, layout = WORK / str(num_tasks), layout_of(30, 576, 8)
    shutil.rmtree(path, ignore_errors=True)
    zoo = LoraZoo.create(
        path, layout=layout, lora_config={"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        base_model_name_or_path="random", base_model_fingerprint="0" * 64, template="{prompt}{completion}",
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (8, 576), "lora_B": (576, 8)}
    zoo.add("task/0", {1: {f"{PREFIX}{module.name}.{factor}.weight": torch.randn(shape, generator=rng)
                           for module in layout.modules for factor, shape in shapes.items()}})  # fmt: skip
    first = zoo.task_folder("task/0")
    record = json.loads((first / "task.json").read_text(encoding="utf-8"))
    for index in range(1, num_tasks):
        folder = path / "adapters" / safe_dirname(f"task/{index}")
        (folder / "step-1").mkdir(parents=True)
        for file in (first / "step-1").iterdir():
            os.link(file, folder / "step-1" / file.name)
        (folder / "task.json").write_text(json.dumps(record | {"name": f"task/{index}"}), encoding="utf-8")
    names = [f"task/{index}" for index in range(num_tasks)]
    banks = {name: {"demonstrations": torch.randn(1, 2, 576, generator=rng)} for name in names}
    opened = seconds(lambda: LoraZoo(path))
    zoo = LoraZoo(path)
    zoo.add_task_vectors(TaskVectors(TaskVectorSpec(template="{prompt}{completion}"), "0" * 64, banks))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    dataset = zoo.as_dataset()
    indexed = time.perf_counter() - start
    model = LoraGeneratorModel(config_of(layout, 8))
    statistics = seconds(lambda: model.fit_normalizer(dataset))
    order = iter(torch.randint(len(dataset), (BATCH_SIZE * (STEPS + 1),), generator=rng).tolist())

    def batch() -> dict:
        items = [dataset[next(order)] for _ in range(BATCH_SIZE)]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    step = trained(model, batch)
    apparent = num_tasks * (first / "step-1" / "adapter_model.safetensors").stat().st_size
    shutil.rmtree(path)
    return {
        "size": num_tasks, "apparent_gib": apparent / 2**30, "open": opened, "dataset": indexed,
        "statistics": statistics, "step": step,
        "gib_more": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before,
    }  # fmt: skip


def in_own_process(function: Callable[..., dict], *arguments) -> dict:
    """Run a function where nothing is in memory yet."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def exponent(rows: list[dict], what: str) -> float:
    upper = rows[len(rows) // 2 - 1 :] if len(rows) > 2 else rows
    first, last = upper[0], upper[-1]
    return math.log(last[what] / first[what]) / math.log(last["size"] / first["size"])


def main() -> None:
    (options,) = HfArgumentParser(GrowthOptions).parse_args_into_dataclasses()
    WORK.mkdir(parents=True, exist_ok=True)
    tables = {
        "tasks": [in_own_process(of_tasks, count) for count in options.tasks],
        # 60 matrices of rank 8: the width follows from the number of weights.
        "weights": [in_own_process(of_size, 30, round(1e6 * millions / 480), 8) for millions in options.weights],
        "ranks": [in_own_process(of_size, 30, 576, rank) for rank in options.ranks],
    }
    exponents = {
        name: {what: exponent(rows, what) for what in rows[0] if what in ("open", "statistics", "step", "generate")}
        for name, rows in tables.items()
    }
    report = {**run_metadata(0), "batch_size": BATCH_SIZE, "tables": tables, "exponents": exponents}
    write_json(Path(options.output), report)
    print(growth(report))


if __name__ == "__main__":
    main()
