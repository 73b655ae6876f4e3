"""Few and wrong examples: `python benchmarks/suite/examples.py` scores adapters and prompts that are made from them.

Recovered gain against the number of examples; and of twelve examples some of which have the answer to another question
of the same task, as when someone mislabels them. Each figure is over all tasks and two disjoint draws of examples.
While settings are still being chosen, leave `--split validation` as it is.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from collect import with_lora
from page import examples
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import (
    CompletionCollator,
    LoraGeneratorModel,
    LoraZoo,
    Sample,
    TaskVectorExtractor,
    TaskVectorSpec,
    built_in_tasks,
    fast_dtype,
    recovered_gain,
    smollm2_generator_path,
    smollm2_path,
)
from hf_icm_lora.behaviour import behavioural_loss
from hf_icm_lora.completion import fill_template
from hf_icm_lora.files import write_json
from hf_icm_lora.model_card import run_metadata


@dataclass
class ExamplesOptions:
    generator: str | None = field(default=None, metadata={"help": "By default the shipped one."})
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py, for the oracles."})
    split: str = field(default="validation", metadata={"help": "Of splits.json."})
    num_examples: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 12], metadata={"help": "All of them right."})
    num_wrong: list[int] = field(default_factory=lambda: [1, 3, 6], metadata={"help": "Of the largest number."})
    output: str = field(default="benchmarks/results/examples.json", metadata={"help": "Where the figures go."})


def mislabelled(samples: list[Sample], num_wrong: int, others: list[Sample]) -> list[Sample]:
    """Return samples of which some, spread over all, have the answers of other samples of the task."""
    wrong = {len(samples) * index // num_wrong for index in range(num_wrong)}
    pairs = zip(samples, others, strict=True)
    return [Sample(s.prompt, o.completion) if index in wrong else s for index, (s, o) in enumerate(pairs)]


@torch.no_grad()
def main() -> None:
    (options,) = HfArgumentParser(ExamplesOptions).parse_args_into_dataclasses()
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype()).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    suite = {task.name: task for task in built_in_tasks()}
    generator = LoraGeneratorModel.from_pretrained(options.generator or smollm2_generator_path())
    zoo, most = LoraZoo(options.zoo), max(options.num_examples)
    extractor = TaskVectorExtractor(TaskVectorSpec(**generator.config.task_vector_spec))
    settings = [(n, 0) for n in options.num_examples] + [(most, wrong) for wrong in options.num_wrong]
    no_adapter = torch.zeros(zoo.layout.num_weights)
    gains: dict[tuple[int, int], dict[str, dict[str, list[float]]]] = {
        setting: {"generated": {}, "few_shot_prompt": {}} for setting in settings
    }
    names = [name for name in with_lora(options.split) if name in zoo]
    progress = tqdm(total=2 * len(names) * len(settings), desc="Settings")
    for name in names:
        task = suite[name]

        def loss(lora_weights: torch.Tensor, context: str = "", task=task) -> float:
            # Short samples share rows, long ones do not.
            length = None if context else 64
            collate = CompletionCollator(tokenizer, False, zoo.template, context, 1024, row_length=length)
            batch = collate(task.test)
            return behavioural_loss(base, zoo.layout, lora_weights[None], zoo.shared_weights, batch).item()

        base_loss, task_lora_loss = loss(no_adapter), loss(zoo.lora_weights(name))
        for given, others in ((task.demo[:most], task.demo[-most:]), (task.demo[-most:], task.demo[:most])):
            for num_examples, num_wrong in settings:
                shown = mislabelled(given, num_wrong, others) if num_wrong else given[:num_examples]
                generated = generator.decode_task_vector(extractor.vector(base, tokenizer, shown))
                context = "".join("".join(fill_template(sample, zoo.template)) for sample in shown)
                losses = {"generated": loss(generated), "few_shot_prompt": loss(no_adapter, context)}
                for row, own in losses.items():
                    gain = recovered_gain(base_loss, own, task_lora_loss)
                    gains[num_examples, num_wrong][row].setdefault(name, []).append(gain)
                progress.update()
    progress.close()
    report = {
        **run_metadata(0),
        "split": options.split,
        "settings": [
            {
                "num_examples": num_examples,
                "num_wrong": num_wrong,
                **{
                    row: {
                        "mean_recovered_gain": statistics.mean(gain for task in tasks.values() for gain in task),
                        "min_recovered_gain": min(gain for task in tasks.values() for gain in task),
                        "tasks": tasks,
                    }
                    for row, tasks in rows.items()
                },
            }
            for (num_examples, num_wrong), rows in gains.items()
        ],
    }
    write_json(Path(options.output), report)
    print(examples(report))


if __name__ == "__main__":
    main()
