"""Adapters from elsewhere: of any rank, scaling, dtype, seed and choice of modules, into one zoo.

Everything that changes numbers and not the adapter is folded in: alpha, rsLoRA, patterns, padding of ranks, modules
that an adapter lacks. A smaller rank than an adapter's own is the one step that loses something, and says how much.

Adapters that share the row space of A (trained from one frozen A, in any coordinates of it) keep their cheaper form:
one A for all of them, and B alone varies. Of all others A and B vary, as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapter import adapter_folder, check_fit, load_adapter
from .base_model import base_model_fingerprint, require_bare
from .completion import DEFAULT_TEMPLATE
from .errors import ArgumentError, IcmLoraError, IncompatibleAdapterError, ZooError
from .layout import PREFIX, LoraLayout, LoraModule
from .lora_config import shortest_target_modules
from .products import product_error, with_rank
from .provenance import is_local
from .zoo import ZOO_FILE, LoraZoo

# Relative error of B @ A below which an adapter lies in the row space of a shared A: fp16's rounding.
SHARED_ROWS = 1e-3
KEPT_FIELDS = ("task_type", "fan_in_fan_out")


def import_zoo(
    path: str | Path,
    adapters: Mapping[str, str | Path] | Sequence[str | Path],
    base_model: PreTrainedModel,
    *,
    rank: int | None = None,
    template: str = DEFAULT_TEMPLATE,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
) -> tuple[LoraZoo, list[dict[str, Any]]]:
    """Make a zoo of LoRAs that were trained elsewhere, or add them to one.

    Ranks, scalings, dtypes, seeds and modules may differ from adapter to adapter. Adapters that share one A keep it,
    and B alone varies; of all others A and B vary, and a generator learns their products.

    Each adapter is read once. Those of one call are in memory together, since all of them decide the layout of a new
    zoo: make a zoo of many adapters by several calls, the first with the largest ranks and all modules.

    Args:
        path (`str` or `Path`): The zoo's directory. A zoo that stands there keeps its layout, and its tasks.
        adapters (`Mapping` or `Sequence`): Task name -> PEFT folder or Hub id. Of a sequence, the last part of each is
            the task's name.
        base_model (`PreTrainedModel`): The base model of all of them, without adapters.
        rank (`int`, *optional*): Rank of the zoo; by default the largest. Smaller ranks are padded, which is exact; of
            larger ones the largest singular values of B @ A are kept.
        template (`str`, *optional*): Text with `{prompt}` and `{completion}` that the adapters were trained on, or
            `"chat"` for the tokenizer's chat template.
        base_model_name_or_path (`str`, *optional*): What the adapters may call their base model; by default, and in
            the zoo, the name that it was loaded by. Adapters that name another repository are refused.
        revision, token (*optional*): As in `huggingface_hub`, for adapters on the Hub.

    Returns:
        `tuple[LoraZoo, list[dict]]`: the zoo, and a row per adapter: `task`, `source`, `status` ("taken",
        "converted", "held" if the zoo has the task already, or "refused"), `rank`, `changes`, `lost_energy` (the part
        of all squared singular values that a smaller rank cut off) and, if it was refused, the `reason`. What is held
        is not read again.

    Raises:
        ArgumentError: if two adapters have one name.
        IncompatibleAdapterError: if none of them can be taken, with the reasons; or if the base model has adapters.
        ZooError: if another zoo stands there.

    Example:
        >>> zoo, table = import_zoo("zoo", ["user/lora-1", "user/lora-2"], base)  # doctest: +SKIP
    """
    sources = _by_task(adapters)
    require_bare(base_model)
    base_name = base_model_name_or_path or base_model.config._name_or_path
    zoo = LoraZoo(path) if Path(path, ZOO_FILE).exists() else None
    if zoo is not None and not zoo.records:  # it has no A to go by
        zoo = None
    hide = not logging.is_progress_bar_enabled()
    found = [
        ForeignAdapter(task, _public(source), held=True)
        if zoo is not None and task in zoo
        else read_foreign(task, source, base_model, base_name, revision, token)
        for task, source in tqdm(sources.items(), desc="Reading adapters", disable=hide)
    ]
    usable = [adapter for adapter in found if adapter.factors]
    if not usable and not any(adapter.held for adapter in found):
        reasons = "; ".join(f"{adapter.source}: {adapter.refused}" for adapter in found[:3])
        raise IncompatibleAdapterError(f"None of {len(found)} adapters can be taken. {reasons}")
    if zoo is None:
        shared = shared_rows(usable) if rank in (None, usable[0].rank) else None
        layout = common_layout(usable, rank, "free" if shared is None else "frozen_a")
        targets = shortest_target_modules((module.name for module in layout.modules), base_model)
        lora_config = {"peft_type": "LORA", "r": layout.max_rank, "lora_alpha": layout.max_rank}
        lora_config |= {"target_modules": targets} | usable[0].kept_fields
    else:
        if rank not in (None, zoo.layout.max_rank):
            raise ZooError(f"{path} is a zoo of rank {zoo.layout.max_rank}: it cannot get adapters of rank {rank}.")
        shared, layout, lora_config = _shared_a(zoo), zoo.layout, zoo.lora_config
    zoo = LoraZoo.create(
        path,
        layout=layout,
        lora_config=lora_config,
        base_model_name_or_path=base_name,
        base_model_fingerprint=base_model_fingerprint(base_model),
        template=template,
    )
    for adapter in tqdm(usable, desc="Importing adapters", disable=hide):
        try:
            state_dict = convert(adapter, layout, shared)
        except IncompatibleAdapterError as error:
            adapter.refused = str(error)
            continue
        about = {"source": adapter.source, "changes": adapter.changes, "lost_energy": adapter.lost_energy}
        zoo.add(adapter.task, {0: state_dict}, **about)
    return LoraZoo(path), [adapter.row() for adapter in found]


@dataclass
class ForeignAdapter:
    """An adapter from elsewhere, and what becomes of it.

    Args:
        task (`str`): Name of the task it is for.
        source (`str`): Hub id, or name of the folder.
        held (`bool`, *optional*, defaults to `False`): Whether the zoo has the task already.
        factors (`dict`): Module -> A `(rank, in_features)` and B transposed `(rank, out_features)`, fp32, the scaling
            folded into B; empty if it is held or cannot be taken.
        kept_fields (`dict`): Of its `LoraConfig`, those that say what kind of model it is for.
        changes (`list[str]`): What has to be converted.
        lost_energy (`float`): Part of the squared singular values of all B @ A that a smaller rank cuts off.
        refused (`str`, *optional*): Why it cannot be taken.
    """

    task: str
    source: str
    held: bool = False
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    kept_fields: dict[str, Any] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    lost_energy: float = 0.0
    refused: str | None = None

    @property
    def ranks(self) -> list[int]:
        """The ranks of its modules, rising."""
        return sorted({len(a) for a, _ in self.factors.values()})

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(self.ranks)

    def row(self) -> dict[str, Any]:
        """Return what became of it, as plain values."""
        outcomes = {"held": self.held, "refused": self.refused, "converted": self.changes, "taken": True}
        return {
            "task": self.task,
            "source": self.source,
            "status": next(outcome for outcome, is_so in outcomes.items() if is_so),
            "rank": self.rank if self.factors else None,
            "changes": self.changes,
            "lost_energy": self.lost_energy,
            "reason": self.refused,
        }


def read_foreign(
    task: str,
    source: str | Path,
    base_model: PreTrainedModel,
    base_name: str | None,
    revision: str | None = None,
    token: bool | str | None = None,
) -> ForeignAdapter:
    """Read an adapter, check that it is a plain LoRA of the base model, and note what must be converted."""
    found = ForeignAdapter(task, _public(source))
    try:
        lora_config, state_dict = load_adapter(adapter_folder(source, revision, token))
        _check_base_name(lora_config.get("base_model_name_or_path"), base_name)
        layout = LoraLayout.from_state_dict(state_dict, lora_config, "free")
        check_fit(base_model, lora_config, state_dict)
        found.factors = layout.factors(*layout.pack(state_dict, lora_config))
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


def common_layout(adapters: Sequence[ForeignAdapter], rank: int | None, gauge: str) -> LoraLayout:
    """Return the layout of all modules that any of the adapters has, in one rank: by default the largest."""
    rank = rank or max(adapter.rank for adapter in adapters)
    sizes = {(name, a.shape[1], b.shape[1]) for adapter in adapters for name, (a, b) in adapter.factors.items()}
    return LoraLayout(tuple(LoraModule(*size, rank) for size in sizes), gauge)


def shared_rows(adapters: Sequence[ForeignAdapter]) -> dict[str, torch.Tensor] | None:
    """Return the A `(rank, in_features)` of each module that all adapters share, or `None` if they share none.

    An adapter's rows may be any invertible combination of the shared ones.
    """
    if len(adapters) < 2 or len({rank for adapter in adapters for rank in adapter.ranks}) > 1:
        return None
    shared: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        for name, (a, b) in adapter.factors.items():
            if _in_rows_of(shared.setdefault(name, a), a, b)[1] > SHARED_ROWS:
                return None
    return shared


def convert(
    adapter: ForeignAdapter, layout: LoraLayout, shared: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Return an adapter as a PEFT state dict of the layout, whose scaling is 1, and note what was converted.

    Raises:
        IncompatibleAdapterError: if it has modules that the layout has not, or does not share its A.
    """
    lost, energy, missing = 0.0, 0.0, 0
    if strays := sorted(adapter.factors.keys() - {module.name for module in layout.modules}):
        raise IncompatibleAdapterError(
            f"It adapts {strays[0]} and {len(strays) - 1} more modules that the zoo has not."
        )
    state_dict = {}
    for module in layout.modules:
        if module.name not in adapter.factors:
            missing += 1
            a = torch.zeros(module.rank, module.in_features) if shared is None else shared[module.name]
            b = torch.zeros(module.rank, module.out_features)
        else:
            a, b = adapter.factors[module.name]
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
    if adapter.ranks != [layout.max_rank]:
        how = f"{adapter.lost_energy:.2%} of the energy lost" if adapter.rank > layout.max_rank else "exact"
        adapter.changes.append(f"rank {', '.join(map(str, adapter.ranks))} -> {layout.max_rank} ({how})")
    if missing:
        adapter.changes.append(f"{missing} of {len(layout.modules)} modules filled with zeros")
    return state_dict


def _by_task(adapters: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str | Path]:
    if isinstance(adapters, Mapping):
        return dict(adapters)
    sources = {Path(source).name: source for source in adapters}
    if len(sources) < len(adapters):
        names = [Path(source).name for source in adapters]
        raise ArgumentError(f"Two adapters have one name among {names}: pass a mapping from names of tasks.")
    return sources


def _public(source: str | Path) -> str:
    """Return what may be told of where an adapter comes from: a Hub id, or the name of a folder alone."""
    return Path(source).name if isinstance(source, Path) or is_local(source) else source


def _shared_a(zoo: LoraZoo) -> dict[str, torch.Tensor] | None:
    """Return the A of each module that all adapters of a zoo share, or `None` if they share none."""
    if zoo.layout.gauge != "frozen_a":
        return None
    factors = zoo.layout.factors(torch.zeros(zoo.layout.num_weights), zoo.shared_weights)
    return {name: a for name, (a, _) in factors.items()}


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
