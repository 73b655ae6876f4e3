"""Adapters from elsewhere: of any rank, scaling, dtype, seed and choice of modules, into one layout.

Everything that changes numbers and not the adapter is folded in: alpha, rsLoRA, patterns, padding of ranks, modules
that an adapter lacks. A smaller rank than an adapter's own is the one step that loses something, and says how much.

Adapters that share the row space of A (trained from one frozen A, in any coordinates of it) keep their cheaper form:
one A for all of them, and B alone varies. Of all others A and B vary, as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from .adapter import CONFIG_FILE, WEIGHTS_FILE, check_fit, load_adapter
from .errors import IcmLoraError, IncompatibleAdapterError
from .layout import PREFIX, LoraLayout, LoraModule
from .products import product_error, with_rank
from .provenance import is_local

# Relative error of B @ A below which an adapter lies in the row space of a shared A: fp16's rounding.
SHARED_ROWS = 1e-3
KEPT_FIELDS = ("task_type", "fan_in_fan_out")
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> A (rank, in_features), B transposed (rank, out)


@dataclass
class ForeignAdapter:
    """What is known of an adapter before it is converted.

    Args:
        task (`str`): Name of the task it is for.
        source (`str`): Hub id, or name of the folder.
        folder (`Path`): Where its files are.
        modules (`tuple[LoraModule, ...]`): Its own layout.
        kept_fields (`dict`): Of its `LoraConfig`, those that say what kind of model it is for.
        changes (`list[str]`): What has to be converted.
        lost_energy (`float`): Part of the squared singular values of all B @ A that a smaller rank cuts off.
        refused (`str`, *optional*): Why it cannot be taken.
    """

    task: str
    source: str
    folder: Path | None = None
    modules: tuple[LoraModule, ...] = ()
    kept_fields: dict[str, Any] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    lost_energy: float = 0.0
    refused: str | None = None

    @property
    def rank(self) -> int:
        return max((module.rank for module in self.modules), default=0)

    def row(self) -> dict[str, Any]:
        """Return what became of it, as plain values."""
        status = "refused" if self.refused else "converted" if self.changes else "taken"
        return {
            "task": self.task,
            "source": self.source,
            "status": status,
            "rank": self.rank or None,
            "changes": self.changes,
            "lost_energy": self.lost_energy,
            "reason": self.refused,
        }


def adapter_folder(source: str | Path, revision: str | None = None, token: bool | str | None = None) -> Path:
    """Return the folder of an adapter, downloaded from the Hub if it is an id there.

    Raises:
        IncompatibleAdapterError: if it is neither a folder nor an id.
    """
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or is_local(source) or "/" not in source:
        raise IncompatibleAdapterError(f"{source} is no folder, and no id on the Hub.")
    files = [CONFIG_FILE, WEIGHTS_FILE]
    return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=files))


def inspect(
    task: str,
    source: str | Path,
    base_model: nn.Module,
    base_name: str | None,
    revision: str | None = None,
    token: bool | str | None = None,
) -> ForeignAdapter:
    """Find an adapter, check that it is a plain LoRA of the base model, and note what must be converted."""
    found = ForeignAdapter(task, Path(source).name if is_local(str(source)) or isinstance(source, Path) else source)
    try:
        found.folder = adapter_folder(source, revision, token)
        lora_config, state_dict = load_adapter(found.folder)
        _check_base_name(lora_config.get("base_model_name_or_path"), base_name)
        found.modules = LoraLayout.from_state_dict(state_dict, lora_config, "shared_init").modules
        check_fit(base_model, lora_config, state_dict)
    except (IcmLoraError, OSError) as error:  # OSError: all that the Hub's client raises
        found.refused = " ".join(str(error).split())
        return found
    found.kept_fields = {name: lora_config[name] for name in KEPT_FIELDS if lora_config.get(name)}
    if lora_config.get("use_rslora"):
        found.changes.append("rsLoRA scaling folded in")
    elif lora_config.get("alpha_pattern") or lora_config["lora_alpha"] != lora_config["r"]:
        found.changes.append("scaling folded in")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()} - {"float32"})
    if dtypes:
        found.changes.append(f"{', '.join(dtypes)} -> float32")
    return found


def read_factors(adapter: ForeignAdapter) -> Factors:
    """Read the matrices of an adapter in fp32, its scaling folded into B."""
    lora_config, state_dict = load_adapter(adapter.folder)
    layout = LoraLayout.from_state_dict(state_dict, lora_config, "shared_init")
    return layout.factors(*layout.pack(state_dict, lora_config))


def common_layout(adapters: list[ForeignAdapter], rank: int | None, gauge: str) -> LoraLayout:
    """Return the layout of all modules that any of the adapters has, in one rank: by default the largest."""
    rank = rank or max(adapter.rank for adapter in adapters)
    sizes = {(m.name, m.in_features, m.out_features) for adapter in adapters for m in adapter.modules}
    return LoraLayout(tuple(LoraModule(*size, rank) for size in sizes), gauge)


def shared_rows(adapters: list[ForeignAdapter]) -> dict[str, torch.Tensor] | None:
    """Return the A `(rank, in_features)` of each module that all adapters share, or `None` if they share none.

    An adapter's rows may be any invertible combination of the shared ones.
    """
    if len({adapter.rank for adapter in adapters}) > 1 or len(adapters) < 2:
        return None
    shared: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        for name, (a, b) in read_factors(adapter).items():
            if a.shape[0] != adapter.rank:
                return None
            if _in_rows_of(shared.setdefault(name, a), a, b)[1] > SHARED_ROWS:
                return None
    return shared


def convert(adapter: ForeignAdapter, layout: LoraLayout, shared: Mapping[str, torch.Tensor] | None) -> dict:
    """Return an adapter as a PEFT state dict of the layout, whose scaling is 1, and note what was converted.

    Raises:
        IncompatibleAdapterError: if it has modules that the layout has not, or does not share its A.
    """
    factors, lost, energy, missing = read_factors(adapter), 0.0, 0.0, 0
    if strays := sorted(factors.keys() - {module.name for module in layout.modules}):
        raise IncompatibleAdapterError(
            f"It adapts {strays[0]} and {len(strays) - 1} more modules that the zoo has not."
        )
    state_dict = {}
    for module in layout.modules:
        if module.name not in factors:
            missing += 1
            a = torch.zeros(module.rank, module.in_features) if shared is None else shared[module.name]
            b = torch.zeros(module.rank, module.out_features)
        else:
            a, b = factors[module.name]
            if (a.shape[1], b.shape[1]) != (module.in_features, module.out_features):
                raise IncompatibleAdapterError(
                    f"{module.name}: the zoo has other sizes than {a.shape[1]}, {b.shape[1]}."
                )
            if shared is not None:
                b, error = _in_rows_of(shared[module.name], a, b)
                if error > SHARED_ROWS:
                    raise IncompatibleAdapterError(f"{module.name}: its lora_A does not span the zoo's shared one.")
                a = shared[module.name]
            else:
                a, b, cut, own = with_rank(a, b, module.rank)
                lost, energy = lost + cut, energy + own
        state_dict[f"{PREFIX}{module.name}.lora_A.weight"] = a.contiguous()
        state_dict[f"{PREFIX}{module.name}.lora_B.weight"] = b.T.contiguous()
    adapter.lost_energy = lost / energy if energy else 0.0
    ranks = sorted({module.rank for module in adapter.modules})
    if ranks != [layout.max_rank]:
        how = f"{adapter.lost_energy:.2%} of the energy lost" if ranks[-1] > layout.max_rank else "exact"
        adapter.changes.append(f"rank {', '.join(map(str, ranks))} -> {layout.max_rank} ({how})")
    if missing:
        adapter.changes.append(f"{missing} of {len(layout.modules)} modules filled with zeros")
    return state_dict


def _in_rows_of(shared: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return B' transposed with B' @ shared next to B @ A, and the relative error of that product."""
    if shared.shape != a.shape:
        return b, 1.0
    if torch.equal(shared, a):
        return b, 0.0
    basis, rows, b = shared.double(), a.double(), b.double()
    own = torch.linalg.lstsq(basis.T, rows.T).solution @ b  # A^T = shared^T @ solution
    error, size = product_error(basis, own, rows, b), product_error(rows, b, rows, torch.zeros_like(b))
    return own.to(a), (error.clamp(min=0) / size).sqrt().item() if size else 0.0


def _check_base_name(found: str | None, expected: str | None) -> None:
    """Refuse an adapter that names another base model. A folder of somebody's machine names none."""
    if not found or not expected or is_local(found) or is_local(expected):
        return
    if found.lower() != expected.lower():
        raise IncompatibleAdapterError(f"base_model_name_or_path: expected {expected!r}, found {found!r}.")
