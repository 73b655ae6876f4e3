"""The generator: a conditional VAE over LoRA weights, conditioned on task vectors.

In-Context Meta LoRA Generation (arXiv 2501.17635, section 3.3), with the prior learned, p(z | task), and with the
network aware of the modules that it writes for:

    encoder  q(z | weights, task)     training only
    prior    p(z | task)              what generation draws z from, or takes the mean of
    decoder  weights(z, task)

Shapes: `lora_weights (batch, num_weights)`, `task_vector (batch, num_task_vectors, task_vector_size)`, which the
networks, see networks.py, get as `condition (batch, condition_size)`, and `z (batch, latent_size)`.
"""

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import CommitInfo, ModelCard, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import CONFIG_NAME, ModelOutput, logging

from .adapter import (
    AdapterSlot,
    save_adapter,
)
from .base_model import base_model_fingerprint
from .configuration_lora_generator import LoraGeneratorConfig
from .errors import (
    CorruptAdapterError,
    IncompatibleAdapterError,
    NotFittedError,
    TaskVectorError,
)
from .files import commit_files
from .generation import generate_adapter
from .hub import CARD_FILE, files_below, push_files, require_hub_id
from .layout import LoraLayout
from .learned_closed_form import LearnedClosedForm, Matrices
from .lora_config import canonical_lora_config
from .model_card import generator_card
from .networks import NETWORKS, Conv1dCVAE, Int8, Prior, TokenwiseLinear, TransformerCVAE
from .normalization import ZooNormalizer
from .serving import plain_adapter
from .training_data import BehaviouralDataset, LoraZooDataset

MAX_PARAMETERS = 2**31  # 8 GB in fp32; a configuration that asks for more is refused before anything is allocated
MAX_MISSING = 2**25  # numbers that a checkpoint may lack, for instance an encoder's


