"""Behavioural training: generated weights are judged by what the frozen base model does with them.

Weight error is not behaviour, and a zoo has dozens of tasks where samples exist for hundreds. This loss needs a task's
samples and not its LoRA: many tasks go through the base model in one forward pass, each row through its own adapter,
at about the time and memory of one LoRA fine-tuning step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm
from transformers.utils import logging

from .completion import CompletionCollator, labelled_logits, score_completions
from .errors import TaskError, TaskVectorError
from .files import sha256_of
from .layout import LoraLayout
from .task_vectors import MODES, TaskVectors, joined
from .tasks import Sample, Task, check_unique_names


class BehaviouralDataset(Dataset):
    """Task vectors, each with some of its task's training samples; one epoch shows all vectors and all samples.

    Args:
        tasks (`Sequence[Task]`): Tasks with `train` samples; no LoRA is needed.
        task_vectors (`TaskVectors`): With a bank for each of them.
        num_samples (`int`, *optional*, defaults to 4): Samples that go with a vector.
        modes (`Sequence[str]`, *optional*): As in [`LoraZoo.as_dataset`].
        beside (`Dataset`, *optional*): As from [`LoraZoo.as_dataset`]: one of its items goes with each vector, so that
            reconstruction is trained in the same steps and not forgotten.
        teachers (`Mapping[str, torch.Tensor]`, *optional*): The LoRA of each task, `(num_weights,)` each, as from
            [`LoraZoo.lora_weights`]. What the base model predicts with it is then the target, instead of the labels.

    Items: `{"task_vector": (num_task_vectors, task_vector_size), "samples": tuple of Sample}`, and `"beside"`,
    `"teacher"`. The attribute `task_names` says whose they are.

    Raises:
        TaskError: if there is no task, one has fewer than `num_samples` `train` samples, or a name stands twice.
        TaskVectorError: if a task has no vectors.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        task_vectors: TaskVectors,
        num_samples: int = 4,
        modes: Sequence[str] = MODES,
        beside: Dataset | None = None,
        teachers: Mapping[str, torch.Tensor] | None = None,
    ):
        self.tasks = check_unique_names(tasks)
        self.task_names = [task.name for task in self.tasks]
        if not self.tasks or num_samples < 1:
            raise TaskError(f"Expected at least one task and one sample, found {len(self.tasks)} and {num_samples}.")
        self.beside, self.teachers = beside, teachers
        self.items: list[tuple[str, int, tuple[Sample, ...]]] = []
        vectors: list[torch.Tensor] = []
        for task in self.tasks:
            task.require("train", num_samples, "behavioural training")
            if teachers is not None and task.name not in teachers:
                raise TaskError(f"Task {task.name!r} has no LoRA among the teachers.")
            banks = task_vectors.banks.get(task.name, {})
            bank = [banks[mode] for mode in modes if mode in banks]
            if not bank:
                raise TaskVectorError(f"Task {task.name!r} has no task vectors of the modes {tuple(modes)}.")
            draws = joined(bank)
            first = sum(map(len, vectors))
            vectors.append(draws)
            rng = torch.Generator().manual_seed(int(sha256_of(task.name)[:12], 16))
            shuffled = cycle(task.train[i] for i in torch.randperm(len(task.train), generator=rng))
            for index in range(max(len(draws), -(-len(task.train) // num_samples))):
                self.items.append((task.name, first + index % len(draws), tuple(islice(shuffled, num_samples))))
        self.task_vectors = torch.cat(vectors)  # (draws of all tasks, num_task_vectors, task_vector_size)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        name, draw, samples = self.items[index]
        item = {"task_vector": self.task_vectors[draw], "samples": samples}
        if self.beside is not None:
            item["beside"] = self.beside[int(sha256_of(str(index))[:12], 16) % len(self.beside)]
        if self.teachers is not None:
            item["teacher"] = self.teachers[name]
        return item


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
        batch = {"task_vector": torch.stack([item["task_vector"] for item in items]), **batch}
        if "beside" in items[0]:
            batch["beside"] = default_collate([item["beside"] for item in items])
        if "teacher" in items[0]:
            batch["teacher"] = torch.stack([item["teacher"] for item in items])
        return batch


@contextmanager
def batched_lora(
    base_model: nn.Module, layout: LoraLayout, lora_weights: torch.Tensor, shared_weights: torch.Tensor
) -> Iterator[None]:
    """Within this context the rows of a batch go through several adapters, an equal share of adjacent rows each.

    Args:
        base_model (`PreTrainedModel`): The base, without adapters; it is not copied.
        layout (`LoraLayout`): Of the adapters.
        lora_weights (`torch.Tensor` of shape `(num_adapters, num_weights)`): Gradients flow back to it.
        shared_weights (`torch.Tensor` of shape `(num_shared_weights,)`).
    """

    def hook_for(lora_a: torch.Tensor, lora_b: torch.Tensor):
        def add_lora(_module, inputs, output):
            rows = inputs[0].unflatten(0, (len(lora_b), -1)).flatten(1, -2)  # (num_adapters, rows * length, in)
            inner = rows @ lora_a.to(rows.dtype).mT
            return output + (inner @ lora_b.to(rows.dtype)).reshape(output.shape)

        return add_lora

    with ExitStack() as stack:
        for name, pair in layout.factors(lora_weights, shared_weights).items():
            hook = hook_for(*pair)
            stack.callback(base_model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def behavioural_loss(
    base_model: nn.Module,
    layout: LoraLayout,
    lora_weights: torch.Tensor,
    shared_weights: torch.Tensor,
    batch: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Return the base model's loss per completion token under each adapter, in nats.

    Args:
        base_model, layout, lora_weights, shared_weights: As in [`batched_lora`].
        batch (`dict[str, torch.Tensor]`): As from [`CompletionCollator`], `(num_adapters * num_samples, length)`.

    Returns:
        `torch.Tensor` of shape `(num_adapters,)`, fp32.
    """
    with batched_lora(base_model, layout, lora_weights, shared_weights):
        scores = score_completions(base_model, batch)
    per_adapter = [values.unflatten(0, (len(lora_weights), -1)).sum(1) for values in (scores.loss, scores.num_tokens)]
    return per_adapter[0] / per_adapter[1]


def distillation_loss(
    base_model: nn.Module,
    layout: LoraLayout,
    lora_weights: torch.Tensor,
    shared_weights: torch.Tensor,
    batch: dict[str, torch.Tensor],
    teachers: torch.Tensor,
) -> torch.Tensor:
    """Return KL(teacher || adapter) of the base model's predictions, per completion token, in nats.

    Args:
        base_model, layout, lora_weights, shared_weights, batch: As in [`behavioural_loss`].
        teachers (`torch.Tensor` of shape `(num_adapters, num_weights)`): The adapters to imitate.

    Returns:
        `torch.Tensor` of shape `(num_adapters,)`, fp32.
    """
    with torch.no_grad(), batched_lora(base_model, layout, teachers, shared_weights):
        target = labelled_logits(base_model, batch).logits.log_softmax(-1)
    with batched_lora(base_model, layout, lora_weights, shared_weights):
        logits, _, rows = labelled_logits(base_model, batch)
    losses = F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    adapters = rows // (len(batch["labels"]) // len(lora_weights))
    sums = losses.new_zeros(len(lora_weights)).index_add(0, adapters, losses)
    return sums / adapters.bincount(minlength=len(lora_weights))


def refine_lora_weights(
    base_model: nn.Module,
    layout: LoraLayout,
    lora_weights: torch.Tensor,
    shared_weights: torch.Tensor,
    batch: dict[str, torch.Tensor],
    num_steps: int,
    learning_rate: float,
) -> torch.Tensor:
    """Go on from an adapter with ordinary gradient steps (Adam, linear decay) on all samples of a batch.

    Args:
        base_model (`PreTrainedModel`): The base, frozen, its adapters off.
        layout (`LoraLayout`): Of the adapter.
        lora_weights (`torch.Tensor` of shape `(num_weights,)`): Where to start.
        shared_weights (`torch.Tensor` of shape `(num_shared_weights,)`): They stay as they are.
        batch (`dict[str, torch.Tensor]`): As from [`CompletionCollator`].
        num_steps (`int`): Steps, each on the whole batch.
        learning_rate (`float`): At the first step.

    Returns:
        `torch.Tensor` of shape `(num_weights,)`, fp32.
    """
    weights = lora_weights.detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    with torch.enable_grad():
        for _ in tqdm(range(num_steps), desc="Refining", disable=not logging.is_progress_bar_enabled()):
            loss = behavioural_loss(base_model, layout, weights[None], shared_weights, batch).sum()
            (weights.grad,) = torch.autograd.grad(loss, weights)
            optimizer.step()
            schedule.step()
    return weights.detach()
