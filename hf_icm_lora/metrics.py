"""Figures of this package as metrics of the `evaluate` library.

    RecoveredGain        which part of fine-tuning's gain an adapter has
    BitsPerCharacter     and perplexity: the loss on text, in units that other models and papers can be compared in
    LoraReconstruction   how near LoRA weights are to those they should be

Each is a pure function, and around it a metric that gathers its inputs in batches and from several processes. The
folders under `metrics/` publish them; `evaluate.load` reads these without a network.
"""

import inspect
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import evaluate
import torch
import torch.nn.functional as F
from datasets import Features, Value
from datasets import Sequence as ListOf

from .errors import ArgumentError, IncompatibleAdapterError
from .layout import LoraLayout, split
from .report import recovered_gain

CITATION = """\
@inproceedings{shao2025incontext,
  title     = {In-Context Meta {LoRA} Generation},
  author    = {Shao, Yihua and others},
  booktitle = {Proceedings of the International Joint Conference on Artificial Intelligence (IJCAI)},
  year      = {2025},
  note      = {arXiv:2501.17635}
}"""


def bits_per_character(loss: float, num_characters: int) -> float:
    """Return how many bits a model needs for a character of the text that it was scored on.

    Args:
        loss (`float`): Negative log-likelihood of the text in nats, summed over its tokens.
        num_characters (`int`): Characters of the same text.

    Raises:
        ArgumentError: unless there is a character and the loss is from 0 to 700 nats for each.

    Example:
        >>> bits_per_character(loss=8 * math.log(2), num_characters=4)
        2.0
    """
    return _per_unit(loss, num_characters, "character") / math.log(2)


def perplexity(loss: float, num_tokens: int) -> float:
    """Return between how many equally probable tokens a model is, on average, undecided.

    Args:
        loss (`float`): Negative log-likelihood of the text in nats, summed over its tokens.
        num_tokens (`int`): Tokens that were scored.

    Raises:
        ArgumentError: unless there is a token and the loss is from 0 to 700 nats for each.

    Example:
        >>> round(perplexity(loss=3 * math.log(5), num_tokens=3), 6)
        5.0
    """
    return math.exp(_per_unit(loss, num_tokens, "token"))


def lora_reconstruction(
    predictions: torch.Tensor,
    references: torch.Tensor,
    *,
    center: torch.Tensor | None = None,
    layout: LoraLayout | None = None,
) -> dict[str, Any]:
    """Compare packed LoRA weights with those they should be.

    Args:
        predictions (`torch.Tensor` of shape `(adapters, num_weights)`): As [`LoraLayout.pack`] gives them, or lists.
        references (`torch.Tensor` of shape `(adapters, num_weights)`): The same adapters, as they should be.
        center (`torch.Tensor` of shape `(num_weights,)`, *optional*): Whose errors are all of the variance, such as
            the mean of the adapters that were trained on. By default the mean of the references.
        layout (`LoraLayout`, *optional*): Where in the vectors the modules lie; without it none is told apart.

    Returns:
        `dict`: `relative_error`, the length of the difference in units of that of the reference, and `cosine`, both
        as means over the adapters whose reference is not zero; `explained_variance`, 1 for equal weights and 0 for
        weights no nearer to the references than `center` is; each `None` where it is not defined. With a layout
        also `modules`, from each module's name to the same three, of its own weights.

    Raises:
        IncompatibleAdapterError: if the layout has another number of weights.
        ArgumentError: if shapes disagree or a value is not finite.

    Example:
        >>> scores = lora_reconstruction([[3.0, 4.0], [0.0, 1.0]], [[3.0, 4.0], [1.0, 0.0]])
        >>> {name: round(score, 4) for name, score in scores.items()}
        {'relative_error': 0.7071, 'cosine': 0.5, 'explained_variance': 0.8}
    """
    predictions = _numbers("predictions", predictions, ("adapters", "num_weights"))
    references = _numbers("references", references, ("adapters", "num_weights"))
    center = references.mean(0) if center is None else _numbers("center", center, ("num_weights",))
    if predictions.shape != references.shape or center.shape != references.shape[1:]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (predictions, references, center))
        raise ArgumentError(f"Expected predictions, references and center of equally many weights, found {shapes}.")
    scores: dict[str, Any] = {**_compare(predictions, references, center)}
    if layout is not None:
        if layout.num_weights != len(center):
            raise IncompatibleAdapterError(f"The layout has {layout.num_weights} weights, not {len(center)}.")
        parts = [_by_module(weights, layout) for weights in (predictions, references, center)]
        scores["modules"] = {name: _compare(*(part[name] for part in parts)) for name in parts[0]}
    return scores


