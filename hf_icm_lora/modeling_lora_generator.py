"""The generator: a conditional VAE over LoRA weights, conditioned on task vectors.

In-Context Meta LoRA Generation (arXiv 2501.17635, section 3.3), with the prior learned, p(z | task), and with the
network aware of the modules that it writes for:

    encoder  q(z | weights, task)     training only
    prior    p(z | task)              what generation draws z from, or takes the mean of
    decoder  weights(z, task)

Shapes: `lora_weights (batch, num_weights)`, `task_vector (batch, num_task_vectors, task_vector_size)`, which the
networks see as `condition (batch, condition_size)`, `z (batch, latent_size)`, and tokens
`(batch, num_tokens, hidden_size)`.
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
import torch.nn.functional as F
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
from .layout import LoraLayout, MatrixBlock, split
from .lora_config import canonical_lora_config
from .model_card import generator_card
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


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, config: LoraGeneratorConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (batch, heads, ...)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: LoraGeneratorConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x)))))


class TokenwiseLinear(nn.Module):
    """A linear layer of its own for each token, `(batch, num_tokens, in) -> (batch, num_tokens, out)`."""

    def __init__(self, num_tokens: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_tokens, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight).transpose(0, 1)


class WeightTokens(nn.Module):
    """Weights as tokens: one per matrix, or one per rank component of each matrix.

    On the way in, matrices of one kind share one projection; what tells them apart is an embedding of their position,
    number by number of the module's path, and of their rank component. On the way out, each has a basis of its own,
    in which its token says where the weights lie: fine-tuning leaves the directions of different layers unrelated, so
    a projection that they share would need a width of tasks times layers to reach all of them.
    """

    def __init__(self, config: LoraGeneratorConfig):
        super().__init__()
        self.blocks: tuple[MatrixBlock, ...] = config.lora_layout.blocks
        self.per_matrix = [1 if config.token_granularity == "matrix" else block.rank for block in self.blocks]
        widths = [b.rank * b.width // n for b, n in zip(self.blocks, self.per_matrix, strict=True)]
        if _encodes(config):
            self.in_projections = nn.ModuleList(nn.Linear(width, config.hidden_size) for width in widths)
        self.coordinate_proj = nn.Linear(config.hidden_size, config.basis_size)
        self.coordinate_norm = nn.LayerNorm(config.basis_size)  # of unit size, so that the bases learn at once
        self.bases = nn.ModuleList(
            TokenwiseLinear(block.count * n, config.basis_size, width)
            for block, n, width in zip(self.blocks, self.per_matrix, widths, strict=True)
        )
        # A number outside a module's path (paths differ in depth) is 0, a present one is itself + 1.
        depth = max(len(module.position) for block in self.blocks for module in block.modules)
        positions = [module.position for block in self.blocks for module in block.modules]
        highest = [max((p[slot] for p in positions if len(p) > slot), default=0) for slot in range(depth)]
        self.kind_embedding = nn.Embedding(len(self.blocks), config.hidden_size)
        self.position_embeddings = nn.ModuleList(nn.Embedding(top + 2, config.hidden_size) for top in highest)
        self.rank_embedding = nn.Embedding(max(self.per_matrix), config.hidden_size)

    def identities(self) -> torch.Tensor:
        """Return what says which matrix a token stands for, `(num_tokens, hidden_size)`."""
        device = self.kind_embedding.weight.device
        parts: list[torch.Tensor] = []
        for index, (block, per_matrix) in enumerate(zip(self.blocks, self.per_matrix, strict=True)):
            slots = len(self.position_embeddings)
            rows = [[p + 1 for p in m.position] + [0] * (slots - len(m.position)) for m in block.modules]
            positions = torch.tensor(rows, device=device)  # (count, slots)
            matrix = self.kind_embedding.weight[index] + sum(
                embedding(positions[:, slot]) for slot, embedding in enumerate(self.position_embeddings)
            )  # (count, hidden_size), or (hidden_size,) if no path has a number
            rank = self.rank_embedding.weight[:per_matrix]
            parts.append((matrix.expand(block.count, -1)[:, None] + rank).flatten(0, 1))
        return torch.cat(parts)

    def embed(self, normalized: torch.Tensor) -> torch.Tensor:
        """Turn weights `(batch, num_weights)` into tokens `(batch, num_tokens, hidden_size)`."""
        parts = zip(split(normalized, self.blocks), self.blocks, self.per_matrix, strict=True)
        views = [weights.flatten(1).unflatten(1, (block.count * n, -1)) for weights, block, n in parts]
        return torch.cat([project(view) for project, view in zip(self.in_projections, views, strict=True)], dim=1)

    def unembed(self, tokens: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Turn tokens, plus an offset of their coordinates, back into weights `(batch, num_weights)`."""
        counts = [block.count * n for block, n in zip(self.blocks, self.per_matrix, strict=True)]
        coordinates = self.coordinate_norm(self.coordinate_proj(tokens) + offset).split(counts, dim=1)
        return torch.cat([basis(part).flatten(1) for basis, part in zip(self.bases, coordinates, strict=True)], dim=1)


