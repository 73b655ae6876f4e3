"""The shipped recipe from other seeds: `python benchmarks/suite/seeds.py`, after `score.py` and, for seeds 1 and 2,

    python benchmarks/suite/train.py --seed 1 --output_dir build/suite/seed-1

Scores generated adapters on the tasks of `benchmarks/results/suite.json`, and takes the losses of base model and task
LoRAs from there. Seed 0 is the shipped generator, scored again as a check. Interrupted, the same call goes on.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from page import report_of, seeds
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import (
    CompletionCollator,
    LoraGeneratorModel,
    built_in_tasks,
    fast_dtype,
    recovered_gain,
    smollm2_generator_path,
    smollm2_path,
)
from hf_icm_lora.completion import score_completions
from hf_icm_lora.files import write_json
from hf_icm_lora.model_card import run_metadata


@dataclass
class SeedOptions:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_examples: int = field(default=12, metadata={"help": "Examples of each task."})
    output: str = field(default="benchmarks/results/seeds.json", metadata={"help": "Where the figures go."})


def main() -> None:
    (options,) = HfArgumentParser(SeedOptions).parse_args_into_dataclasses()
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype()).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    suite, scored, output = {task.name: task for task in built_in_tasks()}, report_of("suite"), Path(options.output)
    runs = json.loads(output.read_text(encoding="utf-8"))["seeds"] if output.exists() else {}
    for seed in options.seeds:
        if str(seed) in runs:
            continue
        folder = Path(f"build/suite/seed-{seed}/int8") if seed else smollm2_generator_path()
        generator, splits = LoraGeneratorModel.from_pretrained(folder), {}
        collate = CompletionCollator(tokenizer, template=generator.config.template)
        for split, rows in scored["splits"].items():
            gains = {}
            for name in tqdm(rows["base"]["tasks"], f"seed {seed}, {split}"):
                examples = suite[name].demo[: options.num_examples]
                model = generator.generate_adapter(base, processing_class=tokenizer, examples=examples)
                with torch.no_grad():
                    scores = score_completions(model, collate(suite[name].test))
                loss = (scores.loss.sum() / scores.num_tokens.sum()).item()
                bounds = [rows[row]["tasks"][name]["loss"] for row in ("base", "task_lora")]
                gains[name] = recovered_gain(bounds[0], loss, bounds[1])
                base = model.unload()
            splits[split] = {
                **{kind.__name__: kind(gains.values()) for kind in (statistics.mean, statistics.median, min)},
                "recovered_gains": gains,
            }
        runs[str(seed)] = splits
        write_json(output, run_metadata(seed) | {"seeds": runs})
    print(seeds({"seeds": runs}))


if __name__ == "__main__":
    main()
