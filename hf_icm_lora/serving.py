"""Adapters for those who serve them: the plain form that all read, what each does not, and llama.cpp's own file.

The plain form has one rank, `lora_alpha == r`, no patterns, no rsLoRA, and its `target_modules` as a sorted list. A
generated adapter has it already; `plain_adapter` brings any LoRA into it, at a lower rank if wanted.

The rules for vLLM, SGLang and LoRAX are those of their loaders' sources; llama.cpp itself is run in
`benchmarks/serving.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .adapter import load_adapter
from .errors import ArgumentError, IcmLoraError, IncompatibleAdapterError
from .files import commit_file
from .layout import PREFIX, LoraLayout, LoraModule, module_names
from .lora_config import canonical_lora_config, lora_config_to_dict, with_named_targets
from .products import with_rank
from .provenance import is_local

VLLM_DEFAULT_RANK, LORAX_MAX_RANK = 16, 128
_EXPORT = "`hf-icm-lora export` writes it in a form that works."


def plain_adapter(
    lora_config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], float]:
    """Bring a LoRA into the form that every server reads.

    Args:
        lora_config (`Mapping`): Fields of `LoraConfig`, as from [`load_adapter`].
        state_dict (`Mapping[str, torch.Tensor]`): Keys as PEFT saves them.
        rank (`int`, *optional*): A rank for all modules; by default the largest they have. A smaller one keeps the
            largest singular values of each B @ A, which is the best that rank can do.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the result.

    Returns:
        `tuple[dict, dict[str, torch.Tensor], float]`: configuration, state dict, and the part of all squared singular
        values that a smaller rank cut off.

    Raises:
        IncompatibleAdapterError: if it is no plain LoRA, or its values do not fit into the dtype.

    Example:
        >>> config, state_dict, lost = plain_adapter(*load_adapter("adapter"), rank=4)  # doctest: +SKIP
        >>> save_adapter("adapter-r4", config, state_dict)  # doctest: +SKIP
    """
    layout = LoraLayout.from_state_dict(state_dict, lora_config, "shared_init")
    vectors = layout.pack(state_dict, lora_config)
    rank = layout.max_rank if rank is None else rank
    if rank < 1:
        raise IncompatibleAdapterError(f"rank: expected a positive number, found {rank}.")
    plain, lost, energy = {}, 0.0, 0.0
    for name, (a, b) in layout.factors(*vectors).items():
        a, b, cut, own = with_rank(a, b, rank)
        lost, energy = lost + cut, energy + own
        for factor, matrix in (("lora_A", a), ("lora_B", b.T.contiguous())):
            plain[f"{PREFIX}{name}.{factor}.weight"] = cast = matrix.to(dtype)
            if not cast.isfinite().all():
                raise IncompatibleAdapterError(
                    f"{name}.{factor}: values up to {matrix.abs().max():g} do not fit {dtype}."
                )
    named = with_named_targets(lora_config, module_names(state_dict))
    config = canonical_lora_config(lora_config_to_dict(named), rank)
    return config, plain, lost / energy if energy else 0.0


def check_serving_compatibility(adapter: str | Path, server: str) -> tuple[list[str], list[str]]:
    """Say what a server would make of an adapter folder.

    Args:
        adapter (`str` or `Path`): A PEFT folder.
        server (`str`): `"vllm"`, `"sglang"`, `"lorax"` or `"llama.cpp"`.

    Returns:
        `tuple[list[str], list[str]]`: problems, with which it would not load or would act differently than in PEFT;
        and notes on how it must be loaded. Both empty: it just works.

    Raises:
        ArgumentError: if the server is not one of these.

    Example:
        >>> check_serving_compatibility("adapter", "vllm")  # doctest: +SKIP
        ([], ['Rank 32: start vLLM with --max-lora-rank 32 or more.'])
    """
    if server not in SERVERS:
        raise ArgumentError(f"server: expected one of {SERVERS}, found {server!r}.")
    folder = Path(adapter)
    try:
        lora_config, state_dict = load_adapter(folder)
        modules = LoraLayout.from_state_dict(state_dict, lora_config, "shared_init").modules
    except (IcmLoraError, OSError) as error:
        return [str(error)], []
    facts = _Facts(folder, lora_config, modules)
    problems, notes = _RULES[server](facts)
    base = lora_config.get("base_model_name_or_path")
    if not base or is_local(base):
        notes.insert(0, f"base_model_name_or_path is {base!r}: name the base model when you start the server.")
    targets = lora_config.get("target_modules")
    if not isinstance(targets, list) and server != "llama.cpp":
        problems.insert(0, f"target_modules: expected a list, found {targets!r}.")
    return problems, notes


class _Facts(NamedTuple):
    """What the rules of the servers ask of an adapter."""

    folder: Path
    lora_config: Mapping[str, Any]
    modules: tuple[LoraModule, ...]

    @property
    def patterns(self) -> list[str]:
        return [field for field in ("rank_pattern", "alpha_pattern") if self.lora_config.get(field)]

    @property
    def ranks(self) -> list[int]:
        return sorted({module.rank for module in self.modules})


def _rules_of_vllm(facts: _Facts) -> tuple[list[str], list[str]]:
    rank = facts.ranks[-1]
    notes = [f"Rank {rank}: start vLLM with --max-lora-rank {rank} or more."] if rank > VLLM_DEFAULT_RANK else []
    return _no_patterns("vllm", facts), notes


def _rules_of_sglang(facts: _Facts) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    if (facts.folder / "added_tokens.json").exists():
        problems.append("added_tokens.json: SGLang refuses adapters that add tokens. Remove it.")
    if facts.patterns or len(facts.ranks) > 1:
        notes.append(f"Ranks {facts.ranks}: older versions of SGLang need one rank and scaling. {_EXPORT}")
    return problems, notes


def _rules_of_lorax(facts: _Facts) -> tuple[list[str], list[str]]:
    problems, rank = _no_patterns("lorax", facts), facts.ranks[-1]
    if rank > LORAX_MAX_RANK:
        problems.append(f"Rank {rank}: LoRAX takes up to {LORAX_MAX_RANK}. {_EXPORT}")
    problems += [f"{kind}: LoRAX drops this kind without a word, since layers {gaps} lack it."
                 for kind, gaps in _gaps(facts.modules).items()]  # fmt: skip
    return problems, []


def _rules_of_llama_cpp(facts: _Facts) -> tuple[list[str], list[str]]:
    problems = []
    if facts.lora_config.get("use_rslora") or facts.lora_config.get("alpha_pattern"):
        problems.append(f"rsLoRA and alpha_pattern: llama.cpp scales by lora_alpha / rank. {_EXPORT}")
    if strays := [module.name for module in facts.modules if module.name.endswith(("lm_head", "embed_tokens"))]:
        problems.append(f"{strays[0]}: llama.cpp has no place for it where embeddings are tied.")
    return problems, ["llama.cpp reads GGUF: `hf-icm-lora export ADAPTER --format gguf` writes it."]


_RULES = {
    "vllm": _rules_of_vllm,
    "sglang": _rules_of_sglang,
    "lorax": _rules_of_lorax,
    "llama.cpp": _rules_of_llama_cpp,
}
SERVERS = tuple(_RULES)


def _no_patterns(server: str, facts: _Facts) -> list[str]:
    if not facts.patterns:
        return []
    return [f"{' and '.join(facts.patterns)}: {server} takes one rank and one alpha for all modules. {_EXPORT}"]


def _gaps(modules: tuple[LoraModule, ...]) -> dict[str, list[int]]:
    """Return kind -> layers without it, of those up to the last layer that has any LoRA."""
    layers: dict[str, set[int]] = {}
    for module in modules:
        layers.setdefault(module.kind, set()).update(module.position[:1])
    last = max((max(found) for found in layers.values() if found), default=-1)
    gaps = {kind: sorted(set(range(last + 1)) - found) for kind, found in layers.items() if found}
    return {kind: missing for kind, missing in gaps.items() if missing}


def export_gguf(
    path: str | Path,
    lora_config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    base_config,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a LoRA as llama.cpp reads it, for base models of the Llama family.

    llama.cpp stores the rows of q_proj and k_proj head by head in another order (each half of a head's rotary pairs
    interleaved), so B's rows are reordered in the same way.

    Args:
        path (`str` or `Path`): The file, such as `adapter.gguf`; an older one is replaced.
        lora_config (`Mapping`): Fields of `LoraConfig`.
        state_dict (`Mapping[str, torch.Tensor]`): Keys as PEFT saves them.
        base_config (`PreTrainedConfig`): Of the base model.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): `torch.float32` or `torch.float16`.

    Raises:
        ImportError: without the package gguf (extra `demo`).
        IncompatibleAdapterError: if the base model is of another family, or a module has no place in llama.cpp.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Writing GGUF needs the package gguf: pip install gguf.") from error
    if base_config.model_type != "llama":
        raise IncompatibleAdapterError(
            f"Expected a base model of model_type 'llama', found {base_config.model_type!r}: other families store "
            "their weights in other orders. Use convert_lora_to_gguf.py of llama.cpp."
        )
    config, plain, _ = plain_adapter(lora_config, state_dict, dtype=dtype)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base_config.num_hidden_layers)
    heads = {"q_proj": base_config.num_attention_heads, "k_proj": base_config.num_key_value_heads}
    with commit_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
        for key, matrix in plain.items():
            name, factor = key.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
            place = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            if place is None:
                raise IncompatibleAdapterError(f"{name}: llama.cpp knows no such module.")
            kind = name.rpartition(".")[2]
            if factor == "lora_B" and kind in heads:
                rows = matrix.unflatten(0, (heads[kind], 2, -1))  # (heads, halves, pairs, rank)
                matrix = rows.transpose(1, 2).reshape(matrix.shape)
            writer.add_tensor(f"{place}.{factor.lower()}", matrix.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
