"""The closed form, meta-learned: how a generator writes an adapter from examples.

[`in_context_adapter`] carries a base model without examples to the hidden states that it has with them. Here the parts
of that regression were trained, through the base model, on many tasks: who reads the examples (the base with a LoRA
of its own, the reader), which features of a token are regressed on (one A for all tasks), how much each position
counts, and what is written beside the difference of hidden states: maps of the reader's state and of the token that
comes next. The result is a plain LoRA, written layer by layer in two passes, without a gradient step.

With memory tokens, the reader reads some learned embeddings at the end of what it reads. Each is one more position of
the regression, with learned features and a value from the reader's state there. A description without examples is then
enough: only the memory tokens are regressed on.

Shapes: `n` examples with answers of up to `a` tokens, `r` the rank, `d` the base model's hidden size.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .base_model import base_model_fingerprint
from .behaviour import batched_lora
from .closed_form import Block, States, hidden_of, hook, residual_blocks, states_in_conversations, weight_of_place
from .configuration_lora_generator import LoraGeneratorConfig
from .errors import IncompatibleAdapterError
from .layout import LoraLayout, LoraModule
from .lora_config import shortest_target_modules
from .reading import MAX_EXAMPLES, Reading, positions

MATRICES = ("keys", "constant", "state_in", "state_out", "label_in", "label_out")
OF_MEMORY = ("memory_keys", "memory_in", "memory_out")  # further matrices, where there are memory tokens
MEMORY_WEIGHT = 0.05  # before training: memory tokens then change little of what the examples say
KINDS = 4  # of positions: what predicts an answer's first token, its second, its last, and any other


class Matrices(nn.Module):
    """One matrix per layer, `(layers, rows, columns)`, which a generator in 8 bits rounds."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class LearnedClosedForm(nn.Module):
    """All that is learned of the closed form. Before training it is the plain one: the base itself reads.

    Args:
        layout (`LoraLayout`): Of the adapters: one module in each layer of the base, in the gauge `"frozen_a"`.
        reader (`LoraLayout`): Of the LoRA with which the base reads.
        state_rank, label_rank (`int`): Of the maps from the reader's state, and from the next token.
        num_memory (`int`, *optional*, defaults to 0): Memory tokens.
    """

    key_scale: torch.Tensor  # (layers,): makes keys of unit length give features of about 1
    scale: torch.Tensor  # (layers,): of what a context changes in a layer's output

    def __init__(self, layout: LoraLayout, reader: LoraLayout, state_rank: int, label_rank: int, num_memory: int = 0):
        super().__init__()
        if layout.gauge != "frozen_a" or len(layout.blocks) != 1:
            raise IncompatibleAdapterError(
                "The learned closed form writes one matrix of one size in each layer, with an A that all tasks share."
            )
        (keys,), (values,) = layout.shared_blocks, layout.blocks
        self.layout, self.reader_layout, self.num_memory = layout, reader, num_memory
        count, rank, size = values.count, values.rank, values.width
        self.keys = Matrices(count, rank, keys.width)  # A
        self.constant = Matrices(count, rank, size)  # the part of B that all tasks have
        self.log_penalty = nn.Parameter(torch.empty(count))
        self.gain = nn.Parameter(torch.empty(count, size))
        self.log_kind = nn.Parameter(torch.empty(count, KINDS))
        self.log_index = nn.Parameter(torch.empty(MAX_EXAMPLES))
        self.state_in = Matrices(count, size, state_rank)
        self.state_out = Matrices(count, state_rank, size)
        self.label_in = Matrices(count, size, label_rank)
        self.label_out = Matrices(count, label_rank, size)
        self.reader = nn.ModuleList(Matrices(block.count, block.rank, block.width) for block in reader.blocks)
        if num_memory:
            self.memory = nn.Parameter(torch.empty(num_memory, size))  # what the reader reads
            self.memory_keys = Matrices(count, num_memory, rank)
            self.memory_in = Matrices(count, size, state_rank)
            self.memory_out = Matrices(count, state_rank, size)
            self.log_memory = nn.Parameter(torch.empty(count, num_memory))
        self.register_buffer("key_scale", torch.ones(count))
        self.register_buffer("scale", torch.ones(count))

    @classmethod
    def from_config(cls, config: LoraGeneratorConfig) -> "LearnedClosedForm":
        """Make the one that a generator's configuration describes."""
        sizes = dict(config.closed_form or {})
        reader = LoraLayout.from_dict(sizes.pop("reader"))
        return cls(config.lora_layout, reader, **sizes)

    def reset_parameters(self) -> None:
        """Become the plain closed form, with random keys: the base itself reads, and values are differences."""
        for matrices in (self.constant, self.state_out, self.label_out):
            init.zeros_(matrices.weight)
        for matrices in (self.state_in, self.label_in):
            init.normal_(matrices.weight, std=matrices.weight.shape[1] ** -0.5)
        init.normal_(self.keys.weight, std=self.keys.weight.shape[2] ** -0.5)
        for block, factor in zip(self.reader_layout.blocks, self.reader, strict=True):
            weight = cast(Matrices, factor).weight
            if block.factor == "lora_A":
                init.normal_(weight, std=block.width**-0.5)
            else:
                init.zeros_(weight)
        init.constant_(self.log_penalty, math.log(0.3))
        init.ones_(self.gain)
        init.zeros_(self.log_kind)
        init.copy_(self.log_index, weight_of_place(torch.arange(MAX_EXAMPLES)).log())
        if self.num_memory:
            init.normal_(self.memory, std=0.1)  # about the size of embeddings
            init.normal_(self.memory_keys.weight)
            init.normal_(self.memory_in.weight, std=self.memory_in.weight.shape[1] ** -0.5)
            init.zeros_(self.memory_out.weight)
            init.constant_(self.log_memory, math.log(MEMORY_WEIGHT))
        init.ones_(self.key_scale)
        init.ones_(self.scale)

    def layers(self) -> list[dict[str, torch.Tensor]]:
        """Return what is learned of each layer, fp32, without the reader."""
        matrices, others = [*MATRICES], ["log_penalty", "gain", "log_kind", "key_scale", "scale"]
        if self.num_memory:
            matrices += OF_MEMORY
            others.append("log_memory")
        stacks = {name: getattr(self, name).weight for name in matrices}  # which 8 bits compute anew at every use
        stacks |= {name: getattr(self, name) for name in others}
        rows = zip(*(stack.float().unbind(0) for stack in stacks.values()), strict=True)
        return [dict(zip(stacks, row, strict=True)) for row in rows]

    @property
    def shared_weights(self) -> torch.Tensor:
        """A, as all adapters have it: `(num_shared_weights,)`."""
        return (self.keys.weight * self.key_scale[:, None, None]).flatten()

    @property
    def reader_weights(self) -> torch.Tensor:
        """The reader's LoRA, `(num_weights,)` of its layout."""
        return torch.cat([cast(Matrices, factor).weight.flatten() for factor in self.reader])

    def forward(self, base_model: PreTrainedModel, reading: Reading) -> torch.Tensor:
        """Write an adapter from what was read of a task.

        Args:
            base_model (`PreTrainedModel`): Without adapters, at rest.
            reading (`Reading`): As from [`read_examples`] or, if there are memory tokens, [`read_description`].

        Returns:
            `torch.Tensor` of shape `(num_weights,)`, fp32.

        Raises:
            IncompatibleAdapterError: if the base's layers are not those of the layout.
        """
        blocks, own = residual_blocks(base_model), [module.name for module in self.layout.modules]
        if (found := [block.writer_name for block in blocks]) != own:
            raise IncompatibleAdapterError(
                f"Expected a base model whose {len(own)} layers end with {own[0]} and its like, found {len(found)} "
                f"layers that end with {found[0]} and its like."
            )
        states = self.states(base_model, reading, blocks)
        if not reading.rows:
            return self._from_memory(states)
        return self.write(base_model, reading, blocks, states)

    def states(self, base_model: PreTrainedModel, reading: Reading, blocks: Sequence[Block]) -> list[States]:
        """Return the reader's hidden states at the answers and at the memory tokens of each conversation."""
        device = next(base_model.parameters()).device
        weights, nothing = self.reader_weights[None].to(device), torch.empty(0, device=device)
        memory = self.memory if self.num_memory else None
        with batched_lora(base_model, self.reader_layout, weights, nothing):
            return states_in_conversations(base_model, reading, blocks, memory)

    def write(
        self, base_model: PreTrainedModel, reading: Reading, blocks: Sequence[Block], states: Sequence[States]
    ) -> torch.Tensor:
        """Pass each example alone through the base, and write B layer by layer on the way."""
        device = next(base_model.parameters()).device
        batch = reading.batch(device)
        at, mask = positions(reading.starts, reading.answers, device)
        kind = _kinds(mask)
        longest = mask.shape[1]
        targets = torch.tensor([answer + [0] * (longest - len(answer)) for answer in reading.answers], device=device)
        embedded = base_model.get_input_embeddings()(targets).float()
        following = F.rms_norm(embedded, embedded.shape[-1:])  # (n, a, d)
        rows = torch.arange(len(reading.rows), device=device)[:, None]
        adapter: list[torch.Tensor] = []
        layers = self.layers()

        with ExitStack() as stack:
            for index, (block, own) in enumerate(zip(blocks, layers, strict=True)):
                inputs: list[torch.Tensor] = []

                def keep(_module, args, inputs=inputs):
                    inputs.append(args[0].reshape(*batch["input_ids"].shape, -1))

                def update(_module, _args, output, inputs=inputs, index=index, own=own):
                    hidden, u = hidden_of(output), inputs.pop()
                    features = u @ (own["keys"] * own["key_scale"]).to(u.dtype).T
                    constant = own["constant"] * own["scale"]
                    hidden = hidden + features @ constant.to(u.dtype)
                    alone = features[rows, at].float(), hidden[rows, at].float()
                    b = self._solve(index, own, *alone, following, kind, states)
                    adapter.append(b + constant)
                    hidden = hidden + features @ b.to(u.dtype)
                    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

                stack.enter_context(hook(block.writer.register_forward_pre_hook(keep)))
                stack.enter_context(hook(block.module.register_forward_hook(update)))
            base_model.base_model(**batch, use_cache=False)
        return torch.stack(adapter).flatten()

    def _from_memory(self, states: Sequence[States]) -> torch.Tensor:
        """Write an adapter without examples. No layer needs to know what those below it do to one."""
        adapter = []
        for index, own in enumerate(self.layers()):
            regressed = [memory_positions(own, one.memory[index]) for one in states]
            adapter.append(ridge_over(regressed, own) + own["constant"] * own["scale"])
        return torch.stack(adapter).flatten()

    def _solve(
        self,
        index: int,
        own: dict[str, torch.Tensor],
        features: torch.Tensor,
        hidden: torch.Tensor,
        following: torch.Tensor,
        kind: torch.Tensor,
        states: Sequence[States],
    ) -> torch.Tensor:
        """Return one layer's B `(r, d)`: the weighted ridge regression of values on features, over all that was read.

        Args:
            index (`int`): Of the layer. own (`dict[str, torch.Tensor]`): What is learned of it.
            features (`(n, a, r)`), hidden (`(n, a, d)`): Of the examples alone, at their answers.
            following (`(n, a, d)`): The tokens that come next. kind (`(n, a)`): Of `KINDS`.
            states: As from `states`.
        """
        regressed = []
        for one in states:
            state, mask, order = one.layers[index], one.mask, one.order
            longest = state.shape[1]
            from_state = F.rms_norm(state, state.shape[-1:]) @ own["state_in"] @ own["state_out"]
            from_label = following[order, :longest] @ own["label_in"] @ own["label_out"]
            change = state - hidden[order, :longest]
            values = own["gain"] * change + own["scale"] * (from_state + from_label)
            place = self.log_index[: len(order), None].float()  # an example that was read after few says little
            weight = (own["log_kind"][kind[order, :longest]] + place).exp()
            regressed.append((features[order, :longest][mask], values[mask], weight[mask]))
            if self.num_memory:
                regressed.append(memory_positions(own, one.memory[index]))
        return ridge_over(regressed, own)


