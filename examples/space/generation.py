"""What the Space does, without its page: a task and a query in, an adapter and two answers out.

All users share one base model, so they take turns: an adapter is attached, used, saved and taken off again before the
next one comes.
"""

import os
import re
import shutil
from functools import cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from hf_icm_lora import GenerationRecord, Sample, TaskError, save_adapter_card
from hf_icm_lora.base_model import load_base_model
from hf_icm_lora.cli import load_generator
from hf_icm_lora.completion import CHAT, render

# Names as on the command line: a folder, a Hub id, or "smollm2" for what comes with the package.
GENERATOR = os.environ.get("GENERATOR") or "smollm2"
BASE_MODEL = os.environ.get("BASE_MODEL")  # by default the one that the generator was made for

MAX_CHARACTERS = 4000  # of everything that a user writes: dozens of examples
MAX_NEW_TOKENS = 32

turn = Lock()


class Result(NamedTuple):
    """What comes out for one task and one query.

    Args:
        before, after (`str`): The base model's answer without and with the adapter.
        told (`str`): Markdown that says what is known about the adapter.
        archive (`Path`): The adapter, a PEFT folder in a zip file.
        snippet (`str`): Python that loads it with PEFT and gives the answer again.
    """

    before: str
    after: str
    told: str
    archive: Path
    snippet: str


@cache
def load():
    """Load generator, base model and tokenizer, once."""
    generator = load_generator(GENERATOR)
    base, tokenizer = load_base_model(base_model_name(generator), "fastest")
    return generator, base, tokenizer


def base_model_name(generator) -> str:
    return BASE_MODEL or ("smollm2" if GENERATOR == "smollm2" else generator.config.base_model_name_or_path)


def generate(description: str, examples: str, query: str, folder: str | Path) -> Result:
    """Write the adapter of a task into a folder, and answer a query without and with it.

    Args:
        description (`str`): The task in a sentence, or nothing.
        examples (`str`): One example per line, as `read_examples` takes them, or nothing.
        query (`str`): What to answer.
        folder (`str` or `Path`): Where the adapter goes.

    Raises:
        TaskError: if something that is needed is missing, or there is too much.
    """
    if len(description) + len(examples) + len(query) > MAX_CHARACTERS:
        raise TaskError(f"That is too much text: {MAX_CHARACTERS} characters are allowed in all.")
    samples, description, query = read_examples(examples), " ".join(description.split()), " ".join(query.split())
    if not samples and not description:
        raise TaskError("Give a few examples, or say in a sentence what the task is.")
    if not query:
        raise TaskError("Write a query: something that the adapter should be tried on.")
    generator, base, tokenizer = load()
    with turn:
        before = answer(base, tokenizer, query, generator.config.template)
        model = generator.generate_adapter(
            base, processing_class=tokenizer, examples=samples, description=description or None
        )
        try:
            after = answer(model, tokenizer, query, generator.config.template)
            model.save_pretrained(Path(folder) / "adapter", save_embedding_layers=False)
            save_adapter_card(model, Path(folder) / "adapter")
            about = model.lora_generation["default"]
        finally:
            model.unload()
    archive = shutil.make_archive(str(Path(folder) / "adapter"), "zip", root_dir=folder, base_dir="adapter")
    snippet = write_snippet(base_model_name(generator), tokenizer, query, generator.config.template, base.config)
    return Result(before, after, in_words(about), Path(archive), snippet)


def read_examples(text: str) -> list[Sample]:
    """Read one example per line: `prompt => completion`, or the two cells of a row pasted from a table.

    Raises:
        TaskError: at the first line that is neither.
    """
    samples = []
    for line in filter(str.strip, text.splitlines()):
        parts = [part.strip() for part in re.split("=>|\t", line, maxsplit=1)]
        if len(parts) != 2 or not all(parts):
            raise TaskError(f"Expected an example like 'prompt => completion' on each line, found {line.strip()!r}.")
        samples.append(Sample(*parts))
    return samples


def answer(model, tokenizer, query: str, template: str) -> str:
    """Let a model complete a query, greedily, up to where the template ends."""
    text, end = prompt_and_end(tokenizer, query, template)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=template != CHAT).to(model.device)
    stop = {"stop_strings": [end], "tokenizer": tokenizer} if end else {}
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **stop)[0]
    written = output if model.config.is_encoder_decoder else output[inputs["input_ids"].shape[1] :]
    written = tokenizer.decode(written, skip_special_tokens=True)
    return (written.split(end)[0] if end else written).strip()


def prompt_and_end(tokenizer, query: str, template: str) -> tuple[str, str]:
    """Return what the model reads of a query, and the text with which its answer ends."""
    read, scored = render(Sample(query, "an answer"), template, tokenizer)
    return read, scored.partition("an answer")[2]


def in_words(about: GenerationRecord) -> str:
    """Say in plain words what is known about an adapter, as Markdown."""
    if about.gain_on_examples is None:
        return "How well it fits is not known: give some examples too, and it is measured on them."
    gain = about.gain_on_examples
    if about.scale == 0:
        worth = "the adapter would do harm at any strength. It was weakened to nothing: the base model is better."
    else:
        fitted = "it was not fitted" if about.scale == 1 else f"only its strength was fitted, {about.scale:.0%}"
        worth = f"the adapter takes away {gain:.0%} of the loss on your examples, to which {fitted}. " + (
            "That is little, and it will be little elsewhere."
            if gain < 0.25
            else "Much of that is the form of an answer; it may still be wrong."
        )
    return f"**Gain on examples {gain:.2f}:** {worth}"


def write_snippet(base_model: str, tokenizer, query: str, template: str, config) -> str:
    """Write the Python that loads the adapter with PEFT and answers the query."""
    text, end = prompt_and_end(tokenizer, query, template)
    whole = ", add_special_tokens=False" if template == CHAT else ""  # a chat has them already
    auto_class = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    stop = f"    stop_strings=[{end!r}],\n    tokenizer=tokenizer,\n" if end else ""
    name = f"name = {base_model!r}"
    if base_model == "smollm2":
        name = "from hf_icm_lora import smollm2_path  # the base model exactly as here\n\nname = smollm2_path()"
    return f"""\
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer
{name}
tokenizer = AutoTokenizer.from_pretrained(name)
base = {auto_class}.from_pretrained(name)
model = PeftModel.from_pretrained(base, "adapter")  # the unpacked folder

inputs = tokenizer({text!r}, return_tensors="pt"{whole})
output = model.generate(
    **inputs,
    max_new_tokens={MAX_NEW_TOKENS},
    do_sample=False,
{stop})
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
