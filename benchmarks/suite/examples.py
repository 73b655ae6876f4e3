"""Few and wrong examples: `python benchmarks/suite/examples.py` scores adapters and prompts that are made from them.

Recovered gain against the number of examples; and of twelve examples some of which have the answer to another question
of the same task, as when someone mislabels them. Each figure is over all tasks and two disjoint draws of examples.
While settings are still being chosen, leave `--split validation` as it is.
"""

from dataclasses import dataclass, field

import torch
from bench import Bench, options_of, summary, write
from page import examples
from tqdm import tqdm

from hf_icm_lora import CompletionCollator, Sample


@dataclass
class ExamplesOptions:
    generator: str | None = field(default=None, metadata={"help": "By default what train.py made."})
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
    options = options_of(ExamplesOptions)
    bench, most = Bench(options.zoo, options.generator), max(options.num_examples)
    settings = [(n, 0) for n in options.num_examples] + [(most, wrong) for wrong in options.num_wrong]
    no_adapter = torch.zeros(bench.zoo.layout.num_weights)
    gains: dict[tuple[int, int], dict[str, dict[str, list[float]]]] = {
        setting: {"generated": {}, "few_shot_prompt": {}} for setting in settings
    }
    for name in tqdm(bench.names(options.split)):
        task = bench.suite[name]
        for given, others in ((task.demo[:most], task.demo[-most:]), (task.demo[-most:], task.demo[:most])):
            for num_examples, num_wrong in settings:
                shown = mislabelled(given, num_wrong, others) if num_wrong else given[:num_examples]
                generated = bench.generator.decode_task_vector(bench.vector(shown))
                # Samples with so much before them share no rows.
                collate = CompletionCollator(bench.tokenizer, False, bench.zoo.template, shown, max_length=1024)
                own = {
                    "generated": bench.gain(generated, name),
                    "few_shot_prompt": bench.gain(no_adapter, name, collate(task.test)),
                }
                for row, gain in own.items():
                    gains[num_examples, num_wrong][row].setdefault(name, []).append(gain)
    report = {
        "split": options.split,
        "settings": [
            {
                "num_examples": num_examples,
                "num_wrong": num_wrong,
                **{
                    row: {**summary((gain for task in tasks.values() for gain in task), "mean", "min"), "tasks": tasks}
                    for row, tasks in rows.items()
                },
            }
            for (num_examples, num_wrong), rows in gains.items()
        ],
    }
    write(options.output, report)
    print(examples(report))


if __name__ == "__main__":
    main()
