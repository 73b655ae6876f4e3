"""What is told of a run and of where things come from: versions, machine, arguments; and nothing that is private."""

import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

LIBRARY = "hf_icm_lora"
PACKAGES = (LIBRARY, "transformers", "peft", "torch", "safetensors", "huggingface_hub", "datasets", "accelerate")


def run_metadata(seed: int) -> dict[str, Any]:
    """Return what a figure needs beside it to be reproduced: command, date, versions, machine, seed."""
    return {
        "command": " ".join(public_arguments(sys.argv)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "machine": {"processor": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads()},
        "seed": seed,
    }


def package_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that decide what it computes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # this one, where it is run without being installed
            found[name] = "not installed"
    return found


def public_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line as others may see it: without secrets, absolute paths by their last part alone.

    Example:
        >>> public_arguments(["/home/me/train.py", "--zoo=/data/zoo", "--hub_token", "hf_abc"])
        ['train.py', '--zoo=zoo', '--hub_token', '***']
    """
    told, secret = [], False
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        named = re.search("token|key|secret|password", option, re.IGNORECASE)
        if secret or named or re.match("hf_[A-Za-z0-9]{8,}", value):
            value = "***"
        elif Path(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith("~"):
            value = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        told.append(option + equals + value)
        secret = not equals and bool(re.match("--?.*(token|key|secret|password)", argument, re.IGNORECASE))
    return told


def is_local(name_or_path: str) -> bool:
    """Return whether a name of a model means a folder of this machine, and no repository on the Hub."""
    return not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_path) or Path(name_or_path).exists()