def memory_positions(
    own: dict[str, torch.Tensor], state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features, values and weights of a layer's memory tokens, from the reader's states there."""
    values = own["scale"] * (F.rms_norm(state, state.shape[-1:]) @ own["memory_in"] @ own["memory_out"])
    return own["memory_keys"], values, own["log_memory"].exp()


def ridge_over(
    regressed: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], own: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return one layer's B of several sets of positions: features, values and weights of each."""
    features, values, weights = (torch.cat(parts) for parts in zip(*regressed, strict=True))
    return weighted_ridge(features, values, weights, own["log_penalty"].exp())


def closed_form_config(
    base_model: PreTrainedModel,
    *,
    rank: int = 64,
    reader_rank: int = 16,
    state_rank: int = 32,
    label_rank: int = 64,
    num_memory: int = 0,
    **fields,
) -> LoraGeneratorConfig:
    """Make the configuration of a generator with a closed form, for a base model.

    Args:
        base_model (`PreTrainedModel`): A decoder-only model without adapters.
        rank (`int`, *optional*, defaults to 64): Of the adapters.
        reader_rank (`int`, *optional*, defaults to 16): Of the LoRA, on all linear layers, with which the base reads.
        state_rank (`int`, *optional*, defaults to 32), label_rank (`int`, *optional*, defaults to 64): As in
            [`LearnedClosedForm`].
        num_memory (`int`, *optional*, defaults to 0): Memory tokens. With some of them, the closed form also writes
            from a description alone.
        fields: Further fields of the configuration.

    Raises:
        IncompatibleAdapterError: if the base's layers do not end with a linear map.

    Example:
        >>> generator = LoraGeneratorModel(closed_form_config(base))  # doctest: +SKIP
    """
    blocks = residual_blocks(base_model)
    written = tuple(_lora_module(block.writer_name, block.writer, rank) for block in blocks)
    paths = {module: name for name, module in base_model.named_modules()}
    linear = [m for block in blocks for m in block.module.modules() if isinstance(m, (nn.Linear, Conv1D))]
    read = tuple(_lora_module(paths[module], module, reader_rank) for module in linear)
    lora_config = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": shortest_target_modules([module.name for module in written], base_model),
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": isinstance(blocks[0].writer, Conv1D),
    }
    reader = LoraLayout(read, "free").to_dict()
    of_base: dict[str, Any] = {
        "layout": LoraLayout(written, "frozen_a").to_dict(),
        "lora_config": lora_config,
        "base_model_name_or_path": base_model.config._name_or_path or None,
        "base_model_fingerprint": base_model_fingerprint(base_model),
        "closed_form": {
            "reader": reader, "state_rank": state_rank, "label_rank": label_rank, "num_memory": num_memory,
        },
    }  # fmt: skip
    return LoraGeneratorConfig(**of_base | fields)


