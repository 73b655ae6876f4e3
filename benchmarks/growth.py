"""How time and memory grow, each point in a process of its own; `run.py` runs and keeps it.

    tasks    zoos of 10 to 10,000 tasks, the last one of 20 GiB: to open one, to fit the statistics, to train a step
    weights  adapters of 0.1 to 20 million numbers: a step of training, generation, size, break-even
    ranks    rank 1 to 64 of one base model: the same

The zoos hold one adapter many times, by hard links, under as many names: their size is apparent, the reading is real,
from the page cache. Vectors are random numbers. Exponents are slopes of log time against log size over the upper half
of each table.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.speed import RandomAdapters, in_own_process, peak_gib
from benchmarks.suite.bench import seconds
from hf_icm_lora import LoraGeneratorConfig, LoraGeneratorModel, LoraLayout, LoraZoo, TaskVectors, TaskVectorSpec
from hf_icm_lora.files import safe_dirname
from hf_icm_lora.layout import PREFIX, LoraModule
from hf_icm_lora.report import stored_bytes

WORK = Path("build/growth")
TASKS_BATCH_SIZE, BATCH_SIZE, STEPS = 16, 4, 5
SIZES = {"hidden_size": 128, "intermediate_size": 256, "condition_size": 64}


def layout_of(num_layers: int, width: int, rank: int) -> LoraLayout:
    names = (f"model.layers.{i}.self_attn.{name}" for i in range(num_layers) for name in ("q_proj", "v_proj"))
    return LoraLayout(tuple(LoraModule(name, width, width, rank) for name in names), "frozen_a")


def config_of(layout: LoraLayout, rank: int) -> LoraGeneratorConfig:
    lora_config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"]}
    spec = TaskVectorSpec().to_dict()
    return LoraGeneratorConfig(
        layout=layout.to_dict(), lora_config=lora_config, task_vector_spec=spec, num_task_vectors=2, **SIZES
    )


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
    generate = min(seconds(lambda: model.decode_task_vector(dataset.task_vectors[0])) for _ in range(5))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shipped = stored_bytes(model.without_encoder().to_int8())["generator_bytes"]
    # What N tasks take otherwise: each its own numbers, in fp16 or in 4 bits, or N / 2 components for all.
    fp16 = 2 * layout.num_weights
    return {
        "size": layout.num_weights,
        "parameters": parameters,
        "mb_in_8_bits": shipped / 1e6,
        "step": step,
        "generate": generate,
        "break_even_fp16": math.ceil(shipped / fp16),
        "break_even_4_bits": math.ceil(4 * shipped / fp16),
        "break_even_joint_svd": math.ceil(2 * shipped / fp16),
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
    before = peak_gib()
    start = time.perf_counter()
    dataset = zoo.as_dataset()
    indexed = time.perf_counter() - start
    model = LoraGeneratorModel(config_of(layout, 8))
    statistics = seconds(lambda: model.fit_normalizer(dataset))
    order = iter(torch.randint(len(dataset), (TASKS_BATCH_SIZE * (STEPS + 1),), generator=rng).tolist())

    def batch() -> dict:
        items = [dataset[next(order)] for _ in range(TASKS_BATCH_SIZE)]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    step = trained(model, batch)
    apparent = num_tasks * (first / "step-1" / "adapter_model.safetensors").stat().st_size
    shutil.rmtree(path)
    return {
        "size": num_tasks, "apparent_gib": apparent / 2**30, "open": opened, "dataset": indexed,
        "statistics": statistics, "step": step,
        "gib_more": peak_gib() - before,
    }  # fmt: skip


def exponent(rows: list[dict], what: str) -> float:
    upper = rows[len(rows) // 2 - 1 :] if len(rows) > 2 else rows
    first, last = upper[0], upper[-1]
    return math.log(last[what] / first[what]) / math.log(last["size"] / first["size"])


def growth(tasks: list[int], millions: list[float], ranks: list[int]) -> dict:
    WORK.mkdir(parents=True, exist_ok=True)
    tables = {
        "tasks": [in_own_process(of_tasks, count) for count in tasks],
        # 60 matrices of rank 8: the width follows from the number of weights.
        "weights": [in_own_process(of_size, 30, round(1e6 * count / 480), 8) for count in millions],
        "ranks": [in_own_process(of_size, 30, 576, rank) for rank in ranks],
    }
    exponents = {
        name: {what: exponent(rows, what) for what in rows[0] if what in ("open", "statistics", "step", "generate")}
        for name, rows in tables.items()
    }
    return {
        "batch_size": {"tasks": TASKS_BATCH_SIZE, "weights": BATCH_SIZE, "ranks": BATCH_SIZE},
        "tables": tables,
        "exponents": exponents,
    }
