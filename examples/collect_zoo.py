"""Collect a zoo for tasks of your own: a LoRA and task vectors for each of them.

    python examples/collect_zoo.py --dataset samples.jsonl --output_dir zoo

The dataset is a local file or an id on the Hub, anything that `datasets.load_dataset` reads, with one row per sample:
`{"task": "capital", "prompt": "France", "completion": "Paris", "description": "Name the capital of the country."}`,
where the description may be left out. Tasks with prompts in common make a good zoo: an adapter then has to know which
task is meant. The same call again collects what is missing. All arguments can stand in one file instead:
`python examples/collect_zoo.py collect.yaml`, or `.json`.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import (
    CollectionArguments,
    Task,
    TaskVectorExtractor,
    TaskVectorSpec,
    collect_zoo,
    fast_dtype,
    save_tasks,
    smollm2_path,
    task_from_dataset,
)
from hf_icm_lora.processes import leave_group


@dataclass
class ScriptArguments:
    dataset: str = field(metadata={"help": "A file (.json, .jsonl, .csv, .parquet) or an id on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "The split of it that holds the samples."})
    base_model: str | None = field(
        default=None, metadata={"help": "Path or Hub id; by default the packaged SmolLM2-135M."}
    )
    r: int = field(default=8, metadata={"help": "Rank of the LoRAs."})
    lora_alpha: int = field(default=16, metadata={"help": "Scaling is lora_alpha / r."})
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    num_demonstrations: int = field(default=12, metadata={"help": "Most demonstrations behind a task vector."})
    num_draws: int = field(default=3, metadata={"help": "Task vectors per task, from demonstrations drawn anew."})
    hub_base_model: str | None = field(
        default=None, metadata={"help": "The base model's id on the Hub, if it was a local copy, for `push_to_hub`."}
    )


def main() -> None:
    leave_group()  # under `accelerate launch`, each process fine-tunes tasks of its own
    parser = HfArgumentParser((ScriptArguments, CollectionArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        script_args, collection_args = parser.parse_json_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        script_args, collection_args = parser.parse_yaml_file(sys.argv[1])
    else:
        script_args, collection_args = parser.parse_args_into_dataclasses()

    tasks = group_into_tasks(load_samples(script_args.dataset, script_args.dataset_split))
    print(*tasks, sep="\n")

    base_model = script_args.base_model or smollm2_path()
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=fast_dtype()).to(collection_args.device)
    tokenizer = AutoTokenizer.from_pretrained(base_model)

    lora_config = LoraConfig(
        r=script_args.r,
        lora_alpha=script_args.lora_alpha,
        target_modules=script_args.target_modules,
        task_type="CAUSAL_LM",
    )
    zoo = collect_zoo(collection_args.output_dir, base, tokenizer, tasks, lora_config, collection_args)

    spec = TaskVectorSpec.for_base_model(
        base,
        template=zoo.template,
        num_demonstrations=script_args.num_demonstrations,
        min_demonstrations=min(3, script_args.num_demonstrations),
        num_draws=script_args.num_draws,
    )
    zoo.add_task_vectors(TaskVectorExtractor(spec).extract(base, tokenizer, tasks))
    save_tasks(tasks, zoo.path / "samples.jsonl")  # for train_generator.py and evaluate_generator.py
    print(zoo)

    if collection_args.push_to_hub:
        url = zoo.push_to_hub(
            collection_args.hub_model_id or zoo.path.name,
            base_model_name_or_path=script_args.hub_base_model,
            private=collection_args.hub_private_repo,
            token=collection_args.hub_token,
        )
        print(url)


def load_samples(dataset: str, split: str) -> Iterable[Mapping]:
    """Load a file by its extension, or a dataset from the Hub."""
    if Path(dataset).is_file():
        extension = Path(dataset).suffix[1:]
        return load_dataset("json" if extension == "jsonl" else extension, data_files=dataset, split="train")
    return load_dataset(dataset, split=split)


def group_into_tasks(rows: Iterable[Mapping]) -> list[Task]:
    """Make a task of all rows with the same `task`.

    The hash of a prompt chooses its split, so that a prompt stands in the same split of every task: what is tested on
    one task was not trained on in another.
    """
    splits: dict[str, dict[str, list]] = defaultdict(lambda: {"train": [], "demo": [], "test": []})
    descriptions = {}
    for row in rows:
        place = sha256(row["prompt"].encode()).digest()[0] / 256
        split = "train" if place < 0.6 else "demo" if place < 0.8 else "test"
        splits[row["task"]][split].append({"prompt": row["prompt"], "completion": row["completion"]})
        descriptions[row["task"]] = row.get("description")
    return [task_from_dataset(name, samples, description=descriptions[name]) for name, samples in splits.items()]


if __name__ == "__main__":
    main()