class _Metric(evaluate.Metric):
    """A metric that is told of by its own docstring, and says which input is missing."""

    inputs: ClassVar[dict[str, Any]]

    def _info(self):
        description, _, usage = inspect.getdoc(type(self)).partition("\n\n")
        return evaluate.MetricInfo(
            description=description, inputs_description=usage, citation=CITATION, features=Features(self.inputs)
        )

    def add_batch(self, **batch):
        """Add a batch of inputs, one entry of each per example."""
        if missing := [name for name in self.inputs if batch.get(name) is None]:
            raise ArgumentError(
                f"Expected the inputs {', '.join(self.inputs)}; without a value: {', '.join(missing)}."
            )
        super().add_batch(**batch)


class RecoveredGain(_Metric):
    """Which part of fine-tuning's gain on a task another adapter has: 1 is all of it, 0 is the base model's loss.

    Args (of `compute` and `add_batch`):
        base_loss (`list[float]`): For each task, the base model's mean loss per token in nats.
        loss (`list[float]`): That of the adapter to be judged, on the same samples.
        task_lora_loss (`list[float]`): That of the LoRA which was fine-tuned on the task.

    Returns:
        `dict`: `mean_recovered_gain`, `median_recovered_gain` and `min_recovered_gain` over the tasks where
        fine-tuning gained something (`None` if there is none); `recovered_gains`, one for each task or `None`; and
        `num_undefined`, how many of these are `None`.

    Raises:
        ArgumentError: if an input is missing, empty or not finite.

    Example:
        >>> scores = RecoveredGain().compute(base_loss=[3.0], loss=[1.5], task_lora_loss=[1.0])  # doctest: +SKIP
        >>> scores["mean_recovered_gain"]  # doctest: +SKIP
        0.75
    """

    inputs = {name: Value("float64") for name in ("base_loss", "loss", "task_lora_loss")}

    def _compute(self, **losses):
        losses = {name: _numbers(name, values, ("tasks",)).tolist() for name, values in losses.items()}
        gains = [recovered_gain(**dict(zip(losses, task, strict=True))) for task in zip(*losses.values(), strict=True)]
        defined = [gain for gain in gains if gain is not None]
        averages = {"mean": statistics.mean, "median": statistics.median, "min": min}
        return {
            **{f"{name}_recovered_gain": take(defined) if defined else None for name, take in averages.items()},
            "recovered_gains": gains,
            "num_undefined": len(gains) - len(defined),
        }


class BitsPerCharacter(_Metric):
    """Bits that a language model needs per character of a text, and its perplexity per token, over all texts together.

    Args (of `compute` and `add_batch`):
        loss (`list[float]`): For each text, its negative log-likelihood in nats, summed over the scored tokens.
        num_tokens (`list[int]`): How many tokens were scored.
        num_characters (`list[int]`): How many characters these tokens stand for.

    Returns:
        `dict`: `bits_per_character` and `perplexity`, both `float`; less is better.

    Raises:
        ArgumentError: if an input is missing, empty, negative or not finite, or there are no tokens or characters.

    Example:
        >>> BitsPerCharacter().compute(loss=[2.7, 4.1], num_tokens=[2, 3], num_characters=[9, 11])  # doctest: +SKIP
        {'bits_per_character': 0.49..., 'perplexity': 3.89...}
    """

    inputs = {"loss": Value("float64"), "num_tokens": Value("int64"), "num_characters": Value("int64")}

    def _compute(self, loss, num_tokens, num_characters):
        columns = zip(self.inputs, (loss, num_tokens, num_characters), strict=True)
        loss, num_tokens, num_characters = (_total(name, values) for name, values in columns)
        return {
            "bits_per_character": bits_per_character(loss, num_characters),
            "perplexity": perplexity(loss, num_tokens),
        }


