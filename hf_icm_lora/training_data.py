"""Training data: a zoo's adapters, or samples of tasks, each with vectors of its task; the batches of both."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from .completion import CompletionCollator
from .errors import ArgumentError, TaskError, TaskVectorError, ZooError
from .files import sha256_of
from .layout import LoraLayout
from .task_vectors import MODES, TaskVectors, joined
from .tasks import Sample, Task, check_unique_names


class Adapters(Protocol):
    """What a dataset asks of a [`LoraZoo`], or of anything else that has adapters of tasks."""

    layout: LoraLayout

    @property
    def records(self) -> Mapping[str, Mapping[str, Any]]:
        """Task -> its "snapshots", which are training steps, and "best_step"."""

    @property
    def shared_weights(self) -> torch.Tensor:
        """What all adapters share, `(num_shared_weights,)`."""

    @property
    def task_vectors(self) -> TaskVectors:
        """The tasks' vectors."""

    def lora_weights(self, name: str, step: int | None = None) -> torch.Tensor:
        """One snapshot, `(num_weights,)`."""


class LoraZooDataset(Dataset):
    """All pairs of a snapshot and one of its task's vectors.

    Each epoch shows every adapter with every draw of demonstrations: what the generator can learn is the map from
    evidence to weights, and not one vector per task. A description, which has one vector, is repeated so that every
    mode counts alike.

    Adapters of up to 1 GiB in all are kept in memory; more are read from disk, item by item.

    Args:
        zoo (`LoraZoo`): With task vectors.
        modes (`Sequence[str]`), num_snapshots (`int`, *optional*): As in [`LoraZoo.as_dataset`].

    Items: `{"lora_weights": (num_weights,), "task_vector": (num_task_vectors, task_vector_size)}`, fp32. The attribute
    `task_names` says whose they are.

    Raises:
        ArgumentError: if there is no such mode, or no snapshot is asked for.
        ZooError: if there is no task.
        TaskVectorError: if a task has no vectors.
    """

    most_in_memory = 2**30  # bytes

    def __init__(self, zoo: Adapters, modes: Sequence[str], num_snapshots: int | None):
        if unknown := sorted(set(modes) - set(MODES)):
            raise ArgumentError(f"Expected modes among {MODES}, found {unknown}.")
        if num_snapshots is not None and num_snapshots < 1:
            raise ArgumentError(f"Expected num_snapshots >= 1, or None for all; found {num_snapshots}.")
        if not zoo.records:
            raise ZooError(f"{zoo}: no tasks to make a dataset of.")
        self.task_names = list(zoo.records)
        task_vectors = zoo.task_vectors
        self.zoo, self.shared_weights = zoo, zoo.shared_weights
        self.snapshots: list[tuple[str, int]] = []
        vectors, pairs, first = [], [], 0
        for name, record in zoo.records.items():
            steps = sorted(step for step in record["snapshots"] if step <= record["best_step"])
            vectors.append(_draws(task_vectors, name, modes))
            for step in steps[-num_snapshots:] if num_snapshots is not None else steps:
                pairs += [(len(self.snapshots), first + draw) for draw in range(len(vectors[-1]))]
                self.snapshots.append((name, step))
            first += len(vectors[-1])
        self.lora_weights = None  # or (snapshots, num_weights)
        if 4 * len(self.snapshots) * zoo.layout.num_weights <= self.most_in_memory:
            self.lora_weights = torch.stack([zoo.lora_weights(*snapshot) for snapshot in self.snapshots])
        self.task_vectors = torch.cat(vectors)  # (draws of all tasks, num_task_vectors, task_vector_size)
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        snapshot, draw = self.pairs[index]
        return {"lora_weights": self._weights(snapshot), "task_vector": self.task_vectors[draw]}

    def each_adapter(self) -> Iterator[torch.Tensor]:
        """Yield every adapter once, `(num_weights,)`, whatever the number of its task's vectors."""
        yield from map(self._weights, range(len(self.snapshots)))

    def _weights(self, snapshot: int) -> torch.Tensor:
        if self.lora_weights is not None:
            return self.lora_weights[snapshot]
        return self.zoo.lora_weights(*self.snapshots[snapshot])


class BehaviouralDataset(Dataset):
    """Task vectors, each with some of its task's training samples; one epoch shows all vectors and all samples.

    Args:
        tasks (`Sequence[Task]`): Tasks with `train` samples; no LoRA is needed.
        task_vectors (`TaskVectors`): With a bank for each of them.
        num_samples (`int`, *optional*, defaults to 8): Samples that go with a vector.
        modes (`Sequence[str]`, *optional*): As in [`LoraZoo.as_dataset`].

    Items: `{"task_vector": (num_task_vectors, task_vector_size), "samples": tuple of Sample}`. The attribute
    `task_names` says whose they are.

    Raises:
        TaskError: if there is no task, one has fewer than `num_samples` `train` samples, or a name stands twice.
        TaskVectorError: if a task has no vectors.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        task_vectors: TaskVectors,
        num_samples: int = 8,
        modes: Sequence[str] = MODES,
    ):
        self.tasks = check_unique_names(tasks)
        self.task_names = [task.name for task in self.tasks]
        if not self.tasks or num_samples < 1:
            raise TaskError(f"Expected at least one task and one sample, found {len(self.tasks)} and {num_samples}.")
        self.items: list[tuple[int, tuple[Sample, ...]]] = []
        vectors: list[torch.Tensor] = []
        for task in self.tasks:
            task.require("train", num_samples, "behavioural training")
            draws = _draws(task_vectors, task.name, modes)
            first = sum(map(len, vectors))
            vectors.append(draws)
            rng = torch.Generator().manual_seed(int(sha256_of(task.name)[:12], 16))
            shuffled = cycle(task.train[i] for i in torch.randperm(len(task.train), generator=rng))
            for index in range(max(len(draws), -(-len(task.train) // num_samples))):
                self.items.append((first + index % len(draws), tuple(islice(shuffled, num_samples))))
        self.task_vectors = torch.cat(vectors)  # (draws of all tasks, num_task_vectors, task_vector_size)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        draw, samples = self.items[index]
        return {"task_vector": self.task_vectors[draw], "samples": samples}


class BehaviouralCollator:
    """Collate items of a [`BehaviouralDataset`]: one adapter per item, an equal number of adjacent rows for each.

    Args:
        collate_samples (`CompletionCollator`): Turns samples into `input_ids`, `attention_mask` and `labels`. With its
            `row_length`, each item has one row, with as many of its samples as fit: all tasks then have about as many
            tokens in the loss, with little padding.
    """

    def __init__(self, collate_samples: CompletionCollator):
        self.collate_samples = collate_samples

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        collate = self.collate_samples
        if collate.row_length is None:
            batch = collate([sample for item in items for sample in item["samples"]])
        else:
            batch = collate.collate_rows([next(collate.fill_rows(item["samples"])) for item in items])
        return {"task_vector": torch.stack([item["task_vector"] for item in items]), **batch}


def _draws(task_vectors: TaskVectors, name: str, modes: Sequence[str]) -> torch.Tensor:
    """Return all vectors of a task, `(num_draws, num_task_vectors, task_vector_size)`, every mode as often."""
    banks = task_vectors.banks.get(name, {})
    known = [banks[mode] for mode in modes if mode in banks]
    if not known:
        raise TaskVectorError(f"Task {name!r} has no task vectors of the modes {tuple(modes)}.")
    return joined(known)
