"""The layout of a LoRA: which matrices, of which shapes, in which order; a state dict becomes one vector and back.

Every matrix has a *kind*, its module's path with the numbers replaced by `*`, and a *position*, those numbers:
`model.layers.7.self_attn.q_proj` is kind `model.layers.*.self_attn.q_proj` at position `(7,)`. This holds for any
architecture. The vector is ordered kind by kind, so that all matrices of one kind are one contiguous block
`(count, rank, width)`, which a network can read without copying. Both matrices are stored as rows per rank
component: A is `(rank, in_features)` as it is, B `(out_features, rank)` is transposed.

B @ A is unique, (A, B) is not: B R^-1 and R A are the same adapter for any invertible R. A layout says what is left
of that freedom, its gauge:

    frozen_a      all adapters share one A that was never trained; only B varies, and B @ A is linear in it
    shared_init   A and B were both trained, from the same start
    free          A and B of any origin: only their products can be compared
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .errors import CorruptAdapterError, IncompatibleAdapterError
from .files import sha256_of
from .lora_config import check_module_name, check_plain_lora, lora_scaling

PREFIX = "base_model.model."  # of every key in a PEFT state dict
GAUGES = ("frozen_a", "shared_init", "free")

MAX_SIZE = 2**24  # of a side of a matrix


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: its path in the base model, its sizes, and the rank of its LoRA."""

    name: str
    in_features: int
    out_features: int
    rank: int

    @property
    def kind(self) -> str:
        return ".".join("*" if part.isdigit() else part for part in self.name.split("."))

    @property
    def position(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.name.split(".") if part.isdigit())


@dataclass(frozen=True)
class MatrixBlock:
    """All LoRA matrices of one kind, factor and shape: a contiguous block `(count, rank, width)` of the vector.

    Args:
        kind (`str`): Path of the modules with `*` for numbers.
        factor (`str`): `"lora_A"` or `"lora_B"`.
        modules (`tuple[LoraModule, ...]`): The adapted modules, by position.
        width (`int`): `in_features` for A, `out_features` for B.
    """

    kind: str
    factor: str
    modules: tuple[LoraModule, ...]
    width: int

    @property
    def count(self) -> int:
        return len(self.modules)

    @property
    def rank(self) -> int:
        return self.modules[0].rank

    @property
    def size(self) -> int:
        return self.count * self.rank * self.width

    def keys(self) -> list[str]:
        """The keys of these matrices in a PEFT state dict."""
        return [f"{PREFIX}{module.name}.{self.factor}.weight" for module in self.modules]