class LoraReconstruction(_Metric):
    """How near packed LoRA weights are to references: relative error, cosine, and the part of the variance explained.

    Args (of `compute` and `add_batch`):
        predictions (`list[list[float]]` or `torch.Tensor` of shape `(adapters, num_weights)`).
        references (`list[list[float]]` or `torch.Tensor` of shape `(adapters, num_weights)`).

    Args (of `compute` alone):
        center (`torch.Tensor` of shape `(num_weights,)`, *optional*): As in [`lora_reconstruction`].
        layout (`LoraLayout` or `dict`, *optional*): The layout of the weights, or its [`LoraLayout.to_dict`].

    Returns:
        `dict`: As [`lora_reconstruction`] does.

    Raises:
        IncompatibleAdapterError: if the layout has another number of weights.
        ArgumentError: if an input is missing, shapes disagree, or a value is not finite.

    Example:
        >>> LoraReconstruction().compute(predictions=[generated], references=[trained])  # doctest: +SKIP
        {'relative_error': 0.61..., 'cosine': 0.79..., 'explained_variance': None}
    """

    inputs = {name: ListOf(Value("float32")) for name in ("predictions", "references")}

    def _compute(self, predictions, references, center=None, layout=None):
        layout = LoraLayout.from_dict(layout) if isinstance(layout, Mapping) else layout
        return lora_reconstruction(predictions, references, center=center, layout=layout)


def _per_unit(loss: float, count: int, unit: str) -> float:
    if not (count > 0 and 0 <= loss / count < 700):  # e^700 is near the largest float
        raise ArgumentError(f"Expected a loss from 0 to 700 nats per {unit}, found {loss} nats for {count} {unit}s.")
    return loss / count


def _numbers(name: str, values: Sequence | torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: expected numbers of shape ({', '.join(axes)}): {error}.") from error
    if tensor.ndim != len(axes) or not tensor.numel():
        raise ArgumentError(f"{name}: expected the shape ({', '.join(axes)}), found {tuple(tensor.shape)}.")
    if not tensor.isfinite().all():
        raise ArgumentError(f"{name}: {(~tensor.isfinite()).sum()} values are not finite.")
    return tensor


def _total(name: str, values: Sequence) -> float:
    numbers = _numbers(name, values, ("texts",))
    if (numbers < 0).any():
        raise ArgumentError(f"{name}: expected nothing below 0, found {numbers.min()}. A loss is -log(probability).")
    return numbers.sum().item()


def _by_module(weights: torch.Tensor, layout: LoraLayout) -> dict[str, torch.Tensor]:
    """Cut packed weights `(..., num_weights)` into what varies of each module, `(..., its weights)`."""
    parts: dict[str, list[torch.Tensor]] = {module.name: [] for module in layout.modules}
    for block, matrices in zip(layout.blocks, split(weights, layout.blocks), strict=True):
        for module, matrix in zip(block.modules, matrices.unbind(-3), strict=True):
            parts[module.name].append(matrix.flatten(-2))
    return {name: torch.cat(matrices, -1) for name, matrices in parts.items()}


def _compare(predictions: torch.Tensor, references: torch.Tensor, center: torch.Tensor) -> dict[str, float | None]:
    errors, lengths = (predictions - references).norm(dim=1), references.norm(dim=1)
    told = lengths > 0
    spread = (references - center).norm()
    return {
        "relative_error": (errors / lengths)[told].mean().item() if told.any() else None,
        "cosine": F.cosine_similarity(predictions, references)[told].mean().item() if told.any() else None,
        # Weights are stored in fp32: what differs by less than its rounding does not vary.
        "explained_variance": 1 - (errors.norm() / spread).square().item() if spread > 1e-7 * lengths.norm() else None,
    }
