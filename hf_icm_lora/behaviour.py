"""Behaviour: adapters are judged by what the frozen base model does with them, in training and on a user's examples.

Weight error is not behaviour, and a zoo has dozens of tasks where samples exist for hundreds. This loss needs a task's
samples and not its LoRA: many tasks go through the base model in one forward pass, each row through its own adapter,
at about the time and memory of one LoRA fine-tuning step.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .base_model import frozen_base
from .completion import DEFAULT_TEMPLATE, IGNORED, CompletionCollator, score_completions
from .errors import TaskError
from .layout import LoraLayout
from .reading import longest_reading
from .tasks import to_samples

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of B @ A; a stronger adapter than the generated one gained nothing


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


class ExampleLoss:
    """The base model's loss on a task's examples, as a function of the adapter.

    The examples are tokenized once, and all adapters of a call go through the base model together. An adapter that a
    generator wrote was not fitted to the examples that its task vector came from: its loss on them tells what it is
    worth on others. Of a refined one it says little.

    Args:
        base_model (`PreTrainedModel` or `PeftModel`): The base. Its adapters, if any, are off meanwhile.
        processing_class: Its tokenizer.
        layout (`LoraLayout`): Of the adapters.
        shared_weights (`torch.Tensor` of shape `(num_shared_weights,)`): What all adapters share.
        examples (`Sequence`): Samples in any form that [`Task`] takes.
        template (`str`, *optional*): Text with `{prompt}` and `{completion}`, or `"chat"`.

    Raises:
        TaskError: if there is no example, one is no sample, or the template is none.

    Example:
        >>> example_loss = ExampleLoss(base, tokenizer, zoo.layout, zoo.shared_weights, examples)  # doctest: +SKIP
        >>> example_loss(torch.stack([zoo.lora_weights(name) for name in zoo]))  # doctest: +SKIP
        tensor([1.5312, 2.0417])
        >>> example_loss.at_scales(zoo.lora_weights("capital"))  # doctest: +SKIP
        {0.0: 2.9870, 0.25: 2.2201, 0.5: 1.8346, 0.75: 1.6113, 1.0: 1.5312}
    """

    most_labels = 4096  # of one pass: each scored token has logits over the whole vocabulary

    def __init__(
        self,
        base_model: nn.Module,
        processing_class,
        layout: LoraLayout,
        shared_weights: torch.Tensor,
        examples: Sequence,
        template: str = DEFAULT_TEMPLATE,
    ):
        samples = to_samples(examples)
        if not samples:
            raise TaskError("Expected at least one example to take a loss on, found none.")
        self.base_model, self.layout = base_model, layout
        device = next(base_model.parameters()).device
        self.shared_weights = shared_weights.to(device)
        is_encoder_decoder = cast(PreTrainedModel, base_model).config.is_encoder_decoder
        most = longest_reading(cast(PreTrainedModel, base_model), processing_class)
        collate = CompletionCollator(processing_class, is_encoder_decoder, template, max_length=most, row_length=64)
        self.batch = {name: tensor.to(device) for name, tensor in collate(samples).items()}  # (rows, length) each

    @torch.no_grad()
    def __call__(self, lora_weights: torch.Tensor) -> torch.Tensor:
        """Return the loss per completion token under each adapter, in nats.

        Args:
            lora_weights (`torch.Tensor` of shape `(num_adapters, num_weights)`): On any device.

        Returns:
            `torch.Tensor` of shape `(num_adapters,)`, fp32, on the device of `lora_weights`.
        """
        num_labels = int((self.batch["labels"] != IGNORED).sum())
        losses = []
        with frozen_base(self.base_model) as base:
            for some in lora_weights.to(self.shared_weights.device).split(max(1, self.most_labels // num_labels)):
                batch = {name: tensor.repeat(len(some), 1) for name, tensor in self.batch.items()}
                losses.append(behavioural_loss(base, self.layout, some, self.shared_weights, batch))
        return torch.cat(losses).to(lora_weights.device)

    def at_scales(self, lora_weights: torch.Tensor, scales: Sequence[float] = SCALES) -> dict[float, float]:
        """Return the loss of an adapter `(num_weights,)` with its B @ A multiplied by each scale; 0 is the base alone.

        Where a generator is wrong, it is wrong at full strength.
        """
        losses = self(torch.stack([self.layout.scaled(lora_weights, scale) for scale in scales]))
        return dict(zip(scales, losses.tolist(), strict=True))

    def gain(self, lora_weights: torch.Tensor) -> float:
        """Return which part of the base model's loss an adapter `(num_weights,)` takes away.

        1 if nothing is left of it, 0 if the adapter changes nothing, below 0 if it does harm.
        """
        losses = self.at_scales(lora_weights, (0.0, 1.0))
        return 1 - losses[1.0] / losses[0.0]

    def refine(self, lora_weights: torch.Tensor, num_steps: int, learning_rate: float = 3e-3) -> torch.Tensor:
        """Go on from an adapter with ordinary gradient steps (Adam, linear decay), each on all examples.

        Args:
            lora_weights (`torch.Tensor` of shape `(num_weights,)`): Where to start.
            num_steps (`int`): Steps.
            learning_rate (`float`, *optional*, defaults to 3e-3): At the first step; it falls to zero.

        Returns:
            `torch.Tensor` of shape `(num_weights,)`, fp32, on the device of `lora_weights`.
        """
        weights = lora_weights.detach().to(self.shared_weights.device, torch.float32, copy=True).requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=learning_rate)
        steps = tqdm(range(num_steps), desc="Refining", disable=not logging.is_progress_bar_enabled())
        with frozen_base(self.base_model) as base, torch.enable_grad():
            base.requires_grad_(False)
            for step in steps:
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
                loss = behavioural_loss(base, self.layout, weights[None], self.shared_weights, self.batch).sum()
                (weights.grad,) = torch.autograd.grad(loss, weights)
                optimizer.step()
        return weights.detach().to(lora_weights.device)
