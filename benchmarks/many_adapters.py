"""Many adapters in one model: `python benchmarks/many_adapters.py` generates them, and loads the same ones from disk.

Seconds and memory per adapter on SmolLM2-135M, by turns: generated from task vectors that are known, under new names;
in place of an adapter that is there; loaded from a local folder with `PeftModel.load_adapter`. Then the seconds of a
batch in which each row has an adapter of its own, and of the same rows one by one, each with `set_adapter`.
"""

import json
import resource
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from suite.bench import load_base, load_tokenizer, options_of, seconds, write

from hf_icm_lora import LoraGeneratorModel, smollm2_generator_path


@dataclass
class ManyOptions:
    num_adapters: int = field(default=32)
    rounds: int = field(default=5, metadata={"help": "Of the batches; medians are told."})
    output: str = field(default="benchmarks/results/many_adapters.json", metadata={"help": "Where the figures go."})


def resident_megabytes() -> float:
    """Memory of this process by now; its peak would be that of loading the base model. Linux alone tells."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@torch.no_grad()
def main() -> None:
    options, tokenizer = options_of(ManyOptions), load_tokenizer()
    generator = LoraGeneratorModel.from_pretrained(smollm2_generator_path())
    shape = (generator.config.num_task_vectors, generator.config.task_vector_size)
    noise = torch.randn(options.num_adapters, *shape, generator=torch.Generator().manual_seed(0))
    normalizer = generator.zoo_normalizer
    vectors = normalizer.vector_mean + normalizer.vector_scale * noise  # as far from each other as real ones
    times: dict[str, list[float]] = {"generate": [], "generate_in_place": [], "load_adapter": []}
    with tempfile.TemporaryDirectory() as folder:
        for index, vector in enumerate(vectors):
            generator.export_adapter(Path(folder) / str(index), vector)
        base = load_base()
        model = generator.generate_adapter(base, task_vector=vectors[0], adapter_name="first")
        before = resident_megabytes()
        for index, vector in enumerate(vectors):
            name, file = f"generated-{index}", f"{folder}/{index}"
            times["generate"].append(
                seconds(lambda: generator.generate_adapter(model, task_vector=vector, adapter_name=name))  # noqa: B023
            )
            times["generate_in_place"].append(
                seconds(lambda: generator.generate_adapter(model, task_vector=vector, adapter_name="first"))  # noqa: B023
            )
            times["load_adapter"].append(seconds(lambda: model.load_adapter(file, f"loaded-{index}")))  # noqa: B023
        per_adapter = (resident_megabytes() - before) / (2 * options.num_adapters)
    names = [f"generated-{index}" for index in range(options.num_adapters)]
    inputs = tokenizer(["- Peru:"] * len(names), return_tensors="pt")
    batches: dict[str, list[float]] = {"mixed_batch": [], "one_by_one": []}

    def one_by_one() -> None:
        for index, name in enumerate(names):
            model.set_adapter(name, inference_mode=True)
            model(**{key: value[index : index + 1] for key, value in inputs.items()})

    for _ in range(options.rounds):
        batches["mixed_batch"].append(seconds(lambda: model(**inputs, adapter_names=names)))
        batches["one_by_one"].append(seconds(one_by_one))
    medians = {name: round(1000 * statistics.median(values), 2) for name, values in (times | batches).items()}
    report = {"num_adapters": options.num_adapters, "milliseconds": medians}
    write(options.output, report | {"megabytes_per_adapter": round(per_adapter, 2)})
    print(json.dumps(medians, indent=2), f"\n{per_adapter:.2f} MB per adapter")


if __name__ == "__main__":
    main()
