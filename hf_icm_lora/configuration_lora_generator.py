"""Configuration of [`LoraGeneratorModel`]."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .completion import DEFAULT_TEMPLATE
from .errors import ArgumentError, IncompatibleAdapterError, TaskVectorError
from .layout import LoraLayout
from .lora_config import check_plain_lora
from .task_vectors import TaskVectorSpec

MAX_LAYERS = 512
DTYPES = (
    None,
    "float32",
    "float64",
    "float16",
    "bfloat16",
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
)
FORMAT_VERSION = 1


@strict
class LoraGeneratorConfig(PreTrainedConfig):
    r"""Everything that a generator knows besides its weights. Made by [`~LoraGeneratorConfig.from_zoo`].

    Args:
        layout (`dict`, *optional*): The [`LoraLayout`] of the adapters, as a dictionary.
        lora_config (`dict`, *optional*): Non-default fields of the zoo's `peft.LoraConfig`.
        base_model_name_or_path (`str`, *optional*): The base model.
        base_model_fingerprint (`str`, *optional*): Hash of its weights, checked before an adapter is attached.
        task_vector_spec (`dict`, *optional*): The [`TaskVectorSpec`], as a dictionary.
        training_tasks (`list[str]`, *optional*): Names of the tasks of the training zoo: the seen tasks.
        training_runs (`list[dict]`, *optional*): What [`LoraGeneratorTrainer`] did, run by run: command, settings,
            versions, machine, seconds and last losses.
        template (`str`, *optional*): Text with `{prompt}` and `{completion}` that the adapters were trained on, or
            `"chat"` for the tokenizer's chat template.
        closed_form (`dict`, *optional*): Sizes of the [`LearnedClosedForm`] that writes from examples: the `reader`'s
            layout as a dictionary, `state_rank`, `label_rank` and, 0 if absent, `num_memory`. The network then writes
            from descriptions alone; with memory tokens the closed form does that, too.
        num_task_vectors (`int`, *optional*, defaults to 1): Rows of a task vector.
        task_vector_size (`int`, *optional*, defaults to 576): Columns, the base model's hidden size.
        condition_size (`int`, *optional*, defaults to 256): Principal directions of the training tasks' vectors that
            the generator sees.
        reconstruction (`str`, *optional*, defaults to `"weights"`): What training on adapters compares: normalized
            `"weights"`, or the `"products"` B @ A, whatever their factors: `from_zoo` chooses them for adapters of
            any origin.
        architecture (`str`, *optional*, defaults to `"transformer"`): `"transformer"` (one token per matrix) or
            `"conv1d"` (the paper's convolutions over the flat vector).
        token_granularity (`str`, *optional*, defaults to `"matrix"`): One token per `"matrix"` or per `"rank"`
            component.
        hidden_size (`int`, *optional*, defaults to 256): Width of the tokens.
        intermediate_size (`int`, *optional*, defaults to 1024): Width of the feed-forward layers.
        basis_size (`int`, *optional*, defaults to 32): Directions in which each token's weights may lie.
        num_encoder_layers (`int`, *optional*, defaults to 2), num_decoder_layers (`int`, *optional*, defaults to 3).
        num_attention_heads (`int`, *optional*, defaults to 4).
        latent_size (`int`, *optional*, defaults to 32): Size of z.
        prior (`str`, *optional*, defaults to `"learned"`): p(z | task) is a network (`"learned"`) or N(0, I)
            (`"standard"`); `"none"` leaves the latent out, which makes the model a deterministic regressor.
        has_encoder (`bool`, *optional*, defaults to `True`): Whether q(z | weights, task) is there. Generation
            needs no encoder; [`~LoraGeneratorModel.without_encoder`] leaves it out.
        weight_format (`str`, *optional*, defaults to `"float"`): `"int8"` stores matrices in 8 bits; see
            [`~LoraGeneratorModel.to_int8`].
        dropout (`float`, *optional*, defaults to 0.0): Dropout in the transformer.
        format_version (`int`, *optional*): Version of this configuration's meaning.

    Raises:
        IncompatibleAdapterError: if the layout or the LoRA configuration is malformed, the sizes make a generator of
            more than 2^31 parameters, or the format is newer than this version of the package.
        TaskVectorError: if the task vector specification is malformed.

    Example:
        >>> config = LoraGeneratorConfig.from_zoo(zoo, hidden_size=128)  # doctest: +SKIP
    """

    model_type = "icm_lora_generator"
    keys_to_ignore_at_inference = ["lora_weights", "posterior_mean", "posterior_logvar", "prior_mean", "prior_logvar"]

    layout: dict | None = None
    lora_config: dict | None = None
    base_model_name_or_path: str | None = None
    base_model_fingerprint: str | None = None
    task_vector_spec: dict | None = None
    training_tasks: list[str] | None = None
    training_runs: list[dict] | None = None
    template: str = DEFAULT_TEMPLATE
    closed_form: dict | None = None
    num_task_vectors: int = 1
    task_vector_size: int = 576
    condition_size: int = 256
    reconstruction: str = "weights"
    architecture: str = "transformer"
    token_granularity: str = "matrix"
    hidden_size: int = 256
    intermediate_size: int = 1024
    basis_size: int = 32
    num_encoder_layers: int = 2
    num_decoder_layers: int = 3
    num_attention_heads: int = 4
    latent_size: int = 32
    prior: str = "learned"
    has_encoder: bool = True
    weight_format: str = "float"
    dropout: float | int = 0.0
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        # Not in a validator, whose errors @strict wraps in one of its own: these are ours to catch.
        if self.dtype not in DTYPES:  # the next line looks its name up in torch
            raise IncompatibleAdapterError(f"dtype: expected one of {DTYPES}, found {self.dtype!r:.300}.")
        super().__post_init__(**kwargs)
        if self.format_version != FORMAT_VERSION:
            raise IncompatibleAdapterError(
                f"Expected a generator of format version {FORMAT_VERSION}, found version {self.format_version}. If "
                "that is newer than this package, upgrade hf_icm_lora."
            )
        if self.layout is not None:
            LoraLayout.from_dict(self.layout)  # or its error
        if self.closed_form is not None:
            check_closed_form(self.closed_form)
        if self.lora_config is not None:
            check_plain_lora(self.lora_config)
        if self.task_vector_spec is not None:
            try:
                TaskVectorSpec(**self.task_vector_spec)
            except (TypeError, AttributeError) as error:
                raise TaskVectorError(f"task_vector_spec: not a TaskVectorSpec: {error}") from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Read a configuration as `PreTrainedConfig` does, but only that of a generator.

        Raises:
            IncompatibleAdapterError: if it belongs to another kind of model.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config and config.get("model_type") != cls.model_type:
            raise IncompatibleAdapterError(
                f"{pretrained_model_name_or_path} is no generator of adapters: expected model_type {cls.model_type!r} "
                f"in its config.json, found {config.get('model_type')!r}."
            )
        return config, kwargs

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        # PreTrainedConfig's way to read a file; it would take any JSON for an object.
        config = super()._dict_from_json_file(json_file)
        if not isinstance(config, dict):
            raise IncompatibleAdapterError(
                f"{json_file}: expected an object in config.json, found {type(config).__name__}."
            )
        return config

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "LoraGeneratorConfig":
        """Make a configuration of its own fields in a dictionary, as `PreTrainedConfig` does.

        What else a file holds is left out: it might choose code, kernels or quantizers (`auto_map`,
        `attn_implementation`, `quantization_config`, ...).
        """
        known = {field.name for field in dataclasses.fields(cls)} | {"_commit_hash"}
        return super().from_dict({name: value for name, value in config_dict.items() if name in known}, **kwargs)

    def validate_architecture(self):
        """Check what no single field can: called at construction and before saving."""
        choices = {"architecture": ("transformer", "conv1d"), "token_granularity": ("matrix", "rank")}
        choices |= {"prior": ("learned", "standard", "none"), "weight_format": ("float", "int8")}
        choices |= {"reconstruction": ("weights", "products")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ArgumentError(f"{field}: expected one of {allowed}, found {getattr(self, field)!r}.")
        sizes = ("num_task_vectors", "task_vector_size", "hidden_size", "intermediate_size", "basis_size",
                 "num_encoder_layers", "num_decoder_layers", "num_attention_heads", "latent_size",
                 "condition_size")  # fmt: skip
        for field in sizes:
            most = MAX_LAYERS if field.endswith("layers") else 65536
            if not 1 <= getattr(self, field) <= most:
                raise ArgumentError(f"{field}: expected a number from 1 to {most}, found {getattr(self, field)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ArgumentError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads.")
        if not 0 <= self.dropout < 1:
            raise ArgumentError(f"dropout: expected a number from 0 to below 1, found {self.dropout}.")

    @property
    def lora_layout(self) -> LoraLayout:
        """The layout as an object."""
        return LoraLayout.from_dict(self.layout or {})

    @classmethod
    def from_zoo(cls, zoo, **kwargs) -> "LoraGeneratorConfig":
        """Take layout, LoRA configuration, base model and task vector specification from a [`LoraZoo`].

        Args:
            zoo (`LoraZoo`): The training split of a zoo with task vectors; its tasks are the seen ones.
            kwargs: Further fields of the configuration, or other values of these, such as the base model's id on the
                Hub as `base_model_name_or_path`, if the zoo was made from a local copy.

        Raises:
            ZooError: if the zoo has no task vectors yet.
        """
        vectors = zoo.task_vectors
        num_task_vectors, task_vector_size = next(iter(next(iter(vectors.banks.values())).values())).shape[1:]
        of_zoo = {
            "layout": zoo.layout.to_dict(),
            "lora_config": zoo.lora_config,
            "base_model_name_or_path": zoo.base_model_name_or_path,
            "base_model_fingerprint": zoo.base_model_fingerprint,
            "task_vector_spec": vectors.spec.to_dict(),
            "training_tasks": list(zoo),
            "template": zoo.template,
            "num_task_vectors": num_task_vectors,
            "task_vector_size": task_vector_size,
            # Of adapters of any origin the factors say little, and it is their products that a generator can learn.
            "reconstruction": "products" if zoo.layout.gauge == "free" else "weights",
        }
        return cls(**of_zoo | kwargs)


def check_closed_form(sizes: Mapping[str, Any]) -> None:
    """Check the sizes of a closed form in a configuration.

    Raises:
        IncompatibleAdapterError: if one is missing, unknown or out of range.
    """
    expected, found = ["label_rank", "num_memory", "reader", "state_rank"], sorted({*sizes, "num_memory"})
    if found != expected:
        raise IncompatibleAdapterError(f"closed_form: expected the fields {expected}, found {sorted(sizes)}.")
    LoraLayout.from_dict(sizes["reader"])  # or its error
    for name, least in (("state_rank", 1), ("label_rank", 1), ("num_memory", 0)):
        size = sizes.get(name, 0)
        if not isinstance(size, int) or not least <= size <= 65536:
            raise IncompatibleAdapterError(f"closed_form, {name}: expected {least} to 65536, found {size!r:.100}.")
