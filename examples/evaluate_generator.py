"""Score a generator, and others beside it, against every plain rival.

    python examples/evaluate_generator.py --generator generator --zoo zoo --tasks zoo/samples.jsonl

The tasks that the generator was not trained on are the ones that count. Each needs a LoRA in the zoo, as the oracle.
`--compare_with` takes more generators that were trained on this zoo, with other settings for instance, and scores
them on the same examples. All arguments can stand in one file: `python examples/evaluate_generator.py evaluate.yaml`,
or `.json`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import (
    LoraGeneratorModel,
    LoraZoo,
    add_evaluation,
    built_in_tasks,
    evaluate_generator,
    fast_dtype,
    format_report,
    generator_card,
    load_tasks,
)


@dataclass
class ScriptArguments:
    generator: str = field(metadata={"help": "Path or Hub id of the generator."})
    zoo: str = field(metadata={"help": "Directory of the zoo that it was trained on."})
    output_dir: str = field(default="evaluation", metadata={"help": "Where evaluation.json and .md go."})
    tasks: str = field(default="built-in", metadata={"help": "A JSON Lines file of tasks, or 'built-in'."})
    names: list[str] | None = field(default=None, metadata={"help": "Score only these tasks of the zoo."})
    compare_with: list[str] = field(default_factory=list, metadata={"help": "More generators of this zoo."})
    num_examples: int = field(default=12, metadata={"help": "Examples per task that everyone is given."})
    more_rows: list[str] = field(
        default_factory=list, metadata={"help": "Such as description, scaled, refined, fine_tuned."}
    )
    base_model: str | None = field(default=None, metadata={"help": "Path or Hub id; by default the zoo's."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the generator with the table in its card."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to; by default the generator's name."})


def main() -> None:
    parser = HfArgumentParser(ScriptArguments)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        (script_args,) = parser.parse_json_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        (script_args,) = parser.parse_yaml_file(sys.argv[1])
    else:
        (script_args,) = parser.parse_args_into_dataclasses()

    zoo = LoraZoo(script_args.zoo)
    tasks = built_in_tasks() if script_args.tasks == "built-in" else load_tasks(script_args.tasks)
    wanted = set(zoo) if script_args.names is None else set(script_args.names)
    generator = LoraGeneratorModel.from_pretrained(script_args.generator)
    others = {Path(name).name: LoraGeneratorModel.from_pretrained(name) for name in script_args.compare_with}

    base_model = script_args.base_model or zoo.base_model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=fast_dtype())
    if torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())

    report = evaluate_generator(
        generator,
        base,
        AutoTokenizer.from_pretrained(base_model),
        zoo,
        [task for task in tasks if task.name in wanted],
        num_examples=script_args.num_examples,
        more_rows=script_args.more_rows,
        other_generators=others,
        output_dir=script_args.output_dir,
    )
    if not PartialState().is_main_process:  # of several that shared the tasks, under `accelerate launch`
        return
    print(format_report(report))

    if script_args.push_to_hub:
        repo_id = script_args.hub_model_id or Path(script_args.generator).name
        card = add_evaluation(generator_card(generator, repo_id=repo_id), report)
        print(generator.push_to_hub(repo_id, card=card))


if __name__ == "__main__":
    main()
