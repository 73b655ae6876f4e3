"""The networks of a generator: two that encode and decode packed weights, behind one interface, and the prior.

Both have `encode(normalized, condition) -> mean, logvar` and `decode(z, condition) -> normalized`. Shapes: `normalized
(batch, num_weights)`, `condition (batch, condition_size)`, `z`, `mean` and `logvar (batch, latent_size)`, and tokens
`(batch, num_tokens, hidden_size)`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_lora_generator import LoraGeneratorConfig
from .layout import MatrixBlock, split


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

    def __init__(self, num_tokens: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_tokens, out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight).transpose(0, 1)


class WeightTokens(nn.Module):
    """Weights as tokens: one per matrix, or one per rank component of each matrix.

    On the way in, matrices of one kind share one projection; what tells them apart is an embedding of their position,
    number by number of the module's path, and of their rank component. On the way out, each has a basis of its own,
    in which its token says where the weights lie: fine-tuning leaves the directions of different layers unrelated, so
    a projection that they share would need a width of tasks times layers to reach all of them. Beside a
    closed form the bases have no mean adapter, and start at 0.
    """

    def __init__(self, config: LoraGeneratorConfig):
        super().__init__()
        self.blocks: tuple[MatrixBlock, ...] = config.lora_layout.blocks
        self.per_matrix = [1 if config.token_granularity == "matrix" else block.rank for block in self.blocks]
        widths = [b.rank * b.width // n for b, n in zip(self.blocks, self.per_matrix, strict=True)]
        if encodes(config):
            self.in_projections = nn.ModuleList(nn.Linear(width, config.hidden_size) for width in widths)
        self.coordinate_proj = nn.Linear(config.hidden_size, config.basis_size)
        self.coordinate_norm = nn.LayerNorm(config.basis_size)  # of unit size, so that the bases learn at once
        self.bases = nn.ModuleList(
            TokenwiseLinear(block.count * n, config.basis_size, width, bias=config.closed_form is None)
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
        if encodes(config):
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
        if encodes(config):
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


def encodes(config: LoraGeneratorConfig) -> bool:
    """Return whether a generator of this configuration has an encoder."""
    return config.has_encoder and config.prior != "none"  # without a latent there is nothing to encode into


NETWORKS: dict[str, type[TransformerCVAE] | type[Conv1dCVAE]] = {"transformer": TransformerCVAE, "conv1d": Conv1dCVAE}
