"""LoRA adapters written by a conditional VAE from in-context task vectors (arXiv 2501.17635)."""

from .adapter import AdapterSlot, attach_adapter, load_adapter, save_adapter
from .base_model import base_model_fingerprint, fast_dtype
from .behaviour import ExampleLoss
from .closed_form import in_context_adapter
from .collection import CollectionArguments, collect_zoo
from .completion import CompletionCollator, label_accuracy
from .configuration_lora_generator import LoraGeneratorConfig
from .errors import (
    AlreadyExistsError,
    ArgumentError,
    CorruptAdapterError,
    CorruptFileError,
    IcmLoraError,
    IncompatibleAdapterError,
    NotFittedError,
    PublishingError,
    TaskError,
    TaskVectorError,
    TrainingError,
    UnfamiliarTaskError,
    ZooError,
)
from .evaluation import evaluate_generator
from .generation import GenerationRecord
from .hub import push_adapter, save_adapter_card
from .importing import import_zoo
from .layout import LoraLayout
from .model_card import add_evaluation, generator_card
from .modeling_lora_generator import LoraGeneratorModel, LoraGeneratorOutput
from .report import format_report, read_report, recovered_accuracy, recovered_gain
from .serving import check_serving_compatibility, export_gguf, plain_adapter
from .smollm2 import smollm2_generator_path, smollm2_path
from .suite import built_in_tasks
from .task_vectors import TaskVectorExtractor, TaskVectors, TaskVectorSpec
from .tasks import Sample, Task, load_tasks, save_tasks, task_from_dataset
from .trainer import LoraGeneratorTrainer, LoraGeneratorTrainingArguments, RecipeArguments, train_generator
from .training_data import BehaviouralCollator, BehaviouralDataset
from .zoo import LoraZoo

__version__ = "0.1.0"

__all__ = [
    "AdapterSlot",
    "AlreadyExistsError",
    "ArgumentError",
    "BehaviouralCollator",
    "BehaviouralDataset",
    "CollectionArguments",
    "CompletionCollator",
    "CorruptAdapterError",
    "CorruptFileError",
    "ExampleLoss",
    "GenerationRecord",
    "IcmLoraError",
    "IncompatibleAdapterError",
    "LoraGeneratorConfig",
    "LoraGeneratorModel",
    "LoraGeneratorOutput",
    "LoraGeneratorTrainer",
    "LoraGeneratorTrainingArguments",
    "LoraLayout",
    "LoraZoo",
    "NotFittedError",
    "PublishingError",
    "RecipeArguments",
    "Sample",
    "Task",
    "TaskError",
    "TaskVectorError",
    "TaskVectorExtractor",
    "TaskVectorSpec",
    "TaskVectors",
    "TrainingError",
    "UnfamiliarTaskError",
    "ZooError",
    "add_evaluation",
    "attach_adapter",
    "base_model_fingerprint",
    "built_in_tasks",
    "check_serving_compatibility",
    "collect_zoo",
    "evaluate_generator",
    "export_gguf",
    "fast_dtype",
    "format_report",
    "generator_card",
    "import_zoo",
    "in_context_adapter",
    "label_accuracy",
    "load_adapter",
    "load_tasks",
    "plain_adapter",
    "push_adapter",
    "read_report",
    "recovered_accuracy",
    "recovered_gain",
    "save_adapter",
    "save_adapter_card",
    "save_tasks",
    "smollm2_generator_path",
    "smollm2_path",
    "task_from_dataset",
    "train_generator",
]
