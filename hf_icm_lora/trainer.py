"""Training a generator: `transformers.Trainer` with a conditional VAE's loss or the base model's behaviour, and the
recipe that does both."""

import dataclasses
import json
import zipfile
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, HfApi
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SchedulerType
from transformers.utils import CONFIG_NAME, PushInProgress, logging

from .base_model import require_bare, restored
from .behaviour import behavioural_loss
from .completion import CompletionCollator
from .configuration_lora_generator import LoraGeneratorConfig
from .errors import ArgumentError, PublishingError, TaskError, TrainingError, ZooError
from .hub import CARD_FILE, push_files, require_hub_id
from .model_card import generator_card
from .modeling_lora_generator import LoraGeneratorModel, LoraGeneratorOutput, kl_per_unit
from .processes import state
from .provenance import run_metadata
from .task_vectors import TaskVectorExtractor, TaskVectors, TaskVectorSpec
from .tasks import Task
from .training_data import BehaviouralCollator, BehaviouralDataset

logger = logging.get_logger(__name__)

ACTIVE_UNIT_NATS = 0.01  # a latent unit is active if it carries more than this on average


@dataclass
class LoraGeneratorTrainingArguments(TrainingArguments):
    r"""`TrainingArguments` with the weights of the generator's loss.

    On items with `lora_weights` the loss per sample is `reconstruction_loss + kl_weight * mean over latent units of
    max(kl, free_bits)`; in the usual terms of a beta-VAE with unit variance, beta = kl_weight * num_weights /
    (2 * latent_size). On items with `samples` it is the base model's loss on them.

    Args:
        kl_weight (`float`, *optional*, defaults to 0.01): Weight of the KL term.
        kl_warmup_ratio (`float`, *optional*, defaults to 0.2): Fraction of all steps over which it rises from zero.
            Evaluation always uses the full weight.
        free_bits (`float`, *optional*, defaults to 0.05): Nats per latent unit that cost nothing.
        row_length (`int`, *optional*, defaults to 48): Tokens of a row of samples, as in [`CompletionCollator`].
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`): A loss that is not a number is an error here.
    """

    kl_weight: float = field(default=0.01, metadata={"help": "Weight of the KL term."})
    kl_warmup_ratio: float = field(default=0.2, metadata={"help": "Fraction of all steps over which it rises from 0."})
    free_bits: float = field(default=0.05, metadata={"help": "Nats per latent unit that cost nothing."})
    row_length: int = field(default=48, metadata={"help": "Tokens of a row, which holds as many samples as fit."})
    learning_rate: float = field(default=1e-3)
    warmup_steps: float = field(default=0.05)
    lr_scheduler_type: str = field(default="cosine")
    per_device_train_batch_size: int = field(default=16)
    per_device_eval_batch_size: int = field(default=32)
    max_grad_norm: float = field(default=1.0)
    logging_nan_inf_filter: bool = field(default=False)
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)  # on a CPU it only warns
    remove_unused_columns: bool = field(default=False)  # a collator needs the samples, which forward never sees


