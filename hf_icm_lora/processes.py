"""Work that the processes of `accelerate launch` share: each does its part, and all get the whole."""

import os
from collections.abc import Mapping, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from .errors import TrainingError


def state() -> PartialState:
    """Return what this process knows of the others; one that was started by itself has none."""
    return PartialState(cpu=not torch.accelerator.is_available())


def own_part(items: Sequence) -> list:
    """Return every n-th item, for n processes."""
    return list(items[state().process_index :: state().num_processes])


def gathered(part: Mapping) -> dict:
    """Return the parts of all processes as one dictionary; all of them must call it."""
    state()  # or gather_object would not know of the others
    return {key: value for one in gather_object([dict(part)]) for key, value in one.items()}


def leave_group() -> None:
    """Let a process that was launched together with others work by itself, on a device of its own.

    It changes the process's environment, for good. A process that was started by itself is left as it is.

    Raises:
        TrainingError: if it is too late for that.

    Example:
        >>> leave_group()  # before the first TrainingArguments
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if torch.cuda.is_initialized() or (PartialState._shared_state and PartialState().num_processes > 1):
        raise TrainingError("Expected leave_group() to be called before a device or a process group is used.")
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ["CUDA_VISIBLE_DEVICES"] = devices.split(",")[rank] if devices else str(rank)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
