"""Train a generator: on the LoRAs of a zoo, and then through the base model on the samples of many more tasks.

    python examples/train_generator.py --zoo zoo --tasks zoo/samples.jsonl --unseen capital --output_dir generator

All `--tasks` are trained on, with a LoRA in the zoo or without, but those named after `--unseen`: the generator is
evaluated on them, so that the best checkpoint can be kept, and training can stop when it no longer gets better:

    python examples/train_generator.py --zoo zoo --tasks zoo/samples.jsonl --unseen capital --output_dir generator \\
        --max_steps 800 --eval_strategy steps --eval_steps 100 --save_steps 100 --load_best_model_at_end True \\
        --metric_for_best_model eval_behavioural_loss --early_stopping_patience 3 --report_to tensorboard

The same call again goes on from the last checkpoint. On several devices: `accelerate launch
examples/train_generator.py ...`. All arguments can stand in one file: `python examples/train_generator.py train.yaml`,
or `.json`.
"""

import os
import sys
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from hf_icm_lora import LoraZoo, RecipeArguments, built_in_tasks, fast_dtype, load_tasks, train_generator


@dataclass
class ScriptArguments:
    zoo: str = field(metadata={"help": "Directory of a zoo."})
    tasks: str = field(default="built-in", metadata={"help": "A JSON Lines file of tasks, or 'built-in'."})
    unseen: list[str] = field(default_factory=list, metadata={"help": "Tasks to evaluate on, instead of training."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the generator."})
    latent_size: int = field(default=32, metadata={"help": "Size of z."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations that are no better, after which training stops."}
    )
    base_model: str | None = field(default=None, metadata={"help": "Path or Hub id; by default the zoo's."})
    hub_base_model: str | None = field(
        default=None, metadata={"help": "The base model's id on the Hub, if the zoo was made from a local copy."}
    )


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, RecipeArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        script_args, recipe_args = parser.parse_json_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        script_args, recipe_args = parser.parse_yaml_file(sys.argv[1])
    else:
        script_args, recipe_args = parser.parse_args_into_dataclasses()
    if os.path.isdir(recipe_args.output_dir) and get_last_checkpoint(recipe_args.output_dir):
        recipe_args.resume_from_checkpoint = "True"  # the last one that is whole

    zoo = LoraZoo(script_args.zoo)
    base_model = script_args.base_model or zoo.base_model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=fast_dtype()).to(recipe_args.device)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tasks = built_in_tasks() if script_args.tasks == "built-in" else load_tasks(script_args.tasks)
    patience = script_args.early_stopping_patience
    train_generator(
        zoo,
        base,
        tokenizer,
        [task for task in tasks if task.name not in script_args.unseen],
        recipe_args,
        eval_tasks=[task for task in tasks if task.name in script_args.unseen],
        callbacks=[EarlyStoppingCallback(patience)] if patience is not None else [],
        hidden_size=script_args.hidden_size,
        latent_size=script_args.latent_size,
        base_model_name_or_path=script_args.hub_base_model or zoo.base_model_name_or_path,
    )


if __name__ == "__main__":
    main()
