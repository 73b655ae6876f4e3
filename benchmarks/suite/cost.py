"""What a query costs: `python benchmarks/suite/cost.py` compares 12 examples in the prompt with a generated adapter.

Reads the prompt of one query up to its first answer token, one query at a time, on some tasks of the suite. Medians
over all queries; the rows are timed in turns, query by query, so that a busy machine slows all of them alike.
"""

import copy
import statistics
import time
from dataclasses import dataclass, field

import torch
from bench import SPLITS, Bench, options_of, write
from page import cost

from hf_icm_lora.completion import encode_prompt, render


@dataclass
class CostOptions:
    num_examples: int = field(default=12, metadata={"help": "Examples in the prompt, and for the adapter."})
    num_queries: int = field(default=10, metadata={"help": "Queries per task."})
    output: str = field(default="benchmarks/results/cost.json", metadata={"help": "Where the figures go."})


def main() -> None:
    options, bench = options_of(CostOptions), Bench()
    base, tokenizer, generator = bench.base, bench.tokenizer, bench.generator
    template = generator.config.template
    rows: dict[str, dict[str, list[float]]] = {
        row: {"tokens": [], "milliseconds": []} for row in ("few_shot_prompt", "adapter", "merged_adapter")
    }
    making: dict[bool, list[float]] = {False: [], True: []}  # with the choice of a scale
    for name in SPLITS["validation"]:
        task = bench.suite[name]
        examples = task.demo[: options.num_examples]
        queries = task.test[: options.num_queries]
        given = {"processing_class": tokenizer, "examples": examples}
        for fit_scale, seconds in making.items():
            start = time.perf_counter()
            model = generator.generate_adapter(base, **given, fit_scale=fit_scale)
            seconds.append(time.perf_counter() - start)
            base = model.unload()
        model = generator.generate_adapter(base, **given)
        merged = copy.deepcopy(model).merge_and_unload()  # unmerging in bf16 would not give the base back exactly
        for query in queries:
            prompt, _ = render(query, template, tokenizer)
            with_examples, _ = render(query, template, tokenizer, examples)
            with model.disable_adapter():
                _read(model, tokenizer, with_examples, rows["few_shot_prompt"])
            _read(model, tokenizer, prompt, rows["adapter"])
            _read(merged, tokenizer, prompt, rows["merged_adapter"])
        base = model.unload()
    report = {
        "num_queries": len(rows["adapter"]["tokens"]),
        "rows": {
            row: {kind: statistics.median(values) for kind, values in data.items()} for row, data in rows.items()
        },
        "seconds_to_make_the_adapter": statistics.median(making[True]),
        "seconds_at_full_strength": statistics.median(making[False]),
    }
    saved = (report["rows"]["few_shot_prompt"]["milliseconds"] - report["rows"]["adapter"]["milliseconds"]) / 1000
    report["queries_to_break_even"] = report["seconds_to_make_the_adapter"] / saved
    write(options.output, report)
    print(cost(report))
    print({key: value for key, value in report.items() if key.startswith(("seconds", "queries"))})


@torch.no_grad()
def _read(model, tokenizer, prompt: str, row: dict[str, list[float]]) -> None:
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    start = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1)
    row["milliseconds"].append(1000 * (time.perf_counter() - start))
    row["tokens"].append(ids.numel())


if __name__ == "__main__":
    main()
