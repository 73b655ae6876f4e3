"""What lies between two tasks? `python benchmarks/composition.py` asks the shipped generator, after suite/collect.py.

    condition   the adapter of a mixture of two task vectors, (1 - t) * one + t * other
    weights     the same mixture of the two adapters: with one A for both, exactly the mixture of their B @ A
    analogy     the adapter of `a + b - c`, such as plus_ten_english + double_spanish - double_english, scored on
                plus_ten_spanish, none of whose examples were given

Figures are recovered gain on the tasks themselves, with their own LoRAs as the oracle. All tasks are seen ones.
"""

import statistics
from dataclasses import dataclass, field
from functools import cache

import torch
from suite.bench import Bench, options_of, write
from suite.page import composition
from tqdm import tqdm

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
    options = options_of(CompositionOptions)
    bench = Bench(options.zoo)

    @cache
    def vector(name: str) -> torch.Tensor:
        return bench.vector(bench.suite[name].demo[:12])

    def gain(lora_weights: torch.Tensor, name: str) -> float:
        return bench.gain(lora_weights, name) or 0.0

    report: dict = {"mixtures": {}, "analogies": {}}
    for kind, pairs in pairs_of(bench.names("seen"), options.num_pairs).items():
        curves: dict[str, list[list[float]]] = {"condition": [], "weights": []}  # pair -> gain on the other task
        for one, other in tqdm(pairs, desc=kind):
            ends = [bench.generator.decode_task_vector(vector(name)) for name in (one, other)]
            for space, curve in curves.items():
                mixed = [
                    bench.generator.decode_task_vector((1 - t) * vector(one) + t * vector(other))
                    if space == "condition" else (1 - t) * ends[0] + t * ends[1]
                    for t in STEPS
                ]  # fmt: skip
                curve += [[gain(weights, other) for weights in mixed], [gain(w, one) for w in reversed(mixed)]]
        report["mixtures"][kind] = {
            space: {str(t): statistics.mean(values) for t, values in zip(STEPS, zip(*curve, strict=True), strict=True)}
            for space, curve in curves.items()
        }
    scored = {target: parts for target, parts in ANALOGIES.items() if f"number_steps/{target}" in bench.zoo}
    for target, parts in tqdm(scored.items(), desc="analogies"):
        a, b, c = (vector(f"number_steps/{name}") for name in parts)
        name = f"number_steps/{target}"
        report["analogies"][target] = {
            "own_examples": gain(bench.generator.decode_task_vector(vector(name)), name),
            "a": gain(bench.generator.decode_task_vector(a), name),
            "b": gain(bench.generator.decode_task_vector(b), name),
            "a_plus_b_minus_c": gain(bench.generator.decode_task_vector(a + b - c), name),
            "parts": list(parts),
        }
    write(options.output, report)
    print(composition(report))


if __name__ == "__main__":
    main()
