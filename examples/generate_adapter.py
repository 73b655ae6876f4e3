"""Write the LoRA adapter of a new task from examples, a description, or both, and see what it is worth.

    python examples/generate_adapter.py --examples examples.jsonl --description "Name the capital."

The examples are a local file or an id on the Hub, anything that `datasets.load_dataset` reads, with the columns
`prompt` and `completion`. The last `--num_held_out` of them are kept back, to compare the base model with and without
the adapter. All arguments can stand in one file: `python examples/generate_adapter.py generate.yaml`, or `.json`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import (
    CompletionCollator,
    LoraGeneratorModel,
    Sample,
    fast_dtype,
    push_adapter,
    save_adapter_card,
    smollm2_generator_path,
    smollm2_path,
)


@dataclass
class ScriptArguments:
    output_dir: str = field(default="adapter", metadata={"help": "Where the adapter goes."})
    examples: str | None = field(
        default=None, metadata={"help": "A file (.json, .jsonl, .csv, .parquet) or an id on the Hub."}
    )
    examples_split: str = field(default="train", metadata={"help": "The split of it that holds them."})
    description: str | None = field(default=None, metadata={"help": "The task in a sentence."})
    num_held_out: int = field(default=8, metadata={"help": "Examples to judge the adapter by, which it never sees."})
    generator: str | None = field(default=None, metadata={"help": "Path or Hub id; by default the shipped one."})
    base_model: str | None = field(
        default=None, metadata={"help": "Path or Hub id; by default the generator's, or the packaged SmolLM2-135M."}
    )
    on_unfamiliar: Literal["generate", "base", "raise"] = field(
        default="generate", metadata={"help": "What to do where the adapter does harm on its own examples."}
    )
    fit_scale: bool = field(default=True, metadata={"help": "Whether to weaken it to what suits the examples."})
    refine_steps: int = field(default=0, metadata={"help": "Gradient steps on the examples after that."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the adapter as well."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to; by default the name of output_dir."})


def main() -> None:
    parser = HfArgumentParser(ScriptArguments)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        (script_args,) = parser.parse_json_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        (script_args,) = parser.parse_yaml_file(sys.argv[1])
    else:
        (script_args,) = parser.parse_args_into_dataclasses()

    generator = LoraGeneratorModel.from_pretrained(script_args.generator or smollm2_generator_path())
    of_generator = generator.config.base_model_name_or_path if script_args.generator else smollm2_path()
    base_model = script_args.base_model or of_generator
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=fast_dtype())
    if torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())
    tokenizer = AutoTokenizer.from_pretrained(base_model)

    samples = load_examples(script_args.examples, script_args.examples_split) if script_args.examples else []
    count = max(len(samples) - script_args.num_held_out, 0)
    examples, held_out = samples[:count], samples[count:]

    collate = CompletionCollator(tokenizer, template=generator.config.template)
    before = loss(base, collate, held_out)
    model = generator.generate_adapter(
        base,
        processing_class=tokenizer,
        examples=examples,
        description=script_args.description,
        fit_scale=script_args.fit_scale,
        refine_steps=script_args.refine_steps,
        on_unfamiliar=script_args.on_unfamiliar,
    )
    known = model.lora_generation["default"]  # what is known of it
    if known.gain_on_examples is not None:  # a description alone does not tell
        print(f"scale: {known.scale}\ngain_on_examples: {known.gain_on_examples:.3f}")
    if held_out:
        after = loss(model, collate, held_out)
        print(f"loss per token on {len(held_out)} other examples: {before:.3f} -> {after:.3f}")

    model.save_pretrained(script_args.output_dir)
    save_adapter_card(model, script_args.output_dir)  # in place of PEFT's: how it was made
    print(script_args.output_dir)
    if script_args.push_to_hub:
        print(push_adapter(model, script_args.hub_model_id or Path(script_args.output_dir).name))


def load_examples(dataset: str, split: str) -> list[Sample]:
    """Load a file by its extension, or a dataset from the Hub."""
    if Path(dataset).is_file():
        extension = Path(dataset).suffix[1:]
        rows = load_dataset("json" if extension == "jsonl" else extension, data_files=dataset, split="train")
    else:
        rows = load_dataset(dataset, split=split)
    return [Sample(row["prompt"], row["completion"]) for row in rows]


@torch.no_grad()
def loss(model: torch.nn.Module, collate: CompletionCollator, samples: list[Sample]) -> float:
    """Return the loss per completion token, in nats."""
    if not samples:
        return float("nan")
    batch = {name: tensor.to(model.device) for name, tensor in collate(samples).items()}
    return model(**batch).loss.item()


if __name__ == "__main__":
    main()
