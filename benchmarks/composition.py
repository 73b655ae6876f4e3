"""What lies between two tasks? `python benchmarks/composition.py` asks the shipped generator, after suite/collect.py.

    condition   the adapter of a mixture of two task vectors, (1 - t) * one + t * other
    weights     the same mixture of the two adapters: with one A for both, exactly the mixture of their B @ A
    analogy     the adapter of `a + b - c`, such as plus_ten_english + double_spanish - double_english, scored on
                plus_ten_spanish, none of whose examples were given

Figures are recovered gain on the tasks themselves, with their own LoRAs as the oracle. All tasks are seen ones.
"""

import statistics
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import (
    CompletionCollator,
    LoraGeneratorModel,
    LoraZoo,
    TaskVectorExtractor,
    TaskVectorSpec,
    built_in_tasks,
    fast_dtype,
    recovered_gain,
    smollm2_generator_path,
    smollm2_path,
)
from hf_icm_lora.behaviour import behavioural_loss
from hf_icm_lora.files import write_json
from hf_icm_lora.model_card import run_metadata

sys.path.insert(0, str(Path(__file__).parent / "suite"))
from collect import with_lora  # noqa: E402
from page import composition  # noqa: E402

STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANALOGIES = {  # target: (a, b, c) of a + b - c
    "plus_ten_spanish": ("plus_ten_english", "double_spanish", "double_english"),
    "plus_ten_english": ("plus_ten_spanish", "half_english", "half_spanish"),
    "double_roman": ("double_english", "half_roman", "half_english"),
    "double_binary": ("double_english", "next_binary", "next_english"),
    "half_english": ("half_spanish", "double_english", "double_spanish"),
}


@dataclass
class CompositionOptions:
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py, for the oracles."})
    num_pairs: int = field(default=8, metadata={"help": "Pairs of one family, and as many of two families."})
    output: str = field(default="benchmarks/results/composition.json", metadata={"help": "Where the figures go."})


def pairs_of(names: list[str], count: int) -> dict[str, list[tuple[str, str]]]:
    """Return pairs of neighbours within families, and pairs across families, in the order of the suite."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.split("/")[0], []).append(name)
    within = [(members[0], members[1]) for members in families.values() if len(members) > 1]
    firsts = [members[0] for members in families.values()]
    across = list(zip(firsts, firsts[len(firsts) // 2 :] + firsts[: len(firsts) // 2], strict=True))
    return {"one family": within[:count], "two families": across[:count]}


@torch.no_grad()
def main() -> None:
    (options,) = HfArgumentParser(CompositionOptions).parse_args_into_dataclasses()
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype()).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    generator = LoraGeneratorModel.from_pretrained(smollm2_generator_path())
    extractor = TaskVectorExtractor(TaskVectorSpec(**generator.config.task_vector_spec))
    suite, zoo = {task.name: task for task in built_in_tasks()}, LoraZoo(options.zoo)
    collate = CompletionCollator(tokenizer, template=zoo.template, row_length=64)

    @cache
    def vector(name: str) -> torch.Tensor:
        return extractor.vector(base, tokenizer, suite[name].demo[:12])

    def loss(lora_weights: torch.Tensor, name: str) -> float:
        batch = collate(suite[name].test)
        return behavioural_loss(base, zoo.layout, lora_weights[None], zoo.shared_weights, batch).item()

    @cache
    def bounds(name: str) -> tuple[float, float]:
        return loss(torch.zeros(zoo.layout.num_weights), name), loss(zoo.lora_weights(name), name)

    def gain(lora_weights: torch.Tensor, name: str) -> float:
        base_loss, oracle = bounds(name)
        return recovered_gain(base_loss, loss(lora_weights, name), oracle) or 0.0

    report: dict = {"mixtures": {}, "analogies": {}}
    for kind, pairs in pairs_of([name for name in with_lora("seen") if name in zoo], options.num_pairs).items():
        curves: dict[str, list[list[float]]] = {"condition": [], "weights": []}  # pair -> gain on the other task
        for one, other in tqdm(pairs, desc=kind):
            ends = [generator.decode_task_vector(vector(name)) for name in (one, other)]
            for space, curve in curves.items():
                mixed = [
                    generator.decode_task_vector((1 - t) * vector(one) + t * vector(other))
                    if space == "condition" else (1 - t) * ends[0] + t * ends[1]
                    for t in STEPS
                ]  # fmt: skip
                curve += [[gain(weights, other) for weights in mixed], [gain(w, one) for w in reversed(mixed)]]
        report["mixtures"][kind] = {
            space: {str(t): statistics.mean(values) for t, values in zip(STEPS, zip(*curve, strict=True), strict=True)}
            for space, curve in curves.items()
        }
    scored = {target: parts for target, parts in ANALOGIES.items() if f"number_steps/{target}" in zoo}
    for target, parts in tqdm(scored.items(), desc="analogies"):
        a, b, c = (vector(f"number_steps/{name}") for name in parts)
        name = f"number_steps/{target}"
        report["analogies"][target] = {
            "own_examples": gain(generator.decode_task_vector(vector(name)), name),
            "a": gain(generator.decode_task_vector(a), name),
            "b": gain(generator.decode_task_vector(b), name),
            "a_plus_b_minus_c": gain(generator.decode_task_vector(a + b - c), name),
            "parts": list(parts),
        }
    write_json(options.output, {**run_metadata(0), **report})
    print(composition(report))


if __name__ == "__main__":
    main()
