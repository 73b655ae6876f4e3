"""What a plain `LoraConfig` is: one whose adapter is nothing but scaling * B @ A per module.

A configuration may come from anybody's file, so it is a whitelist: of fields, of the types of their values, and of how
long the regular expressions in it may take. This module knows configurations as dictionaries, and no tensors.
"""

import enum
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from peft import LoraConfig
from torch import nn

from .errors import IncompatibleAdapterError

# Fields of LoraConfig that leave an adapter two plain matrices per module, with the types of their values. All others
# must have their default value, also those of later versions of PEFT.
CONFIG_FIELDS: dict[str, Any] = {
    "peft_type": object,
    "task_type": str,
    "base_model_name_or_path": str,
    "revision": str,
    "inference_mode": bool,
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": bool,
    "fan_in_fan_out": bool,
    "init_lora_weights": (bool, str),
    "target_modules": (str, list, tuple, set),
    "exclude_modules": (str, list, tuple, set),
    "layers_to_transform": (int, list),
    "layers_pattern": (str, list),
    "rank_pattern": Mapping,
    "alpha_pattern": Mapping,
    "auto_mapping": object,  # names of classes: never looked at
    "peft_version": object,
    "eva_config": object,  # how A was initialized
}
UNUSED_FIELDS = ("auto_mapping", "peft_version", "eva_config")  # allowed, and of no consequence
_DEFAULTS = {
    "bias": "none",
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}  # those of all others are falsy
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # PiSSA and its kin subtract A and B from the base
# Regular expressions from a file run on names from a file: both are kept short and simple.
MAX_NAME, MAX_PATTERN, MAX_PATTERNS, MAX_WILDCARDS = 200, 256, 512, 32
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def check_plain_lora(lora_config: Mapping[str, Any]) -> None:
    """Refuse configurations whose effect is not just scaling * B @ A per module.

    Raises:
        IncompatibleAdapterError: naming the field, what it may be and what it is.
    """
    _check_fields(lora_config)
    _check_numbers(lora_config)
    if (task_type := lora_config.get("task_type")) and task_type not in TASK_TYPES:
        raise IncompatibleAdapterError(
            f"LoraConfig.task_type: expected one of {TASK_TYPES}, found {task_type!r:.200}."
        )
    for field in ("target_modules", "exclude_modules"):
        value = lora_config.get(field)
        if not isinstance(value, str) and not all(isinstance(name, str) for name in value or ()):
            raise IncompatibleAdapterError(f"LoraConfig.{field}: expected names of modules, found {value!r:.200}.")
    for field in ("rank_pattern", "alpha_pattern"):
        _check_patterns(field, lora_config.get(field) or {})
    if (init := lora_config.get("init_lora_weights")) not in _PLAIN_INITS:
        raise IncompatibleAdapterError(
            f"LoraConfig.init_lora_weights={init!r:.200} is not supported: expected one of {_PLAIN_INITS}, since "
            "others change the base model's own weights."
        )


def check_module_name(name: Any) -> None:
    """Refuse what is no path of a module: a name may come from a file, and is matched, counted and looked up.

    Raises:
        IncompatibleAdapterError: with the name.
    """
    if not isinstance(name, str) or len(name) > MAX_NAME or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name, re.ASCII):
        raise IncompatibleAdapterError(
            f"Expected the path of a module in up to {MAX_NAME} letters, digits, '_', '-' and '.', found "
            f"{name!r:.300}."
        )
    if max((len(part) for part in name.split(".") if part.isdigit()), default=0) > 5:
        raise IncompatibleAdapterError(f"{name}: expected numbers of up to five digits in the path of a module.")


def lora_rank(lora_config: Mapping[str, Any], name: str) -> int:
    """Return the rank that PEFT gives the module of this name, patterns included."""
    return _from_pattern(lora_config.get("rank_pattern") or {}, name, lora_config["r"])


def lora_scaling(lora_config: Mapping[str, Any], name: str, rank: int) -> float:
    """Return the factor that PEFT puts before B @ A for the module of this name, patterns and rsLoRA included."""
    alpha = _from_pattern(lora_config.get("alpha_pattern") or {}, name, lora_config["lora_alpha"])
    return alpha / (math.sqrt(rank) if lora_config.get("use_rslora") else rank)