@dataclass
class LoraGeneratorOutput(ModelOutput):
    """What [`LoraGeneratorModel`] returns.

    Args:
        loss (`torch.Tensor` of shape `()`): Negative evidence lower bound per weight: the mean of
            `reconstruction_loss + kl / num_weights`. The trainer weighs the two terms in its own way.
        reconstruction_loss (`torch.Tensor` of shape `(batch,)`): Squared error of the normalized weights, averaged
            over weights: 1 is the error of the mean adapter over the training tasks. With `config.reconstruction`
            "products", that of B @ A relative to its usual square, averaged over modules: 1 is the error of B = 0.
        kl (`torch.Tensor` of shape `(batch,)`): KL(q(z | weights, task) || p(z | task)) in nats.
        lora_weights (`torch.Tensor` of shape `(batch, num_weights)`): Reconstructed weights, or generated ones if
            none were given.
        posterior_mean, posterior_logvar, prior_mean, prior_logvar (`torch.Tensor` of shape `(batch, latent_size)`).
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    lora_weights: torch.Tensor | None = None
    posterior_mean: torch.Tensor | None = None
    posterior_logvar: torch.Tensor | None = None
    prior_mean: torch.Tensor | None = None
    prior_logvar: torch.Tensor | None = None


def check_size(config: LoraGeneratorConfig) -> None:
    """Refuse sizes of which a generator could not be made, by making one that has no memory.

    Raises:
        IncompatibleAdapterError: with the largest tensors.
    """
    try:
        with torch.device("meta"):
            network = NETWORKS[config.architecture](config)
            parts = nn.ModuleDict({"statistics": ZooNormalizer(config), "network": network, "prior": Prior(config)})
            if config.closed_form is not None:
                parts["closed_form"] = LearnedClosedForm.from_config(config)
    except RuntimeError as error:
        raise IncompatibleAdapterError(f"Expected sizes of tensors that can be counted: {error}") from error
    sizes = {name: tensor.numel() for name, tensor in parts.state_dict().items()}
    if (total := sum(sizes.values())) > MAX_PARAMETERS:
        largest = ", ".join(f"{name} {sizes[name]:,}" for name in sorted(sizes, key=lambda name: -sizes[name])[:3])
        raise IncompatibleAdapterError(
            f"Expected sizes that make up to {MAX_PARAMETERS:,} parameters, found ones that make {total:,}: {largest}."
        )


class LoraGeneratorModel(PreTrainedModel):
    """A conditional VAE that writes LoRA adapters for tasks that it knows by a task vector.

    Args:
        config (`LoraGeneratorConfig`): With a layout; see [`LoraGeneratorConfig.from_zoo`].

    Example:
        >>> generator = LoraGeneratorModel.from_pretrained("user/smollm2-lora-generator")  # doctest: +SKIP
        >>> model = generator.generate_adapter(  # doctest: +SKIP
        ...     base_model, processing_class=tokenizer, examples=[("France", "Paris"), ("Japan", "Tokyo")]
        ... )
    """

    config: LoraGeneratorConfig
    zoo_normalizer: ZooNormalizer
    network: TransformerCVAE | Conv1dCVAE
    prior: Prior | None
    closed_form: LearnedClosedForm | None
    config_class = LoraGeneratorConfig
    base_model_prefix = "generator"
    main_input_name = "task_vector"
    model_tags = ["hf_icm_lora"]
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["zoo_normalizer", "closed_form"]

    def __init__(self, config: LoraGeneratorConfig):
        if config.layout is None:
            raise IncompatibleAdapterError("A generator needs a layout: make its configuration with from_zoo().")
        check_size(config)
        super().__init__(config)
        self.zoo_normalizer = ZooNormalizer(config)
        self.network = NETWORKS[config.architecture](config)
        self.prior = Prior(config) if config.prior == "learned" else None
        self.closed_form = LearnedClosedForm.from_config(config) if config.closed_form is not None else None
        self.layout: LoraLayout = config.lora_layout
        if config.weight_format == "int8":
            self._round_weights()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d) and module.out_channels == 1:  # the last one: start near the mean adapter
            init.normal_(module.weight, std=0.02)
            init.zeros_(cast(torch.Tensor, module.bias))
        elif isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):  # N(0, 0.02) would fade out over 24 layers
            init.kaiming_normal_(module.weight, nonlinearity="leaky_relu")
            init.zeros_(cast(torch.Tensor, module.bias))
        elif isinstance(module, TokenwiseLinear) and module.bias is None:  # beside a closed form
            init.zeros_(module.weight)
        elif isinstance(module, TokenwiseLinear):
            init.normal_(module.weight, std=0.02)
            init.zeros_(cast(torch.Tensor, module.bias))
        elif isinstance(module, LearnedClosedForm):
            module.reset_parameters()
        elif isinstance(module, ZooNormalizer):
            # Or a checkpoint without statistics would come up with garbage.
            for name, buffer in module.named_buffers():
                (init.ones_ if name.endswith("_scale") else init.zeros_)(buffer)
        else:
            super()._init_weights(module)

    @property
    def shared_weights(self) -> torch.Tensor:
        """What all adapters of this generator share, `(num_shared_weights,)`, fp32."""
        return self.zoo_normalizer.shared_weights if self.closed_form is None else self.closed_form.shared_weights

    def fit_normalizer(
        self, dataset: LoraZooDataset, behavioural_dataset: BehaviouralDataset | None = None, batch_size: int = 32
    ) -> None:
        """Compute the normalization statistics from the training split, once, before training.

        Args:
            dataset (`LoraZooDataset`): As from `LoraZoo.as_dataset()`: with `each_adapter()`, which yields
                `(num_weights,)`, and the attributes `shared_weights` `(num_shared_weights,)` and `task_vectors`
                `(num_vectors, num_task_vectors, task_vector_size)`.
            behavioural_dataset (`BehaviouralDataset`, *optional*): What behavioural training will go through after
                that: with it, the condition also tells the tasks apart that have no LoRA.
            batch_size (`int`, *optional*, defaults to 32): Adapters per step.

        Raises:
            IncompatibleAdapterError: if the dataset's shared weights are not of this layout.
            TaskVectorError: if the task vectors are not of this generator's shape.
        """
        normalizer = self.zoo_normalizer
        if tuple(dataset.shared_weights.shape) != (self.layout.num_shared_weights,):
            raise IncompatibleAdapterError(
                f"Expected {self.layout.num_shared_weights} shared weights, found "
                f"{tuple(dataset.shared_weights.shape)}: the dataset comes from a zoo of another layout."
            )
        vectors = torch.cat([d.task_vectors for d in (dataset, behavioural_dataset) if d is not None])
        self._check_task_vector(vectors)
        normalizer.fit_vectors(vectors)
        # A bar from 2 s on.
        progress = tqdm(
            dataset.each_adapter(), "Normalizer", leave=False, delay=2, disable=not logging.is_progress_bar_enabled()
        )
        normalizer.fit_weights(_batches(progress, batch_size), dataset.shared_weights)
        normalizer.is_fitted.fill_(1)

    def forward(
        self,
        task_vector: torch.Tensor,
        lora_weights: torch.Tensor | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> LoraGeneratorOutput | tuple:
        """Generate adapters from task vectors, or reconstruct those that are given with them.

        In training mode z is drawn from the posterior, in eval mode it is the posterior's mean.

        Args:
            task_vector (`torch.Tensor` of shape `(batch, num_task_vectors, task_vector_size)`): The tasks' vectors.
            lora_weights (`torch.Tensor` of shape `(batch, num_weights)`, *optional*): Packed adapters of these tasks.
            return_loss (`bool`, *optional*, defaults to `True`): Whether to compute `loss`.
            return_dict (`bool`, *optional*): Whether to return a [`LoraGeneratorOutput`] instead of a tuple.

        Raises:
            NotFittedError: if `fit_normalizer` was never called.
            TaskVectorError, IncompatibleAdapterError: if a shape is not the generator's.
        """
        condition = self._condition(task_vector)
        prior_mean, prior_logvar = self._prior(condition)
        if lora_weights is None:
            generated = self.zoo_normalizer.denormalize(self.network.decode(prior_mean, condition))
            output = LoraGeneratorOutput(lora_weights=generated, prior_mean=prior_mean, prior_logvar=prior_logvar)
        else:
            if lora_weights.shape != (len(condition), self.layout.num_weights):
                raise IncompatibleAdapterError(
                    f"Expected lora_weights of shape {(len(condition), self.layout.num_weights)}, found "
                    f"{tuple(lora_weights.shape)}."
                )
            target = self.zoo_normalizer.normalize(lora_weights)
            if self.config.prior == "none":
                z = posterior_mean = posterior_logvar = torch.zeros_like(prior_mean)
            else:
                if not self.config.has_encoder:
                    raise NotFittedError(
                        "This generator was made without_encoder(): it generates adapters but cannot reconstruct "
                        "them. Train a generator that has its encoder, or train this one through the base model."
                    )
                posterior_mean, posterior_logvar = self.network.encode(target.to(condition.dtype), condition)
                noise = torch.randn_like(posterior_mean) if self.training else 0.0
                z = posterior_mean + noise * (0.5 * posterior_logvar).exp()
            normalized = self.network.decode(z, condition)
            reconstructed = self.zoo_normalizer.denormalize(normalized)
            reconstruction_loss = self.zoo_normalizer.error(reconstructed, lora_weights)
            kl = kl_per_unit(posterior_mean, posterior_logvar, prior_mean, prior_logvar).sum(1)
            output = LoraGeneratorOutput(
                reconstruction_loss=reconstruction_loss,
                kl=kl,
                lora_weights=reconstructed,
                posterior_mean=posterior_mean,
                posterior_logvar=posterior_logvar,
                prior_mean=prior_mean,
                prior_logvar=prior_logvar,
            )
            if return_loss:
                output.loss = (reconstruction_loss + kl / self.layout.num_weights).mean()
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()

    def decode_task_vector(self, task_vector: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Generate packed weights for one task.

        Args:
            task_vector (`torch.Tensor`): `(num_task_vectors, task_vector_size)`, or several draws of it
                `(num_draws, num_task_vectors, task_vector_size)`, whose adapters are averaged; for one row also
                `(task_vector_size,)`.
            generator (`torch.Generator`, *optional*): If given, z is drawn from the prior instead of being its mean.

        Returns:
            `torch.Tensor` of shape `(num_weights,)`, fp32.

        Raises:
            NotFittedError, TaskVectorError: as in `forward`.
        """
        draws = task_vector.reshape((1,) * (3 - task_vector.ndim) + tuple(task_vector.shape))
        return self._decode(self._condition(draws), generator)

    @torch.no_grad()
    def _decode(self, condition: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        training = self.training
        if training:  # the walk over all modules is not free
            self.eval()
        try:
            mean, logvar = self._prior(condition)
            if generator is not None and self.config.prior != "none":
                noise = torch.randn(mean.shape[1:], generator=generator, device=generator.device)  # one for all draws
                mean = mean + noise.to(mean) * (0.5 * logvar).exp()
            return self.zoo_normalizer.denormalize(self.network.decode(mean, condition)).mean(0)
        finally:
            if training:
                self.train()

    def without_encoder(self) -> "LoraGeneratorModel":
        """Return a copy without encoder: all that generation and behavioural training need, in about half the size.

        Example:
            >>> generator.without_encoder().save_pretrained("generator")  # doctest: +SKIP
        """
        return self._rebuilt(has_encoder=False)

    def to_int8(self) -> "LoraGeneratorModel":
        """Return a copy whose matrices are stored in 8 bits with one scale per row: to be shipped, not to be trained.

        Example:
            >>> generator.without_encoder().to_int8().save_pretrained("generator")  # doctest: +SKIP
        """
        model = copy.deepcopy(self)
        if model.config.weight_format != "int8":
            model.config.weight_format = "int8"
            model._round_weights()
        return model

    def to_float(self) -> "LoraGeneratorModel":
        """Return a copy of an 8-bit generator with ordinary weights, which can be trained further."""
        return self._rebuilt(weight_format="float")

    def _rebuilt(self, **changes) -> "LoraGeneratorModel":
        """Return a copy with another configuration, whose tensors this one has, too."""
        config = copy.deepcopy(self.config)
        for name, value in changes.items():
            setattr(config, name, value)
        model, state = LoraGeneratorModel(config), self.state_dict()
        for name in model.state_dict():
            module, _, tensor = name.rpartition(".")
            if name not in state:  # what the 8-bit format computes
                state[name] = getattr(self.get_submodule(module), tensor)
        # Assigned and not copied into: dtypes and devices stay what they are.
        state = {name: state[name].detach().clone() for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
        return model.train(self.training)

    def _round_weights(self) -> None:
        for module in list(self.modules()):
            if isinstance(module, (nn.Linear, TokenwiseLinear, Matrices)):
                module.weight.requires_grad_(False)
                parametrize.register_parametrization(module, "weight", Int8())
        parametrize.register_parametrization(self.zoo_normalizer, "vector_directions", Int8())

    def generate_state_dict(
        self, task_vector: torch.Tensor, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """Generate an adapter as a PEFT state dict, whose scaling is 1.

        Args:
            task_vector (`torch.Tensor`), generator (`torch.Generator`, *optional*): As in `decode_task_vector`.

        Returns:
            `dict[str, torch.Tensor]`: fp32 tensors under keys like
            `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
        """
        return self.layout.unpack(self.decode_task_vector(task_vector, generator), self.shared_weights)

    generate_adapter = generate_adapter  # the method; as a function it stands where the tokenizer is known

    def adapter_slot(
        self, base_model: nn.Module, adapter_name: str = "default", check_base_model: bool = True
    ) -> AdapterSlot:
        """Attach an empty adapter that generated weights can be written into many times, fast.

        Args:
            base_model, adapter_name, check_base_model: As in `generate_adapter`.

        Raises:
            IncompatibleAdapterError: if the base model is another one.

        Example:
            >>> slot = generator.adapter_slot(base)  # doctest: +SKIP
            >>> slot.write(generator.decode_task_vector(task_vector))  # doctest: +SKIP
        """
        if check_base_model:
            self.check_base_model(base_model)
        return AdapterSlot(base_model, self.adapter_config(), self.layout, self.shared_weights, adapter_name)

    def export_adapter(
        self,
        save_directory: str | Path,
        task_vector: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        rank: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> float:
        """Generate an adapter into a PEFT folder, without its base model, in the form that every server reads.

        Args:
            save_directory (`str` or `Path`): A folder that does not exist yet.
            task_vector (`torch.Tensor`), generator (`torch.Generator`, *optional*): As in `decode_task_vector`.
            rank, dtype (*optional*): As in [`plain_adapter`].

        Returns:
            `float`: The part of all squared singular values that a smaller rank cut off.

        Raises:
            FileExistsError: if the folder exists.
            NotFittedError, TaskVectorError, IncompatibleAdapterError: as `decode_task_vector` and `plain_adapter`.
        """
        state_dict = self.generate_state_dict(task_vector, generator)
        config, state_dict, lost = plain_adapter(self.adapter_config(), state_dict, rank=rank, dtype=dtype)
        save_adapter(save_directory, config, state_dict)
        return lost

    def adapter_config(self) -> dict:
        """Return the `LoraConfig` fields of generated adapters: one rank, `lora_alpha == r`, nothing else needed."""
        extra = {"base_model_name_or_path": self.config.base_model_name_or_path or None}  # None if made in memory
        return canonical_lora_config(self.config.lora_config or {}, self.layout.max_rank) | extra

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a generator as `PreTrainedModel.from_pretrained` does, and remember the commit that it comes from.

        Only safetensors files are read, and no code from a repository is run, whatever `kwargs` say.

        Raises:
            CorruptAdapterError: if the file of weights is malformed, or lacks most of what the configuration needs.
            IncompatibleAdapterError, TaskVectorError: as [`LoraGeneratorConfig`].
        """
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        try:
            with _no_conversion():
                loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise CorruptAdapterError(
                f"{pretrained_model_name_or_path}: not a whole safetensors file: {error}"
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        name = pretrained_model_name_or_path
        if name is not None and not Path(name).exists():
            options = {"cache_dir": kwargs.get("cache_dir"), "revision": kwargs.get("revision")}
            subfolder = Path(kwargs.get("subfolder") or "")
            cached = Path(try_to_load_from_cache(name, (subfolder / CONFIG_NAME).as_posix(), **options))
            # In the Hub's cache a folder that is named by its commit holds the repository's files.
            model.config._commit_hash = cached.parents[len(subfolder.parts)].name
        return loaded

    def _move_missing_keys_from_meta_to_device(self, missing_keys, *args, **kwargs) -> None:
        # A configuration can promise what its file of weights does not hold: that would be allocated here.
        missing = {key: self.get_parameter_or_buffer(key).numel() for key in missing_keys}
        if sum(missing.values()) > MAX_MISSING:
            raise CorruptAdapterError(
                f"The generator's file of weights lacks {len(missing)} tensors of {sum(missing.values()):,} numbers, "
                f"such as {sorted(missing)[:3]}: it does not belong to its config.json."
            )
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def save_pretrained(  # type: ignore[override]  # what others pass by position, only the folder, stays
        self, save_directory: str | Path, *, push_to_hub: bool = False, is_main_process: bool = True, **kwargs
    ) -> None:
        """Write `config.json`, `model.safetensors` and, unless there is a `README.md`, a card.

        A reader sees each file as it was or as it will be, never a part, and `config.json` is the last.

        Args:
            save_directory (`str` or `Path`): Where; made if there is none.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to push it as well, with the arguments of
                `push_to_hub` among `kwargs`.
            kwargs: All else that `PreTrainedModel.save_pretrained` takes.
        """
        pushed = {"private", "commit_message", "commit_description", "revision", "create_pr", "tags", "card"}
        options = {name: kwargs.pop(name) for name in pushed & kwargs.keys()} if push_to_hub else {}
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        if not is_main_process:
            return super().save_pretrained(save_directory, is_main_process=False, **kwargs)
        with commit_files(save_directory, last=CONFIG_NAME) as folder:
            super().save_pretrained(folder, **kwargs)
            if not Path(save_directory, CARD_FILE).exists():
                generator_card(self).save(folder / CARD_FILE)
        if push_to_hub:
            self.push_to_hub(repo_id, token=kwargs.get("token"), **options)

    def push_to_hub(  # type: ignore[override]  # of a decorated method, whose own types are lost
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: Sequence[str] | None = None,
        card: ModelCard | None = None,
    ) -> CommitInfo:
        """Upload the generator with its card, in one commit. A card that is in the repository already is kept.

        Args:
            repo_id (`str`): The repository; it is made if there is none.
            commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags: As in
                `PreTrainedModel.push_to_hub`.
            card (`ModelCard`, *optional*): By default [`generator_card`] makes one.

        Returns:
            `CommitInfo`: a string, too: the commit's URL.

        Raises:
            PublishingError: if `config.base_model_name_or_path` is a local folder, which nobody else can load.

        Example:
            >>> generator.push_to_hub("user/my-generator", private=True)  # doctest: +SKIP
        """
        require_hub_id(self.config.base_model_name_or_path, "set generator.config.base_model_name_or_path to one")
        with tempfile.TemporaryDirectory() as folder:
            card = card or generator_card(self, repo_id=repo_id, tags=tags or ())
            card.save(Path(folder) / CARD_FILE)
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_files(
                files_below(folder),
                repo_id,
                commit_message=commit_message or "Upload generator",
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def check_base_model(self, base_model: nn.Module) -> None:
        """Compare a base model's fingerprint with that of the one the generator was made for.

        Raises:
            IncompatibleAdapterError: if they differ.
        """
        expected, found = self.config.base_model_fingerprint, base_model_fingerprint(base_model)
        if expected != found:
            name = cast(PreTrainedModel, base_model).config._name_or_path
            raise IncompatibleAdapterError(
                f"This generator was made for {self.config.base_model_name_or_path!r} (fingerprint {expected!s:.12}), "
                f"found {name!r} (fingerprint {found[:12]}). Load that base model. For a quantized copy of it pass "
                "check_base_model=False."
            )

    def _prior(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.prior is not None:
            return self.prior(condition)
        zeros = condition.new_zeros(len(condition), self.config.latent_size)
        return zeros, zeros

    def _condition(self, task_vector: torch.Tensor) -> torch.Tensor:
        if not self.zoo_normalizer.is_fitted:
            raise NotFittedError(
                "This generator has no statistics yet: call fit_normalizer(train_dataset) or train it."
            )
        self._check_task_vector(task_vector)
        return self.zoo_normalizer.condition(task_vector.to(self.device)).to(self.dtype)

    def _check_task_vector(self, task_vector: torch.Tensor) -> None:
        expected = (self.config.num_task_vectors, self.config.task_vector_size)
        if task_vector.ndim != 3 or tuple(task_vector.shape[1:]) != expected:
            raise TaskVectorError(
                f"Expected a task vector of shape (batch, {expected[0]}, {expected[1]}), found "
                f"{tuple(task_vector.shape)}."
            )
        if not task_vector.isfinite().all():
            raise TaskVectorError("The task vector holds values that are not finite.")


@contextmanager
def _no_conversion() -> Iterator[None]:
    # Else transformers would ask a service to convert the pickles of a repository that has no safetensors.
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _batches(adapters: Iterable[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
    adapters = iter(adapters)
    while batch := list(islice(adapters, batch_size)):
        yield torch.stack(batch)


def kl_per_unit(
    mean: torch.Tensor, logvar: torch.Tensor, prior_mean: torch.Tensor, prior_logvar: torch.Tensor
) -> torch.Tensor:
    """Return KL(N(mean, exp(logvar)) || N(prior_mean, exp(prior_logvar))) per latent unit in nats, fp32."""
    mean, logvar, prior_mean, prior_logvar = (x.float() for x in (mean, logvar, prior_mean, prior_logvar))
    difference = prior_logvar - logvar
    return 0.5 * (difference + (-difference).exp() + (mean - prior_mean) ** 2 * (-prior_logvar).exp() - 1)


AutoConfig.register("icm_lora_generator", LoraGeneratorConfig, exist_ok=True)
AutoModel.register(LoraGeneratorConfig, LoraGeneratorModel, exist_ok=True)
