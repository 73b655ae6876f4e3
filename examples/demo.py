"""The main job, end to end, on a real model: `python examples/demo.py` (or `make demo`, which installs first).

Starts with the generator that ships with the package, on tasks that it has never seen. Then makes a small one from
nothing: collects a LoRA for each of 20 tasks on SmolLM2-135M and trains a generator, on the LoRAs of 12 of them, then
through the frozen base model on the samples of 82 tasks. Eight tasks stay unseen in both; it writes their adapters
from 12 examples each, and scores everything against the plain rivals. Results go to `--output_dir`; a second run
reuses the zoo and the task vectors.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_icm_lora import (
    CollectionArguments,
    LoraGeneratorModel,
    RecipeArguments,
    Sample,
    built_in_tasks,
    collect_zoo,
    evaluate_generator,
    fast_dtype,
    format_report,
    save_adapter_card,
    smollm2_generator_path,
    smollm2_path,
    train_generator,
)
from hf_icm_lora.completion import render
from hf_icm_lora.report import write_report

SEEN = (
    "country_names/german", "country_names/french", "country_names/spanish", "country_facts/capital",
    "country_facts/currency_code", "language_names/french", "language_names/spanish", "number_words/english",
    "number_words/german", "number_words/french", "calendar/german", "calendar/spanish",
)  # fmt: skip
UNSEEN = (
    "country_names/portuguese", "country_names/dutch", "country_facts/alpha2", "language_names/german",
    "language_names/italian", "number_words/italian", "calendar/italian", "calendar/dutch",
)  # fmt: skip
UNSEEN_BY_THE_SHIPPED = ("country_names/finnish", "calendar/catalan", "number_words/icelandic")
# Behavioural training sees the samples of the seen tasks and of every third other task of these families.
FAMILIES = ("country_names", "country_facts", "language_names", "number_words", "calendar")

FRESH_PROCESS = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
lora_weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
print(f"{type(model).__name__} with {lora_weights:,} LoRA weights")
"""


@dataclass
class DemoArguments:
    output_dir: str = field(default="build/demo", metadata={"help": "Where everything goes."})
    zoo: str | None = field(default=None, metadata={"help": "The zoo, by default below output_dir."})
    seed: int = field(default=0, metadata={"help": "Of the generator's initialization and training."})
    reconstruction_steps: int = field(default=150, metadata={"help": "Steps on the zoo's LoRAs."})
    behavioural_steps: int = field(default=160, metadata={"help": "Steps through the base model."})


def main() -> None:
    (options,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    output_dir, started = Path(options.output_dir), time.perf_counter()
    zoo_dir = Path(options.zoo or output_dir / "zoo")

    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=fast_dtype())
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    suite = {task.name: task for task in built_in_tasks(FAMILIES)}
    others = [name for name in suite if name not in SEEN + UNSEEN][::3]
    tasks = [suite[name] for name in SEEN + UNSEEN]

    print("0. Write adapters with the shipped generator, for tasks that it has never seen", flush=True)
    shipped = LoraGeneratorModel.from_pretrained(smollm2_generator_path())
    for name in UNSEEN_BY_THE_SHIPPED:
        base = write_adapter(shipped, base, tokenizer, suite[name], output_dir / "shipped" / name.replace("/", "-"))

    print(f"1. Fine-tune a LoRA for each of {len(tasks)} tasks", flush=True)
    lora_config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments = CollectionArguments(
        output_dir=str(output_dir / "collection"), max_steps=32, eval_steps=16, per_device_train_batch_size=8
    )
    zoo = collect_zoo(zoo_dir, base, tokenizer, tasks, lora_config, arguments)

    samples = [suite[name] for name in [*SEEN, *others]]
    print(f"2. Train a generator on the LoRAs of {len(SEEN)} tasks, then on the samples of {len(samples)}", flush=True)
    arguments = RecipeArguments(
        output_dir=str(output_dir / "generator"), reconstruction_steps=options.reconstruction_steps,
        max_steps=options.behavioural_steps, save_strategy="no", seed=options.seed,
    )  # fmt: skip
    generator = train_generator(zoo.subset(SEEN), base, tokenizer, samples, arguments)

    print("3. Score it, and every plain rival, on test samples", flush=True)
    report = evaluate_generator(generator, base, tokenizer, zoo, tasks)
    report["seed"] = options.seed
    write_report(report, output_dir)
    print(format_report(report))

    print("4. Write the adapters of the unseen tasks", flush=True)
    for name in UNSEEN[::3]:
        folder = output_dir / "adapters" / name.replace("/", "-")
        base = write_adapter(generator, base, tokenizer, suite[name], folder)
    print(f"   {folder} in a fresh process: ", end="", flush=True)
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(smollm2_path()), str(folder)], check=True)
    print(f"Everything is in {output_dir} ({time.perf_counter() - started:.0f} s).")


def write_adapter(generator, base, tokenizer, task, folder: Path):
    """Generate the adapter of a task, save it, and show one answer before and after. Returns the base model."""
    prompt, right = task.test[0]
    before = answer(base, tokenizer, prompt, generator.config.template)
    started = time.perf_counter()
    model = generator.generate_adapter(base, processing_class=tokenizer, examples=task.demo[:12])
    seconds = time.perf_counter() - started
    after = answer(model, tokenizer, prompt, generator.config.template)
    model.save_pretrained(folder, save_embedding_layers=False)  # or PEFT asks the Hub for the base's vocabulary
    save_adapter_card(model, folder)
    print(f"   {task.name}, in {seconds:.1f} s: {prompt!r}")
    print(f"      before {before!r}\n      after {after!r}\n      right {right!r}", flush=True)
    return model.unload()


def answer(model, tokenizer, prompt: str, template: str) -> str:
    """Let a model complete a prompt, greedily, to the end of the line."""
    text, _ = render(Sample(prompt, "x"), template, tokenizer)
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).strip()


if __name__ == "__main__":
    main()