class LoraGeneratorTrainer(Trainer):
    """Train a [`LoraGeneratorModel`] on packed adapters and task vectors, or through the frozen base model.

    What is trained follows from the dataset. `LoraZoo.as_dataset()` gives reconstruction, the paper's loss. A
    [`BehaviouralDataset`] with `base_model` and its tokenizer gives behavioural training: weights are generated from
    the task vector, and their loss is the base model's on the task's samples, logged as `behavioural_loss`.
    [`train_generator`] runs the first, then the second on many more tasks.

    For reconstruction, logs and `evaluate()` report, beside the loss, averaged over samples: `reconstruction_loss`
    (from the posterior), `generation_loss` (from the task vector alone, which is what a user gets), `kl` in nats, and
    `active_units`.

    Args:
        model (`LoraGeneratorModel`): If its normalizer is not fitted yet, it is fitted on `train_dataset`.
        args (`LoraGeneratorTrainingArguments`, *optional*): How to train.
        train_dataset, eval_dataset (`Dataset`, *optional*): Items `{"lora_weights", "task_vector"}`, as from
            `LoraZoo.as_dataset()`. Split them by task, not by snapshot: if all tasks of `eval_dataset` are in
            `train_dataset`, a warning says that its losses are of seen tasks; if some are, that is an error.
        base_model (`PreTrainedModel`, *optional*): The base model without adapters, for behavioural training. It is
            frozen and in eval mode while training and evaluating, and restored after it.
        processing_class (*optional*): Its tokenizer, with which the samples become batches unless there is a
            `data_collator`. It is not saved: the base model has it.
        kwargs: All else that `transformers.Trainer` takes.

    Raises:
        TaskError: if `eval_dataset` mixes tasks of `train_dataset` with others.
        ArgumentError: if the base model, or what makes batches for it, is missing that a dataset needs.
        PublishingError: if what would be pushed names a local base model, or holds pickles.
        IncompatibleAdapterError: if the base model is another one, or has adapters.

    Example:
        >>> trainer = LoraGeneratorTrainer(model, args, train_dataset=seen.as_dataset())  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    args: LoraGeneratorTrainingArguments

    def __init__(
        self,
        model: LoraGeneratorModel,
        args: LoraGeneratorTrainingArguments | None = None,
        base_model: PreTrainedModel | None = None,
        processing_class=None,
        **kwargs,
    ):
        args = args or LoraGeneratorTrainingArguments(output_dir="trainer_output")
        if args.push_to_hub:  # now, and not after hours
            require_hub_id(model.config.base_model_name_or_path, "set model.config.base_model_name_or_path to one")
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                strategy = HubStrategy(args.hub_strategy).value
                raise PublishingError(
                    f"hub_strategy {strategy!r} would publish the optimizer's state as pickles, which others should "
                    "not open: choose 'every_save' or 'end'."
                )
        train_dataset = kwargs.get("train_dataset")
        warn_of_seen_tasks(train_dataset, kwargs.get("eval_dataset"))
        if base_model is not None:
            require_bare(base_model)
            model.check_base_model(base_model)
        if any(isinstance(dataset, BehaviouralDataset) for dataset in (train_dataset, kwargs.get("eval_dataset"))):
            if base_model is None:
                raise ArgumentError("Behavioural training goes through the base model: pass base_model too.")
            if kwargs.get("data_collator") is None:
                if processing_class is None:
                    raise ArgumentError("Samples are read by the base model: pass its processing_class too.")
                is_encoder_decoder, template = base_model.config.is_encoder_decoder, model.config.template
                collate = CompletionCollator(
                    processing_class, is_encoder_decoder, template, row_length=args.row_length
                )
                kwargs["data_collator"] = BehaviouralCollator(collate)
        if isinstance(train_dataset, BehaviouralDataset):
            names = [*(model.config.training_tasks or ()), *(task.name for task in train_dataset.tasks)]
            model.config.training_tasks = list(dict.fromkeys(names))
        elif train_dataset is not None and not model.zoo_normalizer.is_fitted:
            model.fit_normalizer(train_dataset)
        super().__init__(model=model, args=args, **kwargs)
        self.frozen_base = None if base_model is None else cast(nn.Module, base_model).to(self.args.device)
        self.loss_is_scaled_for_ga = False  # compute_loss returns the mean of a batch
        self._terms: dict[str, list[dict[str, torch.Tensor]]] = {"train": [], "eval": []}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as `Trainer` does, with the base model frozen meanwhile; the configuration keeps a record of it.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint's folder; or `True` for the last whole
                one in `output_dir`, while `Trainer` takes the last one, also if it was interrupted while writing it.
            args, kwargs: As in `Trainer.train`.

        Raises:
            TrainingError: if no checkpoint is whole, or the loss is not finite.
        """
        if resume_from_checkpoint is True:
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir), sharded or self.args.save_only_model)
        with self._base_at_rest():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        config = self.accelerator.unwrap_model(self.model).config
        config.training_runs = [*(config.training_runs or []), self._record(output.metrics["train_runtime"])]
        return output

    def _record(self, seconds: float) -> dict:
        args, behavioural = self.args, isinstance(self.train_dataset, BehaviouralDataset)
        terms = {name: value for logs in self.state.log_history for name, value in logs.items() if "loss" in name}
        return {
            "trained_on": "samples, through the base model" if behavioural else "adapters",
            "items": len(cast(Sized, self.train_dataset)),
            "steps": self.state.global_step,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value,
            "seconds": round(seconds, 1),
            **{f"last_{name}": value for name, value in terms.items() if name != "train_loss"},
            **run_metadata(args.seed),
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle, which nothing reads
            Path(output_dir or str(self.args.output_dir), TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(  # type: ignore[override]  # a generator's card has its own way to name what Trainer asks for
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
    ) -> None:
        """Write the generator's card into `output_dir`, with all that its configuration knows of its training.

        Args:
            language, license, tags, dataset (*optional*): For the card's metadata.
        """
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else tags or ()
        model = self.accelerator.unwrap_model(self.model)
        card = generator_card(model, repo_id=self.hub_model_id, license=license, tags=tags)
        card.data["language"], card.data["datasets"] = language, dataset
        card.save(Path(str(self.args.output_dir)) / CARD_FILE)

    def push_to_hub(  # type: ignore[override]  # None from all processes but the first, as from Trainer
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | None:
        """Upload generator and card in one commit: no checkpoints, logs or pickles, which may lie beside them.

        Args:
            commit_message, token, revision, private: As in `Trainer.push_to_hub`.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait for it, instead of returning a `Future`.
            kwargs: For `create_model_card`.

        Raises:
            PublishingError: if `config.base_model_name_or_path` is a local folder, which nobody else can load.
        """
        model = self.accelerator.unwrap_model(self.model)
        require_hub_id(model.config.base_model_name_or_path, "set model.config.base_model_name_or_path to one")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        job = self._push(Path(str(self.args.output_dir)), commit_message, token, revision)
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = cast(PushInProgress | None, self.push_in_progress)
        if busy is not None and busy.is_done():
            busy = None
        if busy is not None and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        job = self._push(Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}")
        jobs = [job, *(cast(list, busy.jobs) if busy is not None else [])]
        self.push_in_progress = cast(Any, PushInProgress)(jobs)  # whose types know of one job alone

    def _push(self, folder: Path, commit_message: str | None, token: str | None = None, revision: str | None = None):
        # Read now: a checkpoint may be gone before it is uploaded.
        wanted = ("config.json", CARD_FILE, *(path.name for path in folder.glob("*.safetensors*")))
        files = {name: (folder / name).read_bytes() for name in wanted}
        options = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        api, keep = HfApi(), {"keep_card": False}
        return api.run_as_future(
            push_files, files, self.hub_model_id, commit_message=commit_message, **options, **keep
        )

    @contextmanager
    def _base_at_rest(self) -> Iterator[None]:
        if self.frozen_base is None:
            yield
        else:
            with restored(self.frozen_base):
                self.frozen_base.requires_grad_(False).eval()  # its dropout is not the generator's doing
                yield

    def training_step(self, model, *args, **kwargs) -> torch.Tensor:
        """Run one step, and stop if its loss is not finite, while the first tensor that is not still tells where."""
        loss = super().training_step(model, *args, **kwargs)
        if not loss.isfinite():
            tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
            tensors |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
            broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
            raise TrainingError(
                f"The loss became {loss.item()} by step {self.state.global_step + 1}; not finite: "
                f"{', '.join(broken[:3]) or 'none of the weights'}. Lower the learning rate, or look for an adapter "
                "with extreme values in the zoo."
            )
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean loss of the batch, and remember its terms."""
        if "labels" in inputs:
            losses, terms, output = self._behavioural_loss(model, inputs)
        else:
            losses, terms, output = self._reconstruction_loss(model, inputs)
        loss = losses.mean()
        if model.training:
            self._terms["train"].append({name: values.detach() for name, values in terms.items()})
        return (loss, output) if return_outputs else loss

    def _reconstruction_loss(self, model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor], LoraGeneratorOutput]:
        output = model(**inputs, return_loss=False, return_dict=True)
        units = _kl_per_unit(output)
        penalty = units.clamp(min=self.args.free_bits).mean(1)  # (batch,)
        losses = output.reconstruction_loss + self._kl_weight(model.training) * penalty  # (batch,)
        return losses, {"reconstruction_loss": output.reconstruction_loss, "kl_per_unit": units}, output

    def _behavioural_loss(self, model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor], LoraGeneratorOutput]:
        batch = dict(inputs)
        output = model(task_vector=batch.pop("task_vector"), return_loss=False, return_dict=True)
        generator = self.accelerator.unwrap_model(model)
        adapters = (generator.layout, output.lora_weights, generator.shared_weights)
        losses = behavioural_loss(cast(nn.Module, self.frozen_base), *adapters, batch)
        return losses, {"behavioural_loss": losses}, output

    def _kl_weight(self, training: bool) -> float:
        # A pure function of the step: a resumed run follows the same curve, and evaluations compare.
        warmup = self.args.kl_warmup_ratio * self.state.max_steps
        risen = min(1.0, (self.state.global_step + 1) / warmup) if training and warmup > 0 else 1.0
        return self.args.kl_weight * risen

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluate one batch; the generated weights stay here, only their error goes on."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            if "labels" in inputs:
                losses, terms, _ = self._behavioural_loss(model, inputs)
            else:
                losses, terms, _ = self._reconstruction_loss(model, inputs)
                normalizer = self.accelerator.unwrap_model(model).zoo_normalizer
                generated = model(task_vector=inputs["task_vector"], return_loss=False, return_dict=True).lora_weights
                terms["generation_loss"] = normalizer.error(generated, inputs["lora_weights"])
        # Per batch, since it drops the samples that padded the last one; Trainer's own mean of losses counts them.
        self._terms["eval"].append(self.accelerator.gather_for_metrics(terms | {"loss": losses}))
        return losses.mean(), None, None

    def evaluation_loop(self, *args, **kwargs):
        """Run the loop of `Trainer` and add the terms of the loss to what it returns."""
        self._terms["eval"].clear()
        with self._base_at_rest():
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._mean_terms("eval").items()})
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the terms of the training loss since the last log."""
        if "loss" in logs:
            logs = logs | self._mean_terms("train")
        super().log(logs, *args, **kwargs)

    def _mean_terms(self, split: str) -> dict[str, float]:
        batches, self._terms[split] = self._terms[split], []
        if not batches:
            return {}
        stacked = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}  # over samples
        if split == "train":
            stacked = self.accelerator.gather(stacked)
        units = stacked.pop("kl_per_unit", None)
        means = {name: values.mean().item() for name, values in stacked.items()}
        if units is not None:
            units = units.mean(0)  # (latent_size,)
            means |= {"kl": units.sum().item(), "active_units": int((units > ACTIVE_UNIT_NATS).sum())}
        return means


def last_checkpoint(output_dir: str | Path, weights_only: bool = False) -> str:
    """Return the last whole checkpoint of a training.

    Args:
        output_dir (`str` or `Path`): Where the checkpoints are.
        weights_only (`bool`, *optional*, defaults to `False`): Whether nothing but weights is expected in them: of
            `save_only_model`, and where the state of the optimizer has other names.

    Raises:
        TrainingError: if there is none.
    """
    checkpoints = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = {int(folder.name.rpartition("-")[2]): folder for folder in checkpoints if folder.name[-1].isdigit()}
    for _, folder in sorted(numbered.items(), reverse=True):
        if not (lacks := _what_is_broken(folder, weights_only)):
            return str(folder)
        logger.warning(f"{folder} is no whole checkpoint ({lacks}), and the one before it is taken.")
    raise TrainingError(
        f"{output_dir}: expected a whole checkpoint to resume from, found {sorted(numbered)}: start without "
        "resume_from_checkpoint."
    )


def _what_is_broken(checkpoint: Path, weights_only: bool) -> str | None:
    # The state is written last, so one that can be read tells of the rest; files may be lost later, too.
    states = [] if weights_only else [OPTIMIZER_NAME, SCHEDULER_NAME]
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        for file in weights:
            safe_open(file, framework="pt")
        for name in states:
            zipfile.ZipFile(checkpoint / name).close()
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error)
    if states and not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    return None if weights else "model.safetensors is missing"


def _kl_per_unit(output: LoraGeneratorOutput) -> torch.Tensor:
    moments = (output.posterior_mean, output.posterior_logvar, output.prior_mean, output.prior_logvar)
    return kl_per_unit(*(cast(torch.Tensor, moment) for moment in moments))


def warn_of_seen_tasks(train_dataset, eval_dataset) -> None:
    """Say so if a dataset for evaluation has tasks that are trained on; refuse one that mixes them with others.

    Raises:
        TaskError: if it does.
    """
    trained = set(getattr(train_dataset, "task_names", ()))
    for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,):
        names = getattr(dataset, "task_names", ())
        seen = [name for name in names if name in trained]
        if seen and len(seen) < len(names):
            raise TaskError(
                f"{len(seen)} of {len(names)} tasks of eval_dataset are in train_dataset too, such as {seen[:3]}: its "
                "losses would be neither of seen nor of unseen tasks. Split them by task."
            )
        if seen:
            logger.warning("All tasks of eval_dataset are in train_dataset: its losses are of seen tasks.")


