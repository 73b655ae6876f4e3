"""The exceptions of this package.

IcmLoraError
├── ArgumentError             (ValueError)       an argument has a value that is not allowed, or not beside another one
├── AlreadyExistsError        (FileExistsError)  what would be written is there already
├── CorruptFileError          (ValueError)       a file cannot be read as what it claims to be
│   └── CorruptAdapterError                      so does a LoRA file or folder
├── IncompatibleAdapterError  (ValueError)       a readable adapter does not fit this layout, base model or generator
├── TaskError                 (ValueError)       a task, its samples or its description cannot be used
├── TaskVectorError           (ValueError)       a task vector does not fit the generator, or cannot be made
├── UnfamiliarTaskError       (ValueError)       an adapter does harm on its own examples, and this was to be said
├── NotFittedError            (RuntimeError)     the generator lacks its statistics or its encoder
├── PublishingError           (ValueError)       what would be published is of no use to others
├── TrainingError             (RuntimeError)     training cannot start, go on or resume
└── ZooError                  (ValueError)       a zoo's directory and what was asked of it disagree

Every leaf is also a built-in exception, so `except ValueError` in existing code still catches it.
"""


class IcmLoraError(Exception):
    """Base class of every error that `hf_icm_lora` raises on purpose."""


class ArgumentError(IcmLoraError, ValueError):
    """An argument has a value that is not among those it may have, or that does not go with another argument."""


class AlreadyExistsError(IcmLoraError, FileExistsError):
    """A folder or a task that would be written exists already; it is as it was."""


class CorruptFileError(IcmLoraError, ValueError):
    """A file is truncated, malformed, too large, no ordinary file, or holds values that are not finite."""


class CorruptAdapterError(CorruptFileError):
    """A LoRA file or folder is truncated, malformed, not safetensors, or holds values that are not finite."""


class IncompatibleAdapterError(IcmLoraError, ValueError):
    """An adapter is readable, but its layout, configuration or base model is not the expected one."""


class TaskError(IcmLoraError, ValueError):
    """A task has no usable samples, overlapping splits, or a name that is already taken."""


class TaskVectorError(IcmLoraError, ValueError):
    """A task vector has the wrong size or values, or was made by another specification or base model."""


class UnfamiliarTaskError(IcmLoraError, ValueError):
    """A generated adapter does harm on its own examples, and `on_unfamiliar="raise"` asked to say so."""


class NotFittedError(IcmLoraError, RuntimeError):
    """The generator lacks what was asked of it: its normalization statistics, or its encoder."""


class PublishingError(IcmLoraError, ValueError):
    """What would be published names a folder of this machine, holds pickles, or lacks a place for an evaluation."""


class TrainingError(IcmLoraError, RuntimeError):
    """A loss is not finite, or there is nothing to start from or to resume from."""


class ZooError(IcmLoraError, ValueError):
    """A zoo directory is missing, incomplete, of a newer version, made for something else, or lacks what was asked."""
