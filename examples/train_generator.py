"""Train a generator on a zoo, and then, if wanted, through the base model on the samples of many more tasks.

    python examples/train_generator.py --zoo zoo --tasks zoo/samples.jsonl --unseen capital --output_dir generator

The tasks named after `--unseen` take no part in the training: the generator is evaluated on them, so that the best
checkpoint can be kept, and training can stop when it no longer gets better:

    python examples/train_generator.py --zoo zoo --unseen capital --output_dir generator --max_steps 400 \\
        --eval_strategy steps --eval_steps 50 --save_strategy steps --save_steps 50 --load_best_model_at_end True \\
        --metric_for_best_model eval_generation_loss --early_stopping_patience 3 --report_to tensorboard

`--behaviour_steps 300` goes on through the base model, on the samples of all `--tasks` but the unseen ones. The same
call again goes on from the last checkpoints. On several devices: `accelerate launch examples/train_generator.py ...`.
All arguments can stand in one file: `python examples/train_generator.py train.yaml`, or `.json`.
"""

import copy
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME, logging

from hf_icm_lora import (
    BehaviouralCollator,
    BehaviouralDataset,
    CompletionCollator,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraGeneratorTrainingArguments,
    LoraZoo,
    Task,
    TaskVectorExtractor,
    built_in_tasks,
    fast_dtype,
    load_tasks,
)

logger = logging.get_logger("train_generator")


@dataclass
class ScriptArguments:
    zoo: str = field(metadata={"help": "Directory of a zoo with task vectors."})
    tasks: str = field(default="built-in", metadata={"help": "A JSON Lines file of tasks, or 'built-in'."})
    unseen: list[str] = field(default_factory=list, metadata={"help": "Tasks of the zoo to evaluate on."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the generator."})
    latent_size: int = field(default=32, metadata={"help": "Size of z."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations that are no better, after which training stops."}
    )
    behaviour_steps: int = field(default=0, metadata={"help": "Steps through the base model, after those on the zoo."})
    behaviour_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of these steps."})
    base_model: str | None = field(
        default=None, metadata={"help": "Path or Hub id for the steps through it; by default the zoo's."}
    )
    hub_base_model: str | None = field(
        default=None, metadata={"help": "The base model's id on the Hub, if the zoo was made from a local copy."}
    )


class CollapseCallback(TrainerCallback):
    """A callback of one's own: it says so when the latent carries nothing any more."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs.get("active_units") == 0 and state.global_step > args.kl_warmup_ratio * state.max_steps:
            logger.warning(f"Step {state.global_step}: no active unit. Lower kl_weight, or raise free_bits.")


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, LoraGeneratorTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        script_args, training_args = parser.parse_json_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        script_args, training_args = parser.parse_yaml_file(sys.argv[1])
    else:
        script_args, training_args = parser.parse_args_into_dataclasses()

    zoo = LoraZoo(script_args.zoo)
    seen = zoo.subset(name for name in zoo if name not in script_args.unseen)
    unseen = zoo.subset(script_args.unseen)
    behaviour = unseen_behaviour = None
    if script_args.behaviour_steps:
        base_model = script_args.base_model or zoo.base_model_name_or_path
        base = AutoModelForCausalLM.from_pretrained(base_model, dtype=fast_dtype()).to(training_args.device)
        tokenizer = AutoTokenizer.from_pretrained(base_model)
        tasks = built_in_tasks() if script_args.tasks == "built-in" else load_tasks(script_args.tasks)
        with training_args.main_process_first(desc="task vectors"):
            add_task_vectors(zoo, base, tokenizer, tasks)
        seen_tasks = [task for task in tasks if task.name not in script_args.unseen]
        unseen_tasks = [task for task in tasks if task.name in script_args.unseen]
        behaviour = BehaviouralDataset(seen_tasks, zoo.task_vectors)
        unseen_behaviour = BehaviouralDataset(unseen_tasks, zoo.task_vectors) if script_args.unseen else None

    # The last stage runs in output_dir, which is what `push_to_hub` uploads.
    reconstruction_args = copy.copy(training_args)
    if behaviour is not None:
        reconstruction_args.output_dir = os.path.join(training_args.output_dir, "reconstruction")
        reconstruction_args.push_to_hub = False
        if training_args.run_name:
            reconstruction_args.run_name = f"{training_args.run_name}-reconstruction"  # a run of its own for trackers
    if behaviour is not None and os.path.isfile(os.path.join(reconstruction_args.output_dir, CONFIG_NAME)):
        generator = LoraGeneratorModel.from_pretrained(reconstruction_args.output_dir)  # finished by an earlier call
    else:
        set_seed(training_args.seed)
        config = LoraGeneratorConfig.from_zoo(
            seen,
            hidden_size=script_args.hidden_size,
            latent_size=script_args.latent_size,
            base_model_name_or_path=script_args.hub_base_model or zoo.base_model_name_or_path,
        )
        generator = LoraGeneratorModel(config)
        generator.fit_normalizer(seen.as_dataset(), behaviour)
        trainer = LoraGeneratorTrainer(
            generator,
            reconstruction_args,
            train_dataset=seen.as_dataset(),
            eval_dataset=unseen.as_dataset() if len(unseen) else None,
            callbacks=callbacks(script_args),
        )
        train(trainer)
        if behaviour is not None:
            trainer.save_model()  # this stage is finished

    if behaviour is not None:
        training_args.max_steps = script_args.behaviour_steps
        training_args.learning_rate = script_args.behaviour_learning_rate
        if training_args.metric_for_best_model in ("generation_loss", "eval_generation_loss"):
            training_args.metric_for_best_model = "eval_behavioural_loss"
        collate = CompletionCollator(tokenizer, template=zoo.template, row_length=64)
        trainer = LoraGeneratorTrainer(
            generator,
            training_args,
            base_model=base,
            train_dataset=behaviour,
            eval_dataset=unseen_behaviour,
            data_collator=BehaviouralCollator(collate),
            callbacks=callbacks(script_args),
        )
        train(trainer)

    if training_args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
        trainer.create_model_card()


def callbacks(script_args: ScriptArguments) -> list[TrainerCallback]:
    """Return new callbacks for a stage of the training: they keep count of what happens in it."""
    patience = script_args.early_stopping_patience
    return [CollapseCallback(), *([EarlyStoppingCallback(patience)] if patience is not None else [])]


def train(trainer: LoraGeneratorTrainer) -> None:
    """Train from the last checkpoint, if there is one, and evaluate; figures go into `output_dir`, too."""
    output_dir = trainer.args.output_dir
    checkpoint = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def add_task_vectors(zoo: LoraZoo, base: torch.nn.Module, tokenizer, tasks: Sequence[Task]) -> None:
    """Extract the vectors that the zoo lacks, of tasks that need no LoRA, and keep them beside its own."""
    stored = zoo.task_vectors
    missing = [task for task in tasks if task.name not in stored.banks]
    if missing:
        extracted = TaskVectorExtractor(stored.spec).extract(base, tokenizer, missing)
        zoo.add_task_vectors(dataclasses.replace(stored, banks={**stored.banks, **extracted.banks}))


if __name__ == "__main__":
    main()
