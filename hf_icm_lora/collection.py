"""Collecting a zoo: one LoRA per task, fine-tuned with `transformers.Trainer` on the frozen base model.

What happened is in the zoo's `collection.log`, a line per task: when, which, and steps, loss and seconds, or the
error. It is appended to, also by several processes, and never uploaded.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from .adapter import adapter_state_dict
from .base_model import base_model_fingerprint, require_bare, restored
from .completion import DEFAULT_TEMPLATE, CompletionCollator, score_completions
from .errors import AlreadyExistsError, ArgumentError, TrainingError
from .files import sweep_temporary
from .layout import LoraLayout
from .lora_config import check_plain_lora, lora_config_to_dict
from .tasks import Task, check_unique_names
from .zoo import LoraZoo

logger = logging.get_logger(__name__)

LOG_FILE = "collection.log"


@dataclass
class CollectionArguments(TrainingArguments):
    r"""How each task's LoRA is fine-tuned: `TrainingArguments` with defaults for short runs, and a few fields more.

    Args:
        freeze_a (`bool`, *optional*, defaults to `True`): Whether all tasks share one untrained A, so that only B is
            trained and later generated. It reaches the loss of training both, with half the numbers.
        num_snapshots (`int`, *optional*, defaults to 4): Snapshots to keep per task: the best on the `demo` samples
            and those before it, `eval_steps` apart.
        patience (`int`, *optional*, defaults to 2): Evaluations without improvement after which a task ends.
        template (`str`, *optional*): Text with `{prompt}` and `{completion}`, or `"chat"` for the tokenizer's own.
        row_length (`int`, *optional*, defaults to 64): As in [`CompletionCollator`].
        on_error (`str`, *optional*, defaults to `"stop"`): Whether an error in one task, such as too little memory,
            ends the collection, or with `"skip"` is reported and the other tasks go on. Errors of the file system
            always end it.

    Raises:
        ArgumentError: if `on_error` is neither.

    > Fields of `TrainingArguments` with other defaults:

        max_steps 48, eval_steps 8, learning_rate 1e-2 (B starts at zero and is alone), per_device_train_batch_size 16,
        linear schedule with 4 warm-up steps.
    """

    max_steps: int = field(default=48)
    eval_steps: float | None = field(default=8)
    learning_rate: float = field(default=1e-2)
    warmup_steps: float = field(default=4)
    per_device_train_batch_size: int = field(default=16)
    per_device_eval_batch_size: int = field(default=32)
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)  # on a CPU it only warns
    freeze_a: bool = field(default=True, metadata={"help": "Share one untrained A; train and generate B alone."})
    num_snapshots: int = field(default=4, metadata={"help": "Snapshots to keep per task, up to the best one."})
    patience: int = field(default=2, metadata={"help": "Evaluations without improvement after which a task ends."})
    template: str = field(default=DEFAULT_TEMPLATE, metadata={"help": "Text with {prompt} and {completion}; or chat."})
    row_length: int = field(default=64, metadata={"help": "Tokens of a row, which holds as many samples as fit."})

    on_error: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "With skip, an error in one task is reported and the others go on."}
    )

    def __post_init__(self):
        if self.on_error not in ("stop", "skip"):
            raise ArgumentError(f"on_error: expected 'stop' or 'skip', found {self.on_error!r}.")
        self.eval_strategy, self.save_strategy, self.report_to = "steps", "no", []
        self.remove_unused_columns, self.disable_tqdm, self.logging_strategy = False, True, "no"
        super().__post_init__()


def collect_zoo(
    output_dir: str | Path,
    base_model: PreTrainedModel,
    processing_class,
    tasks: Sequence[Task],
    lora_config: LoraConfig,
    args: CollectionArguments | None = None,
) -> LoraZoo:
    """Fine-tune one LoRA per task and keep the last snapshots of each in a zoo.

    Tasks that the zoo already holds are skipped, so an interrupted collection is resumed by the same call; several
    processes may collect into one zoo, on one machine or on several that share its file system: they share the tasks,
    and what one leaves unfinished when it dies another one takes up. Processes of `accelerate launch` call
    `processes.leave_group()` first, as the command line does. `collection.log` in the zoo says what happened.

    Args:
        output_dir (`str` or `Path`): The zoo's directory.
        base_model (`PreTrainedModel`): The base. It comes back unchanged, also after an error.
        processing_class: Its tokenizer.
        tasks (`Sequence[Task]`): Tasks with `train` and `demo` samples.
        lora_config (`LoraConfig`): A plain LoRA; its `init_lora_weights` is ignored, since all tasks start from one A
            drawn from `args.seed`, and B = 0.
        args (`CollectionArguments`, *optional*): How to train.

    Returns:
        `LoraZoo`: all complete tasks of the directory, those of earlier calls included.

    Raises:
        TaskError: if a task lacks samples or a name stands twice; or if the template is none.
        IncompatibleAdapterError: if the base already carries adapters, or the LoRA is no plain one.
        ZooError: if the directory holds a zoo of something else.
        TrainingError: if a loss is not finite, with the task and the step; or if `args` were made in a group of
            processes.
    """
    tasks = check_unique_names(tasks)
    for task in tasks:
        task.require("train", 1, "a LoRA")
        task.require("demo", 1, "early stopping")
    require_bare(base_model)
    fields = {name: value for name, value in lora_config_to_dict(lora_config).items() if name != "init_lora_weights"}
    check_plain_lora(fields)
    args = args or CollectionArguments(output_dir=tempfile.gettempdir())
    if args.world_size > 1:
        raise TrainingError(
            f"Expected a process of its own, found one of a group of {args.world_size}, which would average the "
            "gradients of different tasks: call processes.leave_group() before CollectionArguments are made."
        )
    collate = CompletionCollator(
        processing_class, base_model.config.is_encoder_decoder, args.template, row_length=args.row_length
    )
    fingerprint = base_model_fingerprint(base_model)
    with restored(base_model):
        # PEFT keeps and changes its configuration, so it gets its own.
        model = get_peft_model(base_model, LoraConfig(**fields))
        try:
            start = _shared_start(model, args.seed)
            zoo = LoraZoo.create(
                output_dir,
                layout=LoraLayout.from_state_dict(start, fields, "frozen_a" if args.freeze_a else "shared_init"),
                lora_config=fields,
                base_model_name_or_path=base_model.config._name_or_path,
                base_model_fingerprint=fingerprint,
                template=args.template,
            )
            remaining = [task for task in tasks if task.name not in zoo]
            if len(remaining) < len(tasks):
                logger.info(f"{output_dir}: {len(tasks) - len(remaining)} of {len(tasks)} tasks are complete already.")
            progress = tqdm(remaining, desc="Collecting LoRAs", disable=not logging.is_progress_bar_enabled())
            failed: list[str] = []
            others: list[Task] = []
            for task in chain(progress, others):  # what other processes are at comes last, in case that they die
                progress.set_postfix_str(task.name)
                with zoo.claimed(task.name, wait=task in others) as free:
                    if zoo.holds(task.name):  # by another process, since this one began
                        continue
                    if not free:
                        others.append(task)
                        continue
                    try:
                        _collect_task(zoo, model, collate, task, args, start)
                    except AlreadyExistsError:
                        if not zoo.holds(task.name):  # else another process was faster
                            raise
                    except Exception as error:
                        told = f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"
                        _log(zoo, task, told)
                        if args.on_error == "stop" or isinstance(error, OSError):
                            raise
                        logger.warning(f"Task {task.name!r} is skipped. {told}")
                        failed.append(task.name)
            if failed:
                logger.warning(f"{len(failed)} of {len(tasks)} tasks failed: see {zoo.path / LOG_FILE}.")
        finally:
            model.unload()
    sweep_temporary(zoo.path)
    return LoraZoo(zoo.path)


class _TaskTrainer(Trainer):
    """Completion loss, with logits where there is a label and nowhere else."""

    def __init__(self, task: Task, **kwargs):
        super().__init__(train_dataset=list(task.train), eval_dataset=list(task.demo), **kwargs)
        self.task = task

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = score_completions(model, inputs)
        loss = scores.loss.sum() / (scores.num_tokens.sum() if num_items_in_batch is None else num_items_in_batch)
        self._require_finite(loss.item(), self.state.global_step + 1)
        return (loss, {"scores": scores}) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, *_, **__):
        """Loss per token over the validation samples, without the gathering that Trainer's loop does."""
        self.model.eval()
        total, tokens = 0.0, 0
        for batch in self.get_eval_dataloader():
            scores = score_completions(self.model, batch)
            total, tokens = total + scores.loss.sum().item(), tokens + scores.num_tokens.sum().item()
        metrics = {"eval_loss": total / tokens}
        self._require_finite(metrics["eval_loss"], self.state.global_step)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"Task {self.task.name!r}, step {step}: the loss became {loss}. Lower the learning rate, or use a "
                "dtype with a larger range."
            )


