"""From what a user has of a task, examples or a description, to an adapter in the model, and what is known of it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging

from .adapter import attach_adapter
from .base_model import frozen_base, require_bare
from .behaviour import SCALES, ExampleLoss
from .closed_form import NUM_ORDERS, closed_form
from .configuration_lora_generator import LoraGeneratorConfig
from .errors import ArgumentError, IncompatibleAdapterError, TaskError, UnfamiliarTaskError
from .layout import LoraLayout
from .learned_closed_form import LearnedClosedForm
from .reading import longest_reading, read_description, read_examples
from .task_vectors import TaskVectorExtractor, TaskVectorSpec
from .tasks import Sample, to_samples

logger = logging.get_logger(__name__)
FALLBACKS = ("generate", "base", "raise")


@dataclass(frozen=True)
class GenerationRecord:
    """What is known of a generated adapter: `model.lora_generation[adapter_name]`.

    Args:
        generator (`Mapping[str, str]`): What wrote it: its `"id"` and `"revision"` on the Hub, or its `"folder"`; or
            the `"function"` that wrote it instead, for a base model that the generator was not made for.
        template (`str`): Text with `{prompt}` and `{completion}` that it was made for, or `"chat"`.
        made_from (`str`): `"examples"`, `"description"`, `"both"` or `"task_vector"`.
        seed (`int`, *optional*): Of the generator that drew the latent; `None` if it is the latent's mean.
        scale (`float`, *optional*, defaults to 1.0): What its B @ A was multiplied by to suit the examples.
        gain_on_examples (`float`, *optional*): Which part of the base model's loss on the examples it takes away at
            this scale and before any refinement, see [`ExampleLoss.gain`]; `None` if nobody asked.
        fallback (`str`, *optional*): `"base"` if it does nothing, since it would have done harm on the examples.
        refine_steps (`int`, *optional*, defaults to 0): Gradient steps on the examples after that.
        description (`str` or `Mapping[str, float]`, *optional*), examples (`tuple[Sample, ...]`): The task.
    """

    generator: Mapping[str, str]
    template: str
    made_from: str
    seed: int | None = None
    scale: float = 1.0
    gain_on_examples: float | None = None
    fallback: str | None = None
    refine_steps: int = 0
    description: str | Mapping[str, float] | None = None
    examples: tuple[Sample, ...] = ()

    def to_dict(self, describe_task: bool = True) -> dict[str, Any]:
        """Return what is known as JSON values, without what is not.

        Args:
            describe_task (`bool`, *optional*, defaults to `True`): Whether description and examples are among it.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["examples"] = [sample._asdict() for sample in self.examples] or None
        if not describe_task:
            values |= {"description": None, "examples": None}
        return {name: value for name, value in values.items() if value is not None}


