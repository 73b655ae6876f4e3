"""What chance does: `python benchmarks/suite/seeds.py`, after `score.py` and, for the seeds 1 and 2 and a second zoo,

    python benchmarks/suite/train.py --seed 1 --output_dir build/suite/seed-1
    python benchmarks/suite/collect.py --every 3 --seed 1 --zoo build/suite/zoo-seed-1

Scores generated adapters on the tasks of `benchmarks/results/suite.json`, and takes the losses of base model and task
LoRAs from there. Seed 0 is the one of `score.py`, scored again as a check. `averaged` is the mean of the seeds'
adapters: they share A, so the mean of their B is an adapter, too. `task_lora` is fine-tuned again, from another seed,
for a third of the tasks. Interrupted, the same call goes on.
"""

import statistics
from dataclasses import dataclass, field

import torch
from bench import GENERATOR, Bench, kept, options_of, write
from page import report_of, seeds
from tqdm.auto import tqdm

from hf_icm_lora import (
    CompletionCollator,
    LoraGeneratorModel,
    attach_adapter,
    recovered_gain,
)
from hf_icm_lora.adapter import adapter_state_dict
from hf_icm_lora.completion import score_completions


@dataclass
class SeedOptions:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_examples: int = field(default=12, metadata={"help": "Examples of each task."})
    zoo: str = field(default="build/suite/zoo-seed-1", metadata={"help": "The second zoo."})
    output: str = field(default="benchmarks/results/seeds.json", metadata={"help": "Where the figures go."})


def summary(gains: dict[str, float]) -> dict:
    figures = {kind.__name__: kind(gains.values()) for kind in (statistics.mean, statistics.median, min)}
    return figures | {"recovered_gains": gains}


def main() -> None:
    options = options_of(SeedOptions)
    bench, scored = Bench(options.zoo), report_of("suite")
    base, tokenizer, zoo = bench.base, bench.tokenizer, bench.zoo
    folders = {str(s): f"build/suite/seed-{s}/int8" if s else GENERATOR for s in options.seeds}
    generators = {seed: LoraGeneratorModel.from_pretrained(folder) for seed, folder in folders.items()}
    first = next(iter(generators.values()))
    lora_config, collate = first.adapter_config(), CompletionCollator(tokenizer, template=first.config.template)
    report = kept(options.output, {"splits": {}})
    for split, rows in scored["splits"].items():
        done = {row: about["recovered_gains"] for row, about in report["splits"].get(split, {}).items()}
        for name in tqdm(rows["base"]["tasks"], split):
            if name in done.get("averaged", {}):
                continue
            adapters = {}
            for seed, generator in generators.items():
                examples = bench.suite[name].demo[: options.num_examples]
                model = generator.generate_adapter(
                    base, processing_class=tokenizer, examples=examples, fit_scale=False
                )
                adapters[seed] = lora_config, adapter_state_dict(model)
                base = model.unload()
            generated = [state_dict for _, state_dict in adapters.values()]
            mean = {key: torch.stack([state_dict[key] for state_dict in generated]).mean(0) for key in generated[0]}
            adapters["averaged"] = lora_config, mean
            if name in zoo:
                adapters["task_lora"] = zoo.lora_config, zoo.load_snapshot(name)
            bounds = [rows[row]["tasks"][name]["loss"] for row in ("base", "task_lora")]
            for row, adapter in adapters.items():
                model = attach_adapter(base, *adapter)
                with torch.no_grad():
                    scores = score_completions(model, collate(bench.suite[name].test))
                loss = (scores.loss.sum() / scores.num_tokens.sum()).item()
                done.setdefault(row, {})[name] = recovered_gain(bounds[0], loss, bounds[1])
                base = model.unload()
            report["splits"][split] = {row: summary(gains) for row, gains in done.items()}
            write(options.output, report)
    print(seeds(report))


if __name__ == "__main__":
    main()
