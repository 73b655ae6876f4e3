"""The base model at rest: how it is loaded, which one it is, and how it is left as it was found."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import IncompatibleAdapterError
from .files import sha256_of
from .smollm2 import smollm2_path

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # base model -> held by who reads it
_LOCKING = threading.Lock()


def load_base_model(
    name: str | Path, dtype: str | torch.dtype = "fastest"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer, onto the accelerator if there is one.

    Args:
        name (`str` or `Path`): A folder or a Hub id, or `"smollm2"` for the packaged model. Encoder-decoder models are
            loaded by their own class.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"fastest"`): Of the weights; by default
            [`fast_dtype`].

    Raises:
        OSError: if there is no such model.

    Example:
        >>> base, tokenizer = load_base_model("smollm2")  # doctest: +SKIP
    """
    path, config = find_base_model(name)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if isinstance(dtype, str):
        dtype = fast_dtype() if dtype == "fastest" else getattr(torch, dtype)
    base = auto_class.from_pretrained(path, dtype=dtype, use_safetensors=True)
    if torch.accelerator.is_available():
        cast(nn.Module, base).to(torch.accelerator.current_accelerator())  # whose own types are lost in a decorator
    return base, AutoTokenizer.from_pretrained(path)


def find_base_model(name: str | Path) -> tuple[str | Path, PreTrainedConfig]:
    """Return where a base model is, and its configuration.

    Raises:
        OSError: if there is no such model.
    """
    path = smollm2_path() if name == "smollm2" else name
    try:
        return path, AutoConfig.from_pretrained(path)
    except OSError as error:
        raise OSError(
            f"Base model {str(name)!r}: expected a folder or a Hub id that can be loaded (--base_model on the "
            f"command line). {error}"
        ) from error


def base_model_fingerprint(model: nn.Module) -> str:
    """Return a hash of a base model's weights that LoRA layers, adapters and a load in bf16 or fp32 do not change.

    Names, shapes and up to 64 evenly spaced values of every parameter count, rounded to bf16: enough to tell two
    checkpoints apart, and a matter of milliseconds on a large model.
    """
    parameters = sorted(base_parameters(model).items())
    sampled: list[torch.Tensor] = []
    for _, parameter in parameters:
        values = parameter.detach().reshape(-1)
        sampled.append(values[:: max(1, values.numel() // 64)][:64].cpu())
    # All at once, which is several times faster.
    rounded = torch.cat(sampled).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    parts: list[bytes | str] = []
    start = 0
    for (name, parameter), values in zip(parameters, sampled, strict=True):
        parts += [name, str(tuple(parameter.shape)), rounded[start : (start := start + 2 * len(values))]]
    return sha256_of(*parts)


@cache
def fast_dtype() -> torch.dtype:
    """Return the dtype in which this machine runs a frozen base model fastest: bfloat16 or float32.

    Accelerators multiply bfloat16. A CPU without instructions for it is slower than with float32, so it is measured,
    in a few milliseconds.

    Example:
        >>> base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype())  # doctest: +SKIP
    """
    if torch.accelerator.is_available():
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        start = time.perf_counter()
        inputs[dtype] @ inputs[dtype].T
        return time.perf_counter() - start

    # By turns and often: on a busy machine a few runs in a row can all be slow.
    inputs = {dtype: torch.ones(256, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    rounds = [{dtype: seconds(dtype) for dtype in inputs} for _ in range(20)]
    return min(inputs, key=lambda dtype: min(times[dtype] for times in rounds))


@contextmanager
def frozen_base(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Within this context the base model is as it was before any adapter: adapters off, eval mode, no gradients.

    One thread at a time has it: what reads a base model puts hooks on it, which another thread would run into.

    Yields:
        `PreTrainedModel`: the base model itself, also when a `PeftModel` was given. Every module's mode is restored.
    """
    # Also in a base that PEFT changed in place while the caller still holds it unwrapped.
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    with _lock_of(unwrapped(model)), restored(model), torch.no_grad():  # PEFT unfreezes an adapter that it turns on
        model.eval()
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield unwrapped(model)
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def _lock_of(base_model: nn.Module) -> threading.RLock:
    with _LOCKING:
        return _LOCKS.setdefault(base_model, threading.RLock())


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """After this context every module is in its old mode again, every parameter as frozen or free as it was."""
    flags = ("training", "gradient_checkpointing")
    modes = [(m, flag, getattr(m, flag)) for m in model.modules() for flag in flags if hasattr(m, flag)]
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = cast(PreTrainedModel, model).config
    use_cache = getattr(config, "use_cache", None)  # Trainer turns it off
    try:
        yield
    finally:
        checkpointed = [m for m, flag, was in modes if flag == "gradient_checkpointing" and getattr(m, flag) != was]
        if checkpointed:
            cast(PreTrainedModel, model).disable_input_require_grads()  # for which PEFT hooks the embeddings
        if use_cache is not None:
            config.use_cache = use_cache
        for module, flag, value in modes:
            if getattr(module, flag) != value:  # or a class's attribute would become the module's own
                setattr(module, flag, value)
        for parameter, was_free in requires_grad.items():
            parameter.requires_grad_(was_free)


def require_bare(model: nn.Module) -> None:
    """Refuse a model that carries adapters, also one that PEFT changed in place while the caller holds it unwrapped.

    Raises:
        IncompatibleAdapterError: if it does.
    """
    if any(isinstance(module, (PeftModel, BaseTunerLayer)) for module in model.modules()):
        raise IncompatibleAdapterError(
            "Expected a base model without adapters, found one with: call unload() first, or go on with the PeftModel."
        )


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base model's own parameters under the names that they have without PEFT."""
    named = unwrapped(model).named_parameters()
    return {name.replace(".base_layer.", "."): parameter for name, parameter in named if ".lora_" not in name}


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the base model of a `PeftModel`, and any other model as it is."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