class Generator(Protocol):
    """What generation asks of a [`LoraGeneratorModel`], or of anything else that writes adapters from task vectors."""

    config: LoraGeneratorConfig
    layout: LoraLayout
    closed_form: LearnedClosedForm | None

    @property
    def shared_weights(self) -> torch.Tensor:
        """What all of its adapters share, `(num_shared_weights,)`."""

    def check_base_model(self, base_model: nn.Module) -> None:
        """Refuse another base model than its own."""

    def decode_task_vector(self, task_vector: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Write an adapter, `(num_weights,)`."""

    def adapter_config(self) -> dict[str, Any]:
        """The `LoraConfig` fields of its adapters."""


def generate_adapter(
    lora_generator: Generator,
    base_model: nn.Module,
    *,
    task_vector: torch.Tensor | None = None,
    examples: Sequence | None = None,
    description: str | Mapping[str, float] | None = None,
    processing_class=None,
    template: str | None = None,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
    fit_scale: bool = True,
    refine_steps: int = 0,
    on_unfamiliar: str = "generate",
    check_base_model: bool = True,
) -> PeftModel:
    """Generate an adapter for a task and attach it to its base model. No gradient step is taken unless asked for.

    Args:
        base_model (`PreTrainedModel` or `PeftModel`): The model that the generator was made for. A `PeftModel` gets
            one more adapter; an adapter that already has the name is overwritten in place.
        task_vector (`torch.Tensor`, *optional*): As in `decode_task_vector`; instead of the next three.
        examples (`Sequence`, *optional*): Samples of the task, `(prompt, completion)` pairs for instance.
        description (`str` or `Mapping[str, float]`, *optional*): The task in a sentence, with or without examples; or
            several sentences with weights, whose task vectors are averaged.
        processing_class (*optional*): The base model's tokenizer, needed for examples and descriptions.
        template (`str`, *optional*): Of the prompts that the adapter is for: text with `{prompt}` and
            `{completion}`, or `"chat"`. By default the generator's own; another one needs a generator with a closed
            form.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter, which becomes active.
        generator (`torch.Generator`, *optional*): If given, the latent is drawn instead of being its mean. A closed
            form has none.
        fit_scale (`bool`, *optional*, defaults to `True`): Whether to weaken the adapter to what suits the examples,
            if there are any: to 0, 1/4, 1/2 or 3/4 of itself, if the loss on them is least then. An adapter in closed
            form stays whole or becomes nothing.
        refine_steps (`int`, *optional*, defaults to 0): Gradient steps on the examples, starting from the generated
            adapter: fine-tuning with a head start.
        on_unfamiliar (`str`, *optional*, defaults to `"generate"`): What to do where the adapter makes the loss on its
            own examples larger: `"generate"` it all the same, leave the `"base"` model as it is by an adapter whose
            B is 0, or `"raise"`. It needs examples.
        check_base_model (`bool`, *optional*, defaults to `True`): Whether to compare the base model's fingerprint. A
            base in 4 or 8 bits has no comparable one. For another base model, [`in_context_adapter`] writes the
            adapter from two examples or more, and a warning says so.

    Returns:
        `PeftModel`: in eval mode, the adapter frozen. `model.lora_generation[adapter_name]` is the
        [`GenerationRecord`] of what is known about it.

    Raises:
        ArgumentError: if an option or a weight has no value that it may have.
        TaskError: if there is neither a task vector, nor examples, nor a description; or no `processing_class`; or no
            examples to judge or refine by.
        TaskVectorError: if the task vector does not fit this generator.
        UnfamiliarTaskError: if the adapter does harm on its own examples and `on_unfamiliar="raise"`.
        IncompatibleAdapterError: if the base model is another one and there are not two examples, or if it carries
            adapters and is not the `PeftModel`. It is then unchanged.

    Example:
        >>> model = generator.generate_adapter(base, processing_class=tokenizer,  # doctest: +SKIP
        ...     description="Give the capital of the country.", examples=[("France", "Paris")])
    """
    samples = tuple(to_samples(() if examples is None else examples))
    made_from = _made_from(task_vector, samples, description)
    if made_from != "task_vector" and processing_class is None:
        raise TaskError("Examples and descriptions are read by the base model: pass its processing_class too.")
    _check_choices(samples, description, refine_steps, on_unfamiliar)
    _check_template(lora_generator, template)
    if generator is not None and samples and lora_generator.closed_form is not None:
        raise ArgumentError("generator: a closed form has no latent to draw, so the adapter of examples has no seed.")
    if not isinstance(base_model, PeftModel):
        require_bare(base_model)
    knows_base = not check_base_model or _knows(lora_generator, base_model, len(samples))

    template = template or lora_generator.config.template
    if not knows_base:
        written = _closed_form(base_model, processing_class, samples, description, template)
    elif task_vector is None:
        lora_weights = write_adapter(
            lora_generator, base_model, processing_class, samples, description, template, generator
        )
        in_closed_form = lora_generator.closed_form is not None and bool(samples)
        written = _of_generator(lora_generator, lora_weights, in_closed_form)
    else:
        written = _of_generator(lora_generator, lora_generator.decode_task_vector(task_vector, generator))
    record = GenerationRecord(
        generator=written.source,
        template=template,
        made_from=made_from,
        seed=None if generator is None else generator.initial_seed(),
        refine_steps=refine_steps,
        description=description or None,
        examples=samples,
    )

    layout, shared_weights, lora_weights = written.layout, written.shared_weights, written.lora_weights
    judges = fit_scale or on_unfamiliar != "generate"
    if samples and (judges or refine_steps):
        example_loss = ExampleLoss(base_model, processing_class, layout, shared_weights, samples, template)
        if judges:
            scales = SCALES if fit_scale and not written.in_closed_form else (0.0, 1.0)
            losses = example_loss.at_scales(lora_weights, scales)
            record = _judged(record, losses, fit_scale, on_unfamiliar)
            lora_weights = layout.scaled(lora_weights, record.scale)
            if record.scale == 0:
                logger.warning(
                    "The adapter changes nothing: at any strength it would make the loss on its own examples larger."
                )
        if refine_steps:
            lora_weights = example_loss.refine(lora_weights, refine_steps)

    state_dict = layout.unpack(lora_weights, shared_weights)
    model = attach_adapter(base_model, written.lora_config, state_dict, adapter_name)
    # An attribute of the object, of which PeftModel's type knows nothing.
    model.lora_generation = {**getattr(model, "lora_generation", {}), adapter_name: record}  # type: ignore[assignment]
    return model


class Written(NamedTuple):
    """An adapter before it is judged and attached.

    Args:
        source (`Mapping[str, str]`): What wrote it, see [`GenerationRecord`].
        layout (`LoraLayout`), lora_weights, shared_weights (`torch.Tensor`): The adapter, packed.
        lora_config (`Mapping`): Fields of its `LoraConfig`.
        in_closed_form (`bool`): Whether a regression on the examples wrote it: full strength then suits them best.
    """

    source: Mapping[str, str]
    layout: LoraLayout
    lora_weights: torch.Tensor
    shared_weights: torch.Tensor
    lora_config: Mapping[str, Any]
    in_closed_form: bool


def _of_generator(lora_generator: Generator, lora_weights: torch.Tensor, in_closed_form: bool = False) -> Written:
    return Written(
        _source(lora_generator.config),
        lora_generator.layout,
        lora_weights,
        lora_generator.shared_weights.detach(),
        lora_generator.adapter_config(),
        in_closed_form,
    )


def _closed_form(base_model: nn.Module, processing_class, samples: Sequence[Sample], description, template) -> Written:
    if isinstance(description, Mapping):  # which only a generator can weigh
        description = max(description, key=lambda text: description[text])
    lora_config, state_dict = closed_form(base_model, processing_class, samples, description, template)
    layout = LoraLayout.from_state_dict(state_dict, lora_config, gauge="free")
    lora_weights, shared_weights = layout.pack(state_dict, lora_config)
    source = {"function": "in_context_adapter"}
    return Written(source, layout, lora_weights, shared_weights, lora_config, in_closed_form=True)


def _knows(lora_generator: Generator, base_model: nn.Module, num_examples: int) -> bool:
    """Return whether this is the generator's base model. For another one, examples are enough to go on without it."""
    try:
        lora_generator.check_base_model(base_model)
    except IncompatibleAdapterError as error:
        if num_examples < 2:
            raise
        logger.warning(f"The adapter is written by in_context_adapter, without the generator. {error}")
        return False
    return True


def _made_from(task_vector: torch.Tensor | None, samples: Sequence[Sample], description) -> str:
    """Return the name of what was given of a task."""
    if task_vector is not None:
        if samples or description:
            raise TaskError("Expected either a task_vector, or examples and/or a description; found both.")
        return "task_vector"
    if samples:
        return "both" if description else "examples"
    if description:
        return "description"
    raise TaskError("Expected a task_vector, examples or a description; found none of them.")


def _check_choices(samples: Sequence[Sample], description, refine_steps: int, on_unfamiliar: str) -> None:
    if isinstance(description, Mapping) and not sum(description.values()) > 0:
        raise ArgumentError(f"description: expected weights with a positive sum, found {dict(description)}.")
    if refine_steps < 0:
        raise ArgumentError(f"Expected refine_steps >= 0, found {refine_steps}.")
    if refine_steps and not samples:
        raise TaskError("Adapters are refined by examples of the task: pass examples too.")
    if on_unfamiliar not in FALLBACKS:
        raise ArgumentError(f"on_unfamiliar: expected one of {FALLBACKS}, found {on_unfamiliar!r}.")
    if on_unfamiliar != "generate" and not samples:
        raise TaskError("Only examples tell whether an adapter does harm: pass examples too.")


def _check_template(lora_generator: Generator, template: str | None) -> None:
    own = lora_generator.config.template
    if template not in (None, own) and lora_generator.closed_form is None:
        raise ArgumentError(
            f"template: expected that of the generator, {own!r}, found {template!r}. Only a generator with a closed "
            "form reads examples in any template."
        )


@torch.no_grad()
def write_adapter(
    lora_generator: Generator,
    base_model: nn.Module,
    processing_class,
    examples: Sequence[Sample],
    description: str | Mapping[str, float] | None = None,
    template: str | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Write an adapter for what is known of a task: in closed form if the generator has one, else by the network.

    A closed form without memory tokens needs examples.

    Args:
        lora_generator (`LoraGeneratorModel`): Its closed form, if any, moves to the base model's device.
        base_model, processing_class, examples, description, template, generator: As in [`generate_adapter`].

    Returns:
        `torch.Tensor` of shape `(num_weights,)`, fp32, on the CPU.

    Raises:
        NotFittedError: if it is the network's part, and the network was not trained.
    """
    template = template or lora_generator.config.template
    texts = description if isinstance(description, Mapping) else {description: 1.0}
    shares = {text: weight / sum(texts.values()) for text, weight in texts.items()}
    learned = lora_generator.closed_form
    if learned is not None and (examples or (description and learned.num_memory)):
        with frozen_base(base_model) as base:
            learned = learned.to(next(base.parameters()).device)
            most, written = longest_reading(base, processing_class) - learned.num_memory, []
            for text in shares:
                if examples:
                    reading = read_examples(processing_class, examples, template, text, NUM_ORDERS, most)
                else:
                    reading = read_description(processing_class, cast(str, text), template, most)
                written.append(learned(base, reading).cpu())
        return _mean(written, shares.values())
    spec = TaskVectorSpec(**(lora_generator.config.task_vector_spec or {}))
    extractor = TaskVectorExtractor(dataclasses.replace(spec, template=template))
    vectors = [extractor.vector(base_model, processing_class, examples, text) for text in shares]
    # The condition is linear in the task vector: this is a point between the descriptions' conditions.
    return lora_generator.decode_task_vector(_mean(vectors, shares.values()), generator).cpu()


def _mean(tensors: Sequence[torch.Tensor], shares: Iterable[float]) -> torch.Tensor:
    weighted = [share * tensor for share, tensor in zip(shares, tensors, strict=True)]
    return sum(weighted[1:], weighted[0])


def _judged(
    record: GenerationRecord, losses: Mapping[float, float], fit_scale: bool, on_unfamiliar: str
) -> GenerationRecord:
    """Return the record with the scale that the losses on the examples, of some scales, speak for."""
    gains = {scale: 1 - loss / losses[0.0] for scale, loss in losses.items()}
    scale, fallback = 1.0, None
    if on_unfamiliar != "generate" and gains[1.0] < 0:
        if on_unfamiliar == "raise":
            raise UnfamiliarTaskError(
                f"The adapter makes the loss on its own examples larger, by {-gains[1.0]:.1%}. Give other examples, "
                "fine-tune a LoRA, or pass on_unfamiliar='generate'."
            )
        scale, fallback = 0.0, "base"  # and not A = 0, too, from which no gradient leads away
    elif fit_scale:
        scale = min(losses, key=lambda one: losses[one])
    return dataclasses.replace(record, scale=scale, gain_on_examples=gains[scale], fallback=fallback)


def _source(config: LoraGeneratorConfig) -> dict[str, str]:
    """Return where a generator was loaded from, as others may know it."""
    name, revision = config._name_or_path, getattr(config, "_commit_hash", None)
    return {"id": name, "revision": revision} if revision else {"folder": Path(name).name}