@dataclass
class RecipeArguments(LoraGeneratorTrainingArguments):
    r"""How [`train_generator`] trains, by default as measured on SmolLM2-135M with the built-in suite.

    The fields of `TrainingArguments` are those of the second stage, through the base model, with other defaults:
    `max_steps` 1600 (0 leaves the stage out), and a `learning_rate` of 8e-3, constant for the first half and falling
    after that, so that a longer run can go on from a checkpoint.

    Args:
        reconstruction_steps (`int`, *optional*, defaults to 300): Steps of the first stage, on the zoo's LoRAs.
        reconstruction_learning_rate (`float`, *optional*, defaults to 2e-3): At its peak; it falls as a cosine.
        num_samples (`int`, *optional*, defaults to 8): As in [`BehaviouralDataset`].
    """

    output_dir: str | None = field(default="generator", metadata={"help": "Where the generator goes."})
    reconstruction_steps: int = field(default=300, metadata={"help": "Steps on the zoo's LoRAs, before all others."})
    reconstruction_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of these steps."})
    num_samples: int = field(default=8, metadata={"help": "Samples that go with a task vector."})
    max_steps: int = field(default=1600, metadata={"help": "Steps through the base model; may be 0."})
    learning_rate: float = field(default=8e-3, metadata={"help": "Learning rate of the steps through the base model."})
    lr_scheduler_type: str = field(default="warmup_stable_decay")
    logging_steps: float = field(default=25)
    save_steps: float = field(default=300)

    def __post_init__(self):
        super().__post_init__()
        if self.lr_scheduler_type == "warmup_stable_decay" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"num_decay_steps": max(1, self.max_steps // 2)}

    def reconstruction(self) -> LoraGeneratorTrainingArguments:
        """Return how the first stage is trained, which is short: without checkpoints, evaluation and upload."""
        return dataclasses.replace(
            self,
            output_dir=str(Path(str(self.output_dir)) / "reconstruction"),
            max_steps=self.reconstruction_steps,
            learning_rate=self.reconstruction_learning_rate,
            lr_scheduler_type="cosine",
            lr_scheduler_kwargs=None,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            push_to_hub=False,
            resume_from_checkpoint=None,
            run_name=f"{self.run_name}-reconstruction" if self.run_name else None,  # a run of its own for trackers
        )


def train_generator(
    zoo,
    base_model: PreTrainedModel,
    processing_class,
    tasks: Sequence[Task],
    args: RecipeArguments | None = None,
    *,
    eval_tasks: Sequence[Task] = (),
    callbacks: Sequence | None = None,
    **config,
) -> LoraGeneratorModel:
    """Train a generator: first on the LoRAs that a zoo holds of the tasks, then through the base model on all of them.

    The second stage needs samples and no LoRA: give it many more tasks than the zoo has. With
    `args.resume_from_checkpoint` it goes on from one of its checkpoints: a folder or, for `True`, the last whole one
    in `args.output_dir`.

    Args:
        zoo (`LoraZoo`): With a LoRA for some of the tasks; what it holds of others is not looked at. One without task
            vectors gets them.
        base_model (`PreTrainedModel`): The base model of the zoo, without adapters; it comes back unchanged.
        processing_class: Its tokenizer.
        tasks (`Sequence[Task]`): To train on, with `train` and `demo` samples: the seen tasks.
        args (`RecipeArguments`, *optional*): How to train, and where the generator goes.
        eval_tasks (`Sequence[Task]`, *optional*): Other tasks, with the same, to evaluate on by their loss through the
            base model: during the second stage as `args.eval_strategy` says, and at its end.
        callbacks (`Sequence[TrainerCallback]`, *optional*): For the second stage.
        config: Fields of [`LoraGeneratorConfig`] with other values than [`~LoraGeneratorConfig.from_zoo`] gives them.

    Returns:
        `LoraGeneratorModel`: without encoder, saved in `args.output_dir` with its card, and pushed if asked for.

    Raises:
        ZooError: if the zoo has no LoRA of the tasks.
        TaskError, IncompatibleAdapterError, TrainingError, PublishingError: as [`BehaviouralDataset`] and
            [`LoraGeneratorTrainer`].

    Example:
        >>> tasks = [task for task in built_in_tasks() if task.name not in unseen]  # doctest: +SKIP
        >>> generator = train_generator(LoraZoo("zoo"), base, tokenizer, tasks)  # doctest: +SKIP
    """
    args = args or RecipeArguments()
    LoraGeneratorConfig(**config)  # or an error now, and not after minutes
    names = {task.name for task in tasks}
    zoo = zoo.subset([name for name in zoo if name in names])
    if not len(zoo):
        raise ZooError(f"{zoo.path} holds no LoRA of the {len(names)} tasks to train on.")
    vectors = _task_vectors(zoo, base_model, processing_class, [*tasks, *eval_tasks])
    behaviour = BehaviouralDataset(tasks, vectors, args.num_samples)
    unseen = BehaviouralDataset(eval_tasks, vectors, args.num_samples) if eval_tasks else None

    checkpoint = args.resume_from_checkpoint
    if str(checkpoint) == "True":  # also from a command line
        checkpoint = last_checkpoint(str(args.output_dir))
    if checkpoint:
        generator = LoraGeneratorModel(LoraGeneratorConfig.from_pretrained(checkpoint))  # weights come with the rest
    else:
        adapters = zoo.as_dataset(num_snapshots=1)  # earlier snapshots are other answers to the same question
        set_seed(args.seed)  # the Trainer's own call comes after the first weights are drawn
        generator = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo, **config))
        generator.fit_normalizer(adapters, behaviour)
        first = LoraGeneratorTrainer(generator, args.reconstruction(), train_dataset=adapters)
        first.train()
        first.save_state()
        generator = generator.without_encoder()  # all that reads adapters; it is half the size

    trainer = LoraGeneratorTrainer(
        generator,
        args,
        base_model=base_model,
        processing_class=processing_class,
        train_dataset=behaviour,
        eval_dataset=unseen,
        callbacks=list(callbacks or ()),
    )
    if args.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
    if unseen is not None:
        runs = cast(list[dict], generator.config.training_runs)  # of the first stage, at least
        runs[-1]["unseen_loss"] = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    return generator


def _task_vectors(zoo, base_model: PreTrainedModel, processing_class, tasks: Sequence[Task]) -> TaskVectors:
    """Return the vectors of tasks: the zoo's, and new ones made as those for the tasks that it lacks."""
    if not zoo.has_task_vectors:
        spec = TaskVectorSpec.for_base_model(base_model, template=zoo.template)
        extracted = TaskVectorExtractor(spec).extract(base_model, processing_class, tasks)
        if state().is_main_process:
            zoo.add_task_vectors(extracted)
        state().wait_for_everyone()
        return extracted
    stored = zoo.task_vectors
    missing = [task for task in tasks if task.name not in stored.banks]
    extracted = TaskVectorExtractor(stored.spec).extract(base_model, processing_class, missing)
    return dataclasses.replace(extracted, banks={**stored.banks, **extracted.banks})
