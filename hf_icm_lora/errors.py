"""The exceptions of this package.

IcmLoraError
├── CorruptAdapterError       (ValueError)       a LoRA file or folder cannot be read as what it claims to be
├── EvaluationError           (ValueError)       a row, a report or a picture was asked for that cannot be made
├── IncompatibleAdapterError  (ValueError)       a readable adapter does not fit this layout, base model or generator
├── TaskError                 (ValueError)       a task, its samples or its description cannot be used
├── TaskVectorError           (ValueError)       a task vector does not fit the generator, or cannot be made
├── UnfamiliarTaskError       (ValueError)       an adapter does harm on its own examples, and this was to be said
├── NotFittedError            (RuntimeError)     the generator lacks its statistics or its encoder
└── ZooError                  (FileExistsError)  a zoo's directory and what was asked of it disagree

Every leaf is also a built-in exception, so `except ValueError` in existing code still catches it.
"""


class IcmLoraError(Exception):
    """Base class of every error that `hf_icm_lora` raises on purpose."""


class CorruptAdapterError(IcmLoraError, ValueError):
    """A LoRA file or folder is truncated, malformed, not safetensors, or holds values that are not finite."""


class EvaluationError(IcmLoraError, ValueError):
    """A row of an evaluation, a report, a metric or a picture was asked for that cannot be made of what is there."""


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


class ZooError(IcmLoraError, FileExistsError):
    """A zoo directory is missing, incomplete, of another version, or already holds what would be written."""
