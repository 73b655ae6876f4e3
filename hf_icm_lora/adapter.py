"""One adapter: a PEFT folder on disk, read and written strictly; a state dict attached to a base model.

PEFT itself falls back to pickles and only warns about keys that do not fit. Here both are errors.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from .base_model import base_parameters, require_bare, unwrapped
from .errors import CorruptAdapterError, CorruptFileError, IncompatibleAdapterError
from .files import MAX_BYTES, commit_directory, read_json, read_safetensors
from .layout import PREFIX, LoraLayout, module_names, split
from .lora_config import (
    CONFIG_FIELDS,
    UNUSED_FIELDS,
    check_plain_lora,
    lora_rank,
    lora_scaling,
    with_named_targets,
)
from .provenance import is_local

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def load_adapter(path: str | Path, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read an ordinary PEFT LoRA folder.

    Args:
        path (`str` or `Path`): A folder with `adapter_config.json` and `adapter_model.safetensors`.
        max_bytes (`int`, *optional*, defaults to 8 GiB): Largest file of weights to read.

    Returns:
        `tuple[dict, dict[str, torch.Tensor]]`: the `LoraConfig` as a dictionary, without the fields that say nothing
        about a plain LoRA, and the state dict as stored.

    Raises:
        CorruptAdapterError: if a file is missing, malformed or too large, or a value is not finite. Pickles are never
            opened, and nothing that the configuration names is imported or fetched.
        IncompatibleAdapterError: if it is not a plain LoRA.
    """
    path = Path(path)
    config_path, weights_path = path / CONFIG_FILE, path / WEIGHTS_FILE
    try:
        lora_config = read_json(config_path)
    except (OSError, CorruptFileError) as error:
        raise CorruptAdapterError(f"{config_path}: expected a PEFT configuration in JSON: {error}") from error
    if not isinstance(lora_config, dict):
        raise IncompatibleAdapterError(f"{config_path}: expected a JSON object, found {type(lora_config).__name__}.")
    try:
        check_plain_lora(lora_config)
    except IncompatibleAdapterError as error:
        raise IncompatibleAdapterError(f"{config_path}: {error}") from error
    if not weights_path.is_file():
        found = sorted(file.name for file in path.iterdir())
        raise CorruptAdapterError(f"{weights_path} is missing (found {found}). Only safetensors files are read.")
    try:
        state_dict, _ = read_safetensors(weights_path, max_bytes)
    except (OSError, CorruptFileError) as error:
        raise CorruptAdapterError(f"{weights_path}: {error}.") from error
    if not state_dict:
        raise CorruptAdapterError(f"{weights_path} holds no tensors.")
    kept = CONFIG_FIELDS.keys() - set(UNUSED_FIELDS)
    return {field: value for field, value in lora_config.items() if field in kept}, state_dict


def adapter_folder(source: str | Path, revision: str | None = None, token: bool | str | None = None) -> Path:
    """Return the folder of an adapter, downloaded from the Hub if it is an id there.

    Args:
        source (`str` or `Path`): A folder, or a Hub id; a `Path` is never taken for an id.
        revision, token (*optional*): As in `huggingface_hub`.

    Raises:
        IncompatibleAdapterError: if it is neither a folder nor an id.
    """
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or is_local(source) or "/" not in source:
        raise IncompatibleAdapterError(f"{source} is no folder, and no id on the Hub.")
    files = [CONFIG_FILE, WEIGHTS_FILE]
    return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=files))