class _SnapshotCallback(TrainerCallback):
    """Keep the adapter at every evaluation, and stop when the validation loss no longer falls."""

    def __init__(self, num_snapshots: int, patience: int):
        self.num_snapshots, self.patience = num_snapshots, patience
        self.losses: dict[int, float] = {}
        self.snapshots: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def best_step(self) -> int:
        return min(self.losses, key=lambda step: self.losses[step])

    def on_evaluate(self, args, state, control, metrics, model=None, **kwargs):
        self.losses[state.global_step] = metrics["eval_loss"]
        self.snapshots[state.global_step] = adapter_state_dict(model)
        kept = [step for step in sorted(self.snapshots) if step <= self.best_step][-self.num_snapshots :]
        self.snapshots = {s: w for s, w in self.snapshots.items() if s in kept or s > self.best_step}
        since_best = sum(step > self.best_step for step in self.losses)
        control.should_training_stop |= since_best >= self.patience


def _collect_task(
    zoo: LoraZoo, model: PeftModel, collate: CompletionCollator, task: Task, args: CollectionArguments, start
) -> None:
    started = time.perf_counter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(start[name.replace(".default.", ".")])
                parameter.requires_grad_(".lora_B" in name or not args.freeze_a)
    snapshots = _SnapshotCallback(args.num_snapshots, args.patience)
    trainer = _TaskTrainer(
        task,
        model=model,
        args=args,
        data_collator=collate,
        callbacks=[snapshots],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    best, seconds = snapshots.best_step, round(time.perf_counter() - started, 2)
    zoo.add(
        task.name,
        {step: state_dict for step, state_dict in snapshots.snapshots.items() if step <= best},
        best_step=best,
        description=task.description,
        family=task.family,
        validation_losses=snapshots.losses,
        seed=args.seed,
        seconds=seconds,
    )
    steps = trainer.state.global_step
    _log(zoo, task, f"{steps} steps, loss {snapshots.losses[best]:.4f} at step {best}, {seconds} s")


def _log(zoo: LoraZoo, task: Task, text: str) -> None:
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}  {task.name!r}  {text}\n"
    with (zoo.path / LOG_FILE).open("a", encoding="utf-8") as log:  # one write at the end of the file
        log.write(line)


def _shared_start(model: PeftModel, seed: int) -> dict[str, torch.Tensor]:
    """Draw the A that all tasks start from, without touching the global random state; B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    start = adapter_state_dict(model)
    for name in sorted(start):
        if ".lora_A." in name:  # as PEFT does by default
            nn.init.kaiming_uniform_(start[name], a=math.sqrt(5), generator=generator)
        else:
            start[name].zero_()
    return start
