"""What it takes to keep the seen adapters: `python benchmarks/suite/storage.py`, after `collect.py`.

Bytes and recovered gain on seen tasks of a generator in fp32, bf16 and 8 bits, against the ways to store the adapters
themselves: fp16, the difference from their mean adapter in 1, 2 or 4 bits, and a joint singular value decomposition.
All of them keep the A that the adapters share, and all but fp16 the mean adapter, both in fp16.
"""

from dataclasses import dataclass, field

import torch
from bench import SPLITS, Bench, options_of, summary, write
from page import storage

from hf_icm_lora import LoraGeneratorModel

# Steps of the best uniform quantizer of a normal variable of unit variance (Max 1960, table II): bits -> step.
STEPS = {1: 1.596, 2: 0.9957, 4: 0.3352}


@dataclass
class StorageOptions:
    generator: str | None = field(default=None, metadata={"help": "By default what train.py made."})
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py."})
    num_tasks: int = field(default=24, metadata={"help": "Seen tasks to score, an even choice; all are stored."})
    output: str = field(default="benchmarks/results/storage.json", metadata={"help": "Where the figures go."})


def quantize(deltas: torch.Tensor, sizes: list[int], bits: int) -> torch.Tensor:
    """Round deltas `(tasks, num_weights)` to `bits` with one scale per task and matrix."""
    parts = []
    for part in deltas.split(sizes, dim=1):
        step = STEPS[bits] * part.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        half = 2 ** (bits - 1)
        parts.append(((part / step).floor().clamp(-half, half - 1) + 0.5) * step)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def main() -> None:
    options = options_of(StorageOptions)
    bench = Bench(options.zoo, options.generator)
    zoo, generator = bench.zoo, bench.generator.to_float()
    names = [name for name in SPLITS["seen"] if name in zoo]
    weights = torch.stack([zoo.lora_weights(name) for name in names])  # (tasks, num_weights)
    scored = list(range(0, len(names), max(1, len(names) // options.num_tasks)))
    mean, sizes = weights.mean(0), generator.zoo_normalizer.sizes
    deltas = weights - mean
    shared = 2 * zoo.layout.num_shared_weights
    common = shared + 2 * zoo.layout.num_weights

    kept: dict[str, tuple[int, torch.Tensor]] = {
        "fp16 adapters": (shared + 2 * weights.numel(), weights.half().float())
    }
    for bits in STEPS:
        size = common + bits * weights.numel() // 8 + 2 * len(names) * len(sizes)
        kept[f"{bits}-bit differences"] = (size, mean + quantize(deltas, sizes, bits))
    left, values, right = torch.linalg.svd(deltas, full_matrices=False)
    for parts in (8, 4, 2):
        rank = max(1, len(names) // parts)
        size = common + 2 * rank * (zoo.layout.num_weights + len(names))
        kept[f"joint SVD, {rank} components"] = (size, mean + (left[:, :rank] * values[:rank]) @ right[:rank])

    vectors = {i: bench.vector(bench.suite[names[i]].demo[:12]) for i in scored}
    for label, model in (
        ("generator, fp32", generator),
        ("generator, bf16", LoraGeneratorModel.from_pretrained(bench.generator_path)),
        ("generator, 8 bits", generator.to_int8()),
    ):
        if "bf16" in label:
            model = model.to_float().to(torch.bfloat16)
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        generated = weights.clone()
        for i in scored:
            generated[i] = model.decode_task_vector(vectors[i])
        kept[label] = (size, generated)

    def adapters(name: str) -> dict[str, torch.Tensor]:
        return {label: tensor[names.index(name)] for label, (_, tensor) in kept.items()}

    gains = bench.gains([names[i] for i in scored], adapters, "Scoring")
    table = {
        label: {
            "bytes": size,
            "bytes_per_task": size / len(names),
            **summary(gains[label].values(), "mean", "min"),
            "tasks": gains[label],
        }
        for label, (size, _) in kept.items()
    }
    size = table["generator, 8 bits"]["bytes"]
    rates = {"fp16": 16} | {f"{bits} bits": bits for bits in STEPS}
    break_even = {
        label: max(0, -(-8 * (size - (shared if label == "fp16" else common)) // (rate * zoo.layout.num_weights)))
        for label, rate in rates.items()
    }
    report = {"num_tasks": len(names), "num_scored": len(scored), "rows": table, "break_even_tasks": break_even}
    write(options.output, report)
    print(storage(report))
    print(f"The 8-bit generator is smaller from this number of adapters on: {break_even}")


if __name__ == "__main__":
    main()