def save_adapter(path: str | Path, lora_config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a PEFT LoRA folder that appears whole or not at all.

    Args:
        path (`str` or `Path`): A folder that does not exist yet.
        lora_config (`Mapping`): Fields of `LoraConfig`, including `base_model_name_or_path`.
        state_dict (`Mapping[str, torch.Tensor]`): Keys as PEFT saves them.

    Raises:
        AlreadyExistsError: if `path` exists.
    """
    with commit_directory(path) as folder:
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in sorted(state_dict.items())}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config = LoraConfig(**lora_config)
        if isinstance(config.target_modules, set):  # in whose order two processes would write two files
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))


def attach_adapter(
    base_model: nn.Module,
    lora_config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
) -> PeftModel:
    """Attach LoRA weights to a base model, or put them in place of an adapter that is already there.

    Args:
        base_model (`PreTrainedModel` or `PeftModel`): The base, wrapped by PEFT or not. A base without an adapter is
            wrapped as `get_peft_model` does; a `PeftModel` gets one more adapter; an adapter that already has this
            name is overwritten in place, which is fast.
        lora_config (`Mapping`): Fields of `LoraConfig`.
        state_dict (`Mapping[str, torch.Tensor]`): Keys as PEFT saves them. Copied, never aliased.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter, which becomes the active one.

    Returns:
        `PeftModel`: in eval mode, with the adapter frozen, in fp32 if the base is, else in the base's dtype.

    Raises:
        IncompatibleAdapterError: if modules or shapes do not fit, or the base was wrapped before and is not the
            `PeftModel`; the base is then as it was.
    """
    check_plain_lora(lora_config)
    check_fit(base_model, lora_config, state_dict)
    if isinstance(base_model, PeftModel) and adapter_name in base_model.peft_config:
        _overwrite(base_model, lora_config, state_dict, adapter_name)
        model = base_model
    else:
        if not isinstance(base_model, PeftModel):
            require_bare(base_model)  # PEFT would stack a second LoRA on the first
        model = _add(base_model, lora_config, state_dict, adapter_name)
    model.set_adapter(adapter_name, inference_mode=True)
    return model.eval()


class AdapterSlot:
    """An adapter of a live model that new weights are written into, at about the cost of copying them.

    All that [`attach_adapter`] checks is checked once, when the slot is made. It starts with B = 0, so that the model
    acts as its base does. The slot is good for as long as the model has the adapter.

    Args:
        base_model (`PreTrainedModel` or `PeftModel`), adapter_name (`str`, *optional*, defaults to `"default"`): As in
            [`attach_adapter`].
        lora_config (`Mapping`): With the layout's largest rank as `r` and `lora_alpha`, and no patterns.
        layout (`LoraLayout`): Of the weights to come.
        shared_weights (`torch.Tensor` of shape `(num_shared_weights,)`): What all of them share.

    Attributes:
        model (`PeftModel`): With the adapter, which is active.

    Raises:
        IncompatibleAdapterError: as `attach_adapter`.

    Example:
        >>> slot = generator.adapter_slot(base)  # doctest: +SKIP
        >>> for task_vector in task_vectors:  # doctest: +SKIP
        ...     slot.write(generator.decode_task_vector(task_vector))
        ...     slot.model.generate(**inputs)
    """

    def __init__(
        self,
        base_model: nn.Module,
        lora_config: Mapping[str, Any],
        layout: LoraLayout,
        shared_weights: torch.Tensor,
        adapter_name: str = "default",
    ):
        empty = layout.unpack(shared_weights.new_zeros(layout.num_weights), shared_weights)
        self.layout = layout
        self.model = attach_adapter(base_model, lora_config, empty, adapter_name)
        targets = _targets(self.model, adapter_name)
        self._matrices = [
            # Rows per rank component, as in the vector; those that pad a smaller rank stay zero.
            [(w.T if block.factor == "lora_B" else w)[: block.rank] for w in (targets[key][0] for key in block.keys())]
            for block in layout.blocks
        ]

    @torch.no_grad()
    def write(self, lora_weights: torch.Tensor) -> None:
        """Put packed weights `(num_weights,)` in place of the adapter's own."""
        if lora_weights.shape != (self.layout.num_weights,):
            raise IncompatibleAdapterError(
                f"Expected weights of shape ({self.layout.num_weights},), found {tuple(lora_weights.shape)}."
            )
        for matrices, values in zip(self._matrices, split(lora_weights, self.layout.blocks), strict=True):
            for matrix, value in zip(matrices, values, strict=True):
                matrix.copy_(value)


def adapter_state_dict(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Return copies of an adapter's LoRA matrices on the CPU under the keys that PEFT saves, and nothing else.

    Unlike `get_peft_model_state_dict` this never asks the Hub about the base model's vocabulary.
    """
    marker = f".{adapter_name}.weight"
    return {
        name.removesuffix(marker) + ".weight": parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if ".lora_" in name and name.endswith(marker)
    }


def check_fit(model: nn.Module, lora_config: Mapping, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Compare a PEFT state dict with the modules of a base model and with its own configuration.

    Raises:
        IncompatibleAdapterError: naming the first key that does not fit.
    """
    parameters = base_parameters(model)
    shapes: Counter[str] = Counter()
    for key, tensor in state_dict.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if not match or tensor.ndim != 2:
            raise IncompatibleAdapterError(
                f"Expected only matrices '{PREFIX}<module>.lora_A.weight', found {key!r} of {tuple(tensor.shape)}."
            )
        name, factor = match.groups()
        weight = parameters.get(f"{name}.weight")
        if weight is None:
            raise IncompatibleAdapterError(
                f"The base model ({type(unwrapped(model)).__name__}) has no module {name!r}, which the adapter's "
                f"{key} needs. Load the base model that the adapter was made for."
            )
        rank, size = tensor.shape if factor == "lora_A" else reversed(tensor.shape)
        if rank != (expected := lora_rank(lora_config, name)):
            raise IncompatibleAdapterError(f"{key}: found rank {rank}, but LoraConfig says {expected}.")
        if size not in weight.shape:  # either side: GPT-2's Conv1D stores (in_features, out_features)
            raise IncompatibleAdapterError(
                f"{key}: found {tuple(tensor.shape)}, which does not fit the base weight {tuple(weight.shape)}."
            )
        shapes[name] += 1
    if halves := sorted(name for name, count in shapes.items() if count != 2):
        raise IncompatibleAdapterError(
            f"Expected lora_A and lora_B for each module, found one of them for {halves[:3]}."
        )


def _add(
    model: nn.Module, lora_config: Mapping, state_dict: Mapping[str, torch.Tensor], adapter_name: str
) -> PeftModel:
    config = LoraConfig(**with_named_targets(lora_config, module_names(state_dict)))
    base_name = lora_config.get("base_model_name_or_path")
    config.base_model_name_or_path = None  # or PEFT warns that it writes down where this copy of it lies
    dtype, device = _dtype_and_device(model)
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
            peft_model = model
        else:
            peft_model = get_peft_model(
                model, config, adapter_name, low_cpu_mem_usage=True, autocast_adapter_dtype=False
            )
        if base_name:
            config.base_model_name_or_path = base_name
        targets = _targets(peft_model, adapter_name)
        missing, strays = sorted(targets.keys() - state_dict.keys()), sorted(state_dict.keys() - targets.keys())
        if missing or strays:
            raise IncompatibleAdapterError(f"without weights {missing[:3]}, without a place {strays[:3]}.")
        for key, (weight, _) in targets.items():
            if weight.shape != state_dict[key].shape:
                raise IncompatibleAdapterError(
                    f"{key} is {tuple(state_dict[key].shape)}, its place in the model {tuple(weight.shape)}."
                )
        for key, (_, module) in targets.items():  # PEFT's own way searches the whole model several times
            matrix = getattr(module, "lora_A" if ".lora_A." in key else "lora_B")[adapter_name]
            values = state_dict[key].detach().to(device, dtype, copy=True)
            matrix.weight = nn.Parameter(values, requires_grad=False)
    except BaseException as error:
        _remove(model, adapter_name)
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, (ValueError, RuntimeError)):
            raise
        # PEFT's own, when targets or sizes do not fit.
        raise IncompatibleAdapterError(f"LoraConfig and weights disagree: {error}") from error
    return peft_model


def _remove(model: nn.Module, adapter_name: str) -> None:
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _targets(model: PeftModel, adapter_name: str) -> dict[str, tuple[nn.Parameter, LoraLayer]]:
    """Return the matrices of an adapter under the keys that PEFT saves, each with its layer."""
    return {
        f"{name}.lora_{factor}.weight": (getattr(module, f"lora_{factor}")[adapter_name].weight, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
        for factor in "AB"
    }


def _overwrite(
    model: PeftModel, lora_config: Mapping, state_dict: Mapping[str, torch.Tensor], adapter_name: str
) -> None:
    config = LoraConfig(**with_named_targets(lora_config, module_names(state_dict)))
    targets = _targets(model, adapter_name)
    shapes = {key: tuple(weight.shape) for key, (weight, _) in targets.items()}
    given = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    if shapes != given:
        differing = sorted(key for key in shapes.keys() | given.keys() if shapes.get(key) != given.get(key))
        raise IncompatibleAdapterError(
            f"Adapter {adapter_name!r} exists with another layout: {differing[0]} is {shapes.get(differing[0])} in "
            f"the model, {given.get(differing[0])} in the new weights. Choose another adapter_name."
        )
    with torch.no_grad():
        for key, (weight, module) in targets.items():
            weight.copy_(state_dict[key])
            name = key.removeprefix(PREFIX).rsplit(".", 2)[0]
            module.scaling[adapter_name] = lora_scaling(lora_config, name, module.r[adapter_name])
    model.peft_config[adapter_name] = config


def _dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return parameter.dtype, parameter.device