class TransformerCVAE(nn.Module):
    """Encoder and decoder over weight tokens, to each of which the condition is added."""

    def __init__(self, config: LoraGeneratorConfig):
        super().__init__()
        self.tokens = WeightTokens(config)
        self.condition_proj = nn.Linear(config.condition_size, config.hidden_size)
        if _encodes(config):
            self.summary_embedding = nn.Embedding(1, config.hidden_size)
            self.encoder = nn.ModuleList(Block(config) for _ in range(config.num_encoder_layers))
            self.encoder_norm = nn.LayerNorm(config.hidden_size)
            self.posterior_proj = nn.Linear(config.hidden_size, 2 * config.latent_size)
        self.latent_proj = nn.Linear(config.latent_size, config.hidden_size)
        self.decoder = nn.ModuleList(Block(config) for _ in range(config.num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(config.hidden_size)
        # Beside the decoder, which learns slowly what differs from task to task: a place in each basis that is linear
        # in the condition.
        num_tokens = len(self.tokens.identities())
        self.linear_path = TokenwiseLinear(num_tokens, config.condition_size, config.basis_size)

    def encode(self, normalized: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance of q(z | weights, task), each `(batch, latent_size)`."""
        summary = self.summary_embedding.weight.expand(len(normalized), 1, -1)
        weights = self.tokens.embed(normalized) + self.tokens.identities()
        x = torch.cat([summary, weights], dim=1) + self.condition_proj(condition)[:, None]
        for block in self.encoder:
            x = block(x)
        mean, logvar = self.posterior_proj(self.encoder_norm(x[:, 0])).chunk(2, dim=-1)
        return mean, logvar

    def decode(self, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return normalized weights `(batch, num_weights)`."""
        evidence = self.latent_proj(z) + self.condition_proj(condition)
        x = self.tokens.identities() + evidence[:, None]
        for block in self.decoder:
            x = block(x)
        offset = self.linear_path(condition[:, None].expand(-1, x.shape[1], -1))
        return self.tokens.unembed(self.decoder_norm(x), offset)


class Conv1dCVAE(nn.Module):
    """The paper's network: stride-2 convolutions over the flat weight vector (arXiv 2501.17635, section 4.1).

    Twelve blocks of kernel 7 halve the length each, and twelve transposed ones double it again; the condition joins
    the encoder's output and z. Unlike the published code, the padding at the end never enters a loss, and group
    normalization stands where batch normalization over a batch of two stood.
    """

    CHANNELS = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)

    def __init__(self, config: LoraGeneratorConfig):
        super().__init__()
        stride = 2 ** len(self.CHANNELS)
        self.num_weights = config.lora_layout.num_weights
        self.padding = -self.num_weights % stride
        self.length = (self.num_weights + self.padding) // stride  # after the last convolution
        condition, features = config.condition_size, self.CHANNELS[-1] * self.length
        downwards = (1, *self.CHANNELS)
        if _encodes(config):
            self.encoder = nn.Sequential(
                *[self._conv(nn.Conv1d, i, o) for i, o in zip(downwards, downwards[1:], strict=False)]
            )
            self.posterior_proj = nn.Linear(features + condition, 2 * config.latent_size)
        self.latent_proj = nn.Linear(config.latent_size + condition, features)
        upwards = (*reversed(self.CHANNELS), self.CHANNELS[0])
        self.decoder = nn.Sequential(
            *[self._conv(nn.ConvTranspose1d, i, o) for i, o in zip(upwards, upwards[1:], strict=False)]
        )
        self.out_conv = nn.Conv1d(self.CHANNELS[0], 1, kernel_size=7, padding=3)

    @staticmethod
    def _conv(kind: type, in_channels: int, out_channels: int) -> nn.Module:
        extra = {"output_padding": 1} if kind is nn.ConvTranspose1d else {}
        conv = kind(in_channels, out_channels, kernel_size=7, stride=2, padding=3, **extra)
        return nn.Sequential(conv, nn.GroupNorm(1, out_channels), nn.LeakyReLU())

    def encode(self, normalized: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.encoder(F.pad(normalized, (0, self.padding))[:, None]).flatten(1)
        mean, logvar = self.posterior_proj(torch.cat([features, condition], dim=1)).chunk(2, dim=-1)
        return mean, logvar

    def decode(self, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        features = self.latent_proj(torch.cat([z, condition], dim=1))
        x = self.decoder(features.unflatten(1, (-1, self.length)))
        return self.out_conv(x)[:, 0, : self.num_weights]


class Prior(nn.Module):
    """p(z | task): mean and log variance from the condition, starting near N(0, I)."""

    def __init__(self, config: LoraGeneratorConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.condition_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, 2 * config.latent_size)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = self.out_proj(F.gelu(self.norm(self.in_proj(condition)))).chunk(2, dim=-1)
        return mean, logvar


class Int8(nn.Module):
    """A weight as int8 with one scale per row, to be registered as its parametrization."""

    def forward(self, rounded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rounded.to(scale.dtype) * scale

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return (weight / scale).round().to(torch.int8), scale


def _encodes(config: LoraGeneratorConfig) -> bool:
    return config.has_encoder and config.prior != "none"  # without a latent there is nothing to encode into


NETWORKS: dict[str, type[TransformerCVAE] | type[Conv1dCVAE]] = {"transformer": TransformerCVAE, "conv1d": Conv1dCVAE}


def check_size(config: LoraGeneratorConfig) -> None:
    """Refuse sizes of which a generator could not be made, by making one that has no memory.

    Raises:
        IncompatibleAdapterError: with the largest tensors.
    """
    try:
        with torch.device("meta"):
            network = NETWORKS[config.architecture](config)
            parts = nn.ModuleDict({"statistics": ZooNormalizer(config), "network": network, "prior": Prior(config)})
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
    config_class = LoraGeneratorConfig
    base_model_prefix = "generator"
    main_input_name = "task_vector"
    model_tags = ["hf_icm_lora"]
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["zoo_normalizer"]

    def __init__(self, config: LoraGeneratorConfig):
        if config.layout is None:
            raise IncompatibleAdapterError("A generator needs a layout: make its configuration with from_zoo().")
        check_size(config)
        super().__init__(config)
        self.zoo_normalizer = ZooNormalizer(config)
        self.network = NETWORKS[config.architecture](config)
        self.prior = Prior(config) if config.prior == "learned" else None
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
        elif isinstance(module, TokenwiseLinear):
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif isinstance(module, ZooNormalizer):
            # Or a checkpoint without statistics would come up with garbage.
            for name, buffer in module.named_buffers():
                (init.ones_ if name.endswith("_scale") else init.zeros_)(buffer)
        else:
            super()._init_weights(module)

    @property
    def shared_weights(self) -> torch.Tensor:
        """What all adapters of this generator share, `(num_shared_weights,)`, fp32."""
        return self.zoo_normalizer.shared_weights

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
        if tuple(dataset.shared_weights.shape) != tuple(normalizer.shared_weights.shape):
            raise IncompatibleAdapterError(
                f"Expected {normalizer.shared_weights.numel()} shared weights, found "
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
            if isinstance(module, (nn.Linear, TokenwiseLinear)):
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
