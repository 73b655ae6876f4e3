"""The main job, end to end, on a real model: `python examples/demo.py` (or `make demo`, which installs first).

Collects a LoRA for each of 20 tasks on SmolLM2-135M, trains a generator on 16 of them, writes adapters for the 4
unseen ones from 12 examples each, and scores everything against the plain rivals. Results go to `--output_dir`. A
second run reuses the zoo.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from hf_icm_lora import (
    CollectionArguments,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraGeneratorTrainingArguments,
    LoraZoo,
    TaskVectorExtractor,
    TaskVectorSpec,
    built_in_tasks,
    collect_zoo,
    evaluate_generator,
    format_report,
    smollm2_path,
)
from hf_icm_lora.completion import fill_template
from hf_icm_lora.tasks import Sample

SEEN = (
    "country_names/german", "country_names/french", "country_names/spanish", "country_facts/capital",
    "country_facts/alpha2", "language_names/french", "language_names/spanish", "language_names/italian",
    "number_words/english", "number_words/german", "number_words/spanish", "number_transforms/next",
    "string_transforms/upper", "string_transforms/first_letter", "calendar/german", "calendar/spanish",
)  # fmt: skip
UNSEEN = ("country_names/portuguese", "language_names/german", "number_words/italian", "calendar/italian")


FRESH_PROCESS = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
print(f"{type(model).__name__} with {sum(p.numel() for n, p in model.named_parameters() if 'lora_' in n):,} LoRA weights")
"""


@dataclass
class DemoArguments:
    output_dir: str = field(default="build/demo", metadata={"help": "Where everything goes."})
    seed: int = field(default=0, metadata={"help": "Of the generator's initialization and training."})
    max_steps: int = field(default=600, metadata={"help": "Training steps of the generator."})


def answer(model, tokenizer, prompt: str, template: str) -> str:
    """Let a model complete a prompt, greedily, to the end of the line."""
    text, _ = fill_template(Sample(prompt, "x"), template)
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).strip()


def train_generator(seen: LoraZoo, unseen: LoraZoo, output_dir: Path, seed: int, max_steps: int) -> LoraGeneratorModel:
    set_seed(seed)
    model = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(seen))
    args = LoraGeneratorTrainingArguments(
        output_dir=str(output_dir), max_steps=max_steps, seed=seed, logging_steps=max_steps // 6, save_strategy="no"
    )
    trainer = LoraGeneratorTrainer(model, args, train_dataset=seen.as_dataset(), eval_dataset=unseen.as_dataset())
    trainer.train()
    print({name: round(value, 4) for name, value in trainer.evaluate().items()})
    trainer.save_model()
    return LoraGeneratorModel.from_pretrained(output_dir)


def main() -> None:
    (options,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    output_dir, started = Path(options.output_dir), time.perf_counter()

    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    suite = {task.name: task for task in built_in_tasks()}
    tasks = [suite[name] for name in SEEN + UNSEEN]

    print(f"1. Fine-tune a LoRA for each of {len(tasks)} tasks")
    lora_config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    zoo = collect_zoo(
        output_dir / "zoo", base, tokenizer, tasks, lora_config,
        CollectionArguments(output_dir=str(output_dir / "collection"), max_steps=32),
    )  # fmt: skip

    print("2. Extract task vectors from the frozen base model")
    zoo.add_task_vectors(TaskVectorExtractor(TaskVectorSpec()).extract(base, tokenizer, tasks))
    seen, unseen = zoo.subset(SEEN), zoo.subset(UNSEEN)

    print(f"3. Train a generator on {len(seen)} tasks")
    generator = train_generator(seen, unseen, output_dir / "generator", options.seed, options.max_steps)

    print("4. Score it, and every plain rival, on test samples")
    report = evaluate_generator(generator, base, tokenizer, zoo, tasks, output_dir=output_dir)
    print(format_report(report))

    print("5. Write adapters for the unseen tasks")
    for name in UNSEEN:
        task, folder = suite[name], output_dir / "adapters" / name.replace("/", "-")
        before = answer(base, tokenizer, task.test[0].prompt, zoo.template)
        model = generator.generate_adapter(base, processing_class=tokenizer, examples=task.demo[:12])
        after = answer(model, tokenizer, task.test[0].prompt, zoo.template)
        model.save_pretrained(folder, save_embedding_layers=False)
        base = model.unload()
        prompt, completion = task.test[0]
        print(f"   {name}: {prompt!r} before {before!r}, after {after!r}, right {completion!r}")
    print("   The last one in a fresh process: ", end="", flush=True)
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(smollm2_path()), str(folder)], check=True)
    print(f"Everything is in {output_dir} ({time.perf_counter() - started:.0f} s).")


if __name__ == "__main__":
    main()