@dataclass(frozen=True)
class LoraLayout:
    """Which LoRA matrices there are, and which of them vary from adapter to adapter.

    Args:
        modules (`tuple[LoraModule, ...]`): The adapted modules, sorted by kind and position.
        gauge (`str`): `"frozen_a"`, `"shared_init"` or `"free"`.

    Example:
        >>> layout = LoraLayout.from_state_dict(state_dict, lora_config, gauge="frozen_a")  # doctest: +SKIP
        >>> lora_weights, shared_weights = layout.pack(state_dict, lora_config)  # doctest: +SKIP
        >>> layout.unpack(lora_weights, shared_weights)  # doctest: +SKIP
    """

    modules: tuple[LoraModule, ...]
    gauge: str

    def __post_init__(self) -> None:
        if self.gauge not in GAUGES:
            raise IncompatibleAdapterError(f"Expected the gauge to be one of {GAUGES}, found {self.gauge!r}.")
        if not self.modules:
            raise IncompatibleAdapterError("Expected at least one adapted module, found none.")
        for module in self.modules:
            check_module_name(module.name)
            sizes = (module.in_features, module.out_features, module.rank)
            if not all(isinstance(size, int) and 0 < size <= MAX_SIZE for size in sizes):
                raise IncompatibleAdapterError(
                    f"{module.name}: expected positive sizes up to {MAX_SIZE}, found {str(sizes):.200}."
                )
        if repeated := [name for name, count in Counter(m.name for m in self.modules).items() if count > 1]:
            raise IncompatibleAdapterError(f"{repeated[0]}: stands twice among the adapted modules.")
        ordered = tuple(sorted(self.modules, key=lambda m: (m.kind, m.position, m.name)))
        object.__setattr__(self, "modules", ordered)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor], lora_config: Mapping, gauge: str) -> "LoraLayout":
        """Read the layout off a PEFT state dict.

        Raises:
            IncompatibleAdapterError: if the configuration asks for more than two plain matrices per module.
            CorruptAdapterError: if a key is no LoRA matrix, or half of a pair is missing.
        """
        check_plain_lora(lora_config)
        names, strays = set(), []
        for key in state_dict:
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", key)
            names.add(match[1]) if match else strays.append(key)
        if strays:
            raise CorruptAdapterError(
                f"Expected only keys like '{PREFIX}<module>.lora_A.weight', found {sorted(strays)[:3]}."
            )
        modules = []
        for name in sorted(names):
            a, b = (state_dict.get(f"{PREFIX}{name}.lora_{factor}.weight") for factor in "AB")
            if a is None or b is None:
                raise CorruptAdapterError(f"{name}: lora_{'A' if a is None else 'B'}.weight is missing.")
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise IncompatibleAdapterError(
                    f"{name}: expected lora_A (rank, in_features) and lora_B (out_features, rank), found "
                    f"{tuple(a.shape)} and {tuple(b.shape)}."
                )
            modules.append(LoraModule(name, a.shape[1], b.shape[0], a.shape[0]))
        return cls(tuple(modules), gauge)

    @cached_property
    def blocks(self) -> tuple[MatrixBlock, ...]:
        """The matrices that vary, in the order in which they lie in the vector `lora_weights`."""
        return self._blocks(("lora_B",) if self.gauge == "frozen_a" else ("lora_A", "lora_B"))

    @cached_property
    def shared_blocks(self) -> tuple[MatrixBlock, ...]:
        """The matrices that all adapters share, in the order of the vector `shared_weights`."""
        return self._blocks(("lora_A",) if self.gauge == "frozen_a" else ())

    def _blocks(self, factors: tuple[str, ...]) -> tuple[MatrixBlock, ...]:
        # Modules of one kind may differ in size (a vision backbone widens with depth): one block per shape.
        groups: dict[tuple, list[LoraModule]] = {}
        for factor in factors:
            for module in self.modules:
                width = module.in_features if factor == "lora_A" else module.out_features
                groups.setdefault((module.kind, factor, module.rank, width), []).append(module)
        return tuple(MatrixBlock(kind, factor, tuple(modules), width)
                     for (kind, factor, _, width), modules in groups.items())  # fmt: skip

    @property
    def num_weights(self) -> int:
        """Length of the vector `lora_weights`."""
        return sum(block.size for block in self.blocks)

    @property
    def num_shared_weights(self) -> int:
        """Length of the vector `shared_weights`."""
        return sum(block.size for block in self.shared_blocks)

    @property
    def max_rank(self) -> int:
        """The largest rank of any module, which an exported adapter has everywhere."""
        return max(module.rank for module in self.modules)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that two layouts share exactly if they are equal."""
        return sha256_of(json.dumps(self.to_dict(), sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as plain JSON values; [`LoraLayout.from_dict`] is the way back."""
        return {"gauge": self.gauge, "modules": [list(dataclasses.astuple(module)) for module in self.modules]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoraLayout":
        """Read a layout back from [`LoraLayout.to_dict`]."""
        try:
            return cls(tuple(LoraModule(*module) for module in values["modules"]), values["gauge"])
        except (KeyError, TypeError) as error:
            raise IncompatibleAdapterError(f"Not a LoRA layout: {error!r} in {str(values)[:200]}.") from error

    def pack(self, state_dict: Mapping[str, torch.Tensor], lora_config: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn a PEFT state dict into vectors, with the scaling (alpha / r, rsLoRA, patterns) folded into B.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): Keys as PEFT saves them, in any order and dtype.
            lora_config (`Mapping`): The adapter's `LoraConfig` as a dictionary.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `lora_weights` `(num_weights,)` and `shared_weights`
            `(num_shared_weights,)`, both fp32.

        Raises:
            IncompatibleAdapterError: if modules or shapes are not those of this layout.
            CorruptAdapterError: if a value is not finite.
        """
        found = LoraLayout.from_state_dict(state_dict, lora_config, self.gauge)
        if found.modules != self.modules:
            raise IncompatibleAdapterError(f"The adapter has another layout. {_first_difference(self, found)}")
        matrices = {key: tensor.detach().to("cpu", torch.float32) for key, tensor in state_dict.items()}
        for module in self.modules:
            key = f"{PREFIX}{module.name}.lora_B.weight"
            matrices[key] = matrices[key] * lora_scaling(lora_config, module.name, module.rank)
        lora_weights, shared_weights = (_flatten(matrices, blocks) for blocks in (self.blocks, self.shared_blocks))
        if not (lora_weights.isfinite().all() and shared_weights.isfinite().all()):
            key, count = next((k, n) for k, m in matrices.items() if (n := int((~m.isfinite()).sum())))
            raise CorruptAdapterError(f"{key} holds {count} values that are not finite.")
        return lora_weights, shared_weights

    def factors(
        self, lora_weights: torch.Tensor, shared_weights: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """View vectors as the two matrices of each module.

        Args:
            lora_weights (`torch.Tensor` of shape `(..., num_weights)`), shared_weights (`(num_shared_weights,)`).

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: module -> A `(..., rank, in_features)` and B transposed,
            `(..., rank, out_features)`; what all adapters share has no leading dimensions.
        """
        matrices: dict[str, dict[str, torch.Tensor]] = {module.name: {} for module in self.modules}
        for vector, blocks in ((lora_weights, self.blocks), (shared_weights, self.shared_blocks)):
            for block, values in zip(blocks, split(vector, blocks), strict=True):
                for module, matrix in zip(block.modules, values.unbind(-3), strict=True):
                    matrices[module.name][block.factor] = matrix
        return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in matrices.items()}

    def stacked_factors(
        self, lora_weights: torch.Tensor, shared_weights: torch.Tensor
    ) -> dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]]:
        """As `factors`, with the modules of equal sizes stacked: names -> `(..., count, rank, width)` each."""
        factors = self.factors(lora_weights, shared_weights)
        groups: dict[tuple[int, int, int], list[str]] = {}
        for module in self.modules:
            groups.setdefault((module.rank, module.in_features, module.out_features), []).append(module.name)
        return {
            tuple(names): (
                torch.stack([factors[name][0] for name in names], dim=-3),
                torch.stack([factors[name][1] for name in names], dim=-3),
            )
            for names in groups.values()
        }

    def scaled(self, lora_weights: torch.Tensor, scale: float) -> torch.Tensor:
        """Return vectors `(..., num_weights)` with each B, and so each B @ A, multiplied by a number."""
        parts = lora_weights.split([block.size for block in self.blocks], dim=-1)
        pairs = zip(parts, self.blocks, strict=True)
        return torch.cat([scale * part if block.factor == "lora_B" else part for part, block in pairs], dim=-1)

    def unpack(self, lora_weights: torch.Tensor, shared_weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn vectors back into a PEFT state dict whose scaling is 1 (`lora_alpha == r`).

        All modules get [`LoraLayout.max_rank`], smaller ones padded with zeros: what every server can read.

        Args:
            lora_weights (`torch.Tensor` of shape `(num_weights,)`), shared_weights (`(num_shared_weights,)`).

        Returns:
            `dict[str, torch.Tensor]`: one contiguous tensor per matrix, none sharing memory with another.
        """
        state_dict = {}
        for vector, blocks in ((lora_weights, self.blocks), (shared_weights, self.shared_blocks)):
            for block, values in zip(blocks, split(vector, blocks), strict=True):
                for key, matrix in zip(block.keys(), values, strict=True):  # matrix is (rank, width)
                    padding = matrix.new_zeros(self.max_rank - block.rank, block.width)
                    rows = torch.cat([matrix, padding])
                    state_dict[key] = rows.T.contiguous() if block.factor == "lora_B" else rows
        return state_dict


def module_names(state_dict: Mapping[str, Any]) -> set[str]:
    """Return the paths of the modules that a PEFT state dict has matrices for."""
    return {key.removeprefix(PREFIX).rsplit(".", 2)[0] for key in state_dict}


def split(vector: torch.Tensor, blocks: tuple[MatrixBlock, ...]) -> list[torch.Tensor]:
    """View a vector `(..., num_weights)` as its blocks, each `(..., count, rank, width)`."""
    parts = vector.split([block.size for block in blocks], dim=-1)
    return [part.unflatten(-1, (block.count, block.rank, block.width))
            for part, block in zip(parts, blocks, strict=True)]  # fmt: skip


def _flatten(matrices: Mapping[str, torch.Tensor], blocks: tuple[MatrixBlock, ...]) -> torch.Tensor:
    rows = [matrices[key].T if block.factor == "lora_B" else matrices[key] for block in blocks for key in block.keys()]
    return torch.cat([row.reshape(-1) for row in rows]) if rows else torch.zeros(0)


def _first_difference(expected: LoraLayout, found: LoraLayout) -> str:
    expected_modules, found_modules = ({m.name: m for m in layout.modules} for layout in (expected, found))
    differences = []
    for name in sorted(expected_modules.keys() | found_modules.keys()):
        one, other = expected_modules.get(name), found_modules.get(name)
        if one != other:
            differences.append(f"{name}: expected {_shape(one)}, found {_shape(other)}")
    return "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more." if len(differences) > 3 else ".")


def _shape(module: LoraModule | None) -> str:
    return f"rank {module.rank}, {module.in_features} -> {module.out_features}" if module else "no such module"