def _lora_module(name: str, linear: nn.Module, rank: int) -> LoraModule:
    weight = cast(torch.Tensor, linear.weight)
    outs, ins = weight.T.shape if isinstance(linear, Conv1D) else weight.shape
    return LoraModule(name, ins, outs, rank)


def weighted_ridge(
    features: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, penalty: torch.Tensor
) -> torch.Tensor:
    """Return B `(r, d)` of the weighted ridge regression of values on features.

    Args:
        features (`torch.Tensor` of shape `(tokens, r)`), values (`(tokens, d)`), weight (`(tokens,)`): fp32.
        penalty (`torch.Tensor`): In units of the features' mean square.
    """
    wide = features.double()  # with fewer tokens than features, the penalty alone keeps the matrix from being singular
    weighted = wide * weight[:, None]
    strength = penalty * (weighted * wide).sum() / weight.sum().clamp_min(1e-6) + 1e-6
    matrix = weighted.T @ wide + strength * torch.eye(wide.shape[1], device=wide.device)
    return torch.cholesky_solve(weighted.T @ values.double(), torch.linalg.cholesky(matrix)).float()


def _kinds(mask: torch.Tensor) -> torch.Tensor:
    """Return the kind of each position `(n, a)`: first, second, other, last."""
    steps = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return torch.where(steps == mask.sum(1, keepdim=True) - 1, 3, steps.clamp(max=2))
