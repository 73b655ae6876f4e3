"""Does the gauge matter? `python benchmarks/gauge.py` trains generators on one set of LoRAs in several coordinates.

LoRAs of the same tasks, A and B both trained: once all from one seed, and once each from a seed of its own, as
adapters of different origin are. A generator is trained on those of the seen tasks by reconstruction alone, and scored
on seen and unseen tasks by mean recovered gain, with the zoo's own LoRAs as the oracle:

    one seed             A and B as they are
    mixed, raw           A and B as they are
    mixed, balanced      in the form of a singular value decomposition
    mixed, canonical     that, rotated towards the mean of all of them, as `import_adapters` does
    mixed, products      the same, with the error of B @ A as the loss: what is done by default
    mixed, raw products  that loss on raw factors

Collecting is resumable, and so are the runs, which are kept in the output.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from hf_icm_lora import (
    CollectionArguments,
    CompletionCollator,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraGeneratorTrainingArguments,
    LoraLayout,
    LoraZoo,
    TaskVectorExtractor,
    TaskVectorSpec,
    built_in_tasks,
    collect_zoo,
    fast_dtype,
    recovered_gain,
    smollm2_path,
)
from hf_icm_lora.behaviour import behavioural_loss
from hf_icm_lora.files import write_json
from hf_icm_lora.model_card import run_metadata

sys.path.insert(0, str(Path(__file__).parent / "suite"))
from collect import SPLITS, with_lora  # noqa: E402
from page import gauge  # noqa: E402

WORK = Path("build/gauge")
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "basis_size": 32}


@dataclass
class GaugeOptions:
    num_seen: int = field(default=16, metadata={"help": "Tasks to train on."})
    num_unseen: int = field(default=8, metadata={"help": "Validation tasks to score."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = field(default=100, metadata={"help": "Of reconstruction."})
    output: str = field(default="benchmarks/results/gauge.json", metadata={"help": "Where the figures go."})


def collect(path: Path, base, tokenizer, tasks, seed: int) -> LoraZoo:
    arguments = CollectionArguments(
        str(WORK / "collection"), max_steps=48, eval_steps=12, per_device_train_batch_size=8, num_snapshots=1,
        seed=seed, freeze_a=False, learning_rate=5e-3,
    )  # fmt: skip
    return collect_zoo(path, base, tokenizer, tasks, LORA, arguments)


def make_zoos(base, tokenizer, tasks) -> dict[str, LoraZoo]:
    """Collect all LoRAs, and put those of mixed seeds into zoos of three kinds."""
    zoos, folders = {"one seed": collect(WORK / "one-seed", base, tokenizer, tasks, seed=0)}, {}
    for seed, task in enumerate(tasks, start=1):
        own = collect(WORK / "mixed" / str(seed), base, tokenizer, [task], seed)
        folders[task.name] = own.task_folder(task.name) / f"step-{own.records[task.name]['best_step']}"
    zoos["mixed, canonical"], _ = LoraZoo.import_adapters(WORK / "canonical", folders, base)
    zoos["mixed, balanced"], _ = LoraZoo.import_adapters(WORK / "balanced", folders, base)
    (WORK / "balanced" / "reference.safetensors").unlink(missing_ok=True)
    imported = zoos["mixed, canonical"]
    layout = LoraLayout(imported.layout.modules, "shared_init")  # of which nothing is true but that factors stay raw
    about = {"lora_config": imported.lora_config, "template": imported.template}
    about |= {f: getattr(imported, f) for f in ("base_model_name_or_path", "base_model_fingerprint")}
    zoos["mixed, raw"] = LoraZoo.create(WORK / "raw", layout=layout, **about)
    for name in imported:
        if name not in zoos["mixed, raw"]:
            zoos["mixed, raw"].add(name, {0: imported.load_snapshot(name)})
    return {name: LoraZoo(zoo.path) for name, zoo in zoos.items()}


def main() -> None:
    (options,) = HfArgumentParser(GaugeOptions).parse_args_into_dataclasses()
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype())
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    suite = {task.name: task for task in built_in_tasks()}
    seen = [suite[name] for name in with_lora("seen")[: options.num_seen]]
    unseen = [suite[name] for name in SPLITS["validation"][: options.num_unseen]]
    zoos = make_zoos(base, tokenizer, [*seen, *unseen])
    extractor = TaskVectorExtractor(TaskVectorSpec(num_draws=3, layers=(14, 22, 30)))
    vectors = extractor.extract(base, tokenizer, [*seen, *unseen])
    read = {task.name: extractor.vector(base, tokenizer, task.demo[:12]) for task in [*seen, *unseen]}
    collate = CompletionCollator(tokenizer, template=vectors.spec.template, row_length=64)
    batches = {task.name: collate(task.test) for task in [*seen, *unseen]}
    base.requires_grad_(False)

    @torch.no_grad()
    def loss(zoo: LoraZoo, weights: torch.Tensor, name: str) -> float:
        return behavioural_loss(base, zoo.layout, weights[None], zoo.shared_weights, batches[name]).item()

    arms = {name: (zoo, {"reconstruction": "weights"}) for name, zoo in zoos.items()}
    arms["mixed, products"] = (zoos["mixed, canonical"], {"reconstruction": "products"})
    arms["mixed, raw products"] = (zoos["mixed, raw"], {"reconstruction": "products"})
    output = Path(options.output)
    report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"arms": {}}
    bounds: dict[Path, dict[str, tuple[float, float]]] = {}
    for seed in options.seeds:
        for arm, (zoo, changes) in arms.items():
            runs = report["arms"].setdefault(arm, [])
            if any(run["seed"] == seed for run in runs):
                continue
            if zoo.path not in bounds:
                zero = torch.zeros(zoo.layout.num_weights)
                bounds[zoo.path] = {
                    name: tuple(loss(zoo, weights, name) for weights in (zero, zoo.lora_weights(name)))
                    for name in batches
                }
            zoo.add_task_vectors(vectors)
            set_seed(seed)
            train = zoo.subset([task.name for task in seen])
            generator = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(train, **SIZES, **changes))
            arguments = LoraGeneratorTrainingArguments(
                str(WORK / "generator"), max_steps=options.steps, learning_rate=2e-3, seed=seed, report_to="none",
                save_strategy="no", logging_steps=50, disable_tqdm=True,
            )  # fmt: skip
            start = time.perf_counter()
            LoraGeneratorTrainer(generator, arguments, train_dataset=train.as_dataset(num_snapshots=1)).train()
            run = {"seed": seed, "seconds": round(time.perf_counter() - start)}
            for split, tasks in (("seen", seen), ("unseen", unseen)):
                losses = {t.name: loss(zoo, generator.decode_task_vector(read[t.name]), t.name) for t in tasks}
                gains = {
                    n: recovered_gain(bounds[zoo.path][n][0], x, bounds[zoo.path][n][1]) for n, x in losses.items()
                }
                run[split] = {name: gain for name, gain in gains.items() if gain is not None}
            runs.append(run)
            write_json(output, {**run_metadata(0), "steps": options.steps, "arms": report["arms"]})
    summary = {}
    for arm, runs in report["arms"].items():
        means = {split: [statistics.mean(run[split].values()) for run in runs] for split in ("seen", "unseen")}
        summary[arm] = {
            split: {"mean": statistics.mean(values), "spread": max(values) - min(values)}
            for split, values in means.items()
        }
    share = {arm: row["seen"]["mean"] / summary["one seed"]["seen"]["mean"] for arm, row in summary.items()}
    report = {**run_metadata(0), "steps": options.steps, "summary": summary}
    report["mixed_seed_share_of_shared_seed_gain"] = share["mixed, products"]
    report["shares"] = share
    saved = json.loads(output.read_text(encoding="utf-8"))
    write_json(output, report | {"arms": saved["arms"]})
    print(gauge(report))


if __name__ == "__main__":
    main()