def lora_config_to_dict(lora_config: LoraConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `LoraConfig` that differ from its defaults, as sorted JSON values.

    Only those are stored, so that versions of PEFT with more or fewer fields can read them.
    """
    values = lora_config.to_dict() if isinstance(lora_config, LoraConfig) else dict(lora_config)
    defaults = LoraConfig().to_dict()
    plain = {}
    for field, value in sorted(values.items()):
        value = value.value if isinstance(value, enum.Enum) else value
        if isinstance(value, set) or (field == "target_modules" and isinstance(value, (list, tuple))):
            value = sorted(value)  # PEFT makes a set of it and saves that in any order
        if field in ("r", "lora_alpha", "target_modules", "peft_type") or (
            field in defaults and value != defaults[field]
        ):
            plain[field] = value
    return plain


def canonical_lora_config(lora_config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return the configuration of an adapter whose scaling is folded into B: `lora_alpha == r`, no patterns."""
    folded = ("rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights", "inference_mode")
    kept = {field: value for field, value in lora_config.items() if field not in folded}
    return kept | {"r": rank, "lora_alpha": rank, "inference_mode": True}


def with_named_targets(lora_config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Name the modules that have weights, where `LoraConfig` would choose them in another way than by a list.

    PEFT runs the other ways as regular expressions, which may take for ever; and there is nothing to choose.

    Args:
        lora_config (`Mapping`): Fields of `LoraConfig`.
        names (`Iterable[str]`): Paths of the modules that have weights.
    """
    others = ("exclude_modules", "layers_to_transform", "layers_pattern")
    targets = lora_config.get("target_modules")
    if not isinstance(targets, (str, type(None))) and all(lora_config.get(field) is None for field in others):
        return dict(lora_config)
    return dict(lora_config) | dict.fromkeys(others) | {"target_modules": sorted(names)}


def shortest_target_modules(names: Iterable[str], base_model: nn.Module) -> list[str]:
    """Return the shortest `target_modules` that mean the modules of these paths and no others of the base model."""
    wanted = set(names)
    ends = {name.rpartition(".")[2] for name in wanted}
    matched = {name for name, _ in base_model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if matched == wanted else wanted)


def _check_fields(lora_config: Mapping[str, Any]) -> None:
    if str(lora_config.get("peft_type", "LORA")).removeprefix("PeftType.") != "LORA":
        raise IncompatibleAdapterError(f"Expected peft_type 'LORA', found {lora_config['peft_type']!r}.")
    for field, value in lora_config.items():
        if field not in CONFIG_FIELDS and value and value != (plain := _DEFAULTS.get(field)):
            raise IncompatibleAdapterError(
                f"LoraConfig.{field}={value!r:.200} is not supported: expected {plain!r}, since an adapter must be "
                "nothing but two matrices per module."
            )
        if value is not None and not isinstance(value, CONFIG_FIELDS.get(field, object)):
            raise IncompatibleAdapterError(f"LoraConfig.{field}: expected another type, found {value!r:.200}.")


def _check_numbers(lora_config: Mapping[str, Any]) -> None:
    for field in ("r", "lora_alpha"):
        if not _is_positive(value := lora_config.get(field)):
            raise IncompatibleAdapterError(f"LoraConfig.{field}: expected a positive number, found {value!r:.200}.")
    if not 0 <= (dropout := lora_config.get("lora_dropout") or 0.0) < 1:
        raise IncompatibleAdapterError(f"LoraConfig.lora_dropout: expected 0 to below 1, found {dropout!r:.200}.")


def _check_patterns(field: str, patterns: Mapping[Any, Any]) -> None:
    wildcards = sum(map(_wildcards, patterns))
    if len(patterns) > MAX_PATTERNS or wildcards > MAX_WILDCARDS or not all(map(_is_positive, patterns.values())):
        raise IncompatibleAdapterError(
            f"LoraConfig.{field}: expected up to {MAX_PATTERNS} regular expressions with positive numbers and "
            f"up to {MAX_WILDCARDS} wildcards in all of them, found {patterns!r:.200}."
        )
    if strays := [key for key in patterns if not _is_simple(key)]:
        raise IncompatibleAdapterError(
            f"LoraConfig.{field}: expected regular expressions of up to {MAX_PATTERN} characters with up to two "
            f"wildcards or groups and none of them nested, found {strays[0]!r:.300}."
        )
    if field == "rank_pattern" and not all(isinstance(rank, int) for rank in patterns.values()):
        raise IncompatibleAdapterError(f"LoraConfig.{field}: expected whole numbers, found {patterns!r:.200}.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 65536


def _wildcards(pattern: Any) -> int:
    return sum(map(str(pattern).count, "*+?("))


def _is_simple(pattern: Any) -> bool:
    """Whether a regular expression takes a time that is bounded by the length of names, cubed at most."""
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN or _wildcards(pattern) > 2:
        return False
    if re.search(r"\(\?|\)[*+?]|\{|\\[0-9]", pattern):  # extensions, repeated groups, counts, references
        return False
    try:
        return bool(_compiled(pattern))
    except re.error:
        return False


@lru_cache(maxsize=MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    # PEFT's rule: a pattern matches the end of a module's path, on a dot.
    return re.compile(rf"(.*\.)?({pattern})$")


def _from_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if _compiled(key).match(name)), default)  # the first one
