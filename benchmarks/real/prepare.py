"""Prepare a folder from which train.py runs without tokenizer, Hub or network: tasks as token ids, and the base.

    python -m benchmarks.real.prepare --tasks DATA/real --output_dir build/real/prepared

Samples become token ids once per template. `plain` is `- {prompt}: {completion}\\n`; `chat` is the base's own.
The base stays in the 4 bits that it is packaged in, in files of at most 31 MB.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

from hf_icm_lora import built_in_tasks, smollm2_path
from hf_icm_lora.smollm2 import smollm2_gguf_path

PARTS = ("train", "demo", "test")
PART_BYTES = 31_000_000  # of a file of the base, whose embeddings alone have 30 million
REMAPS = [  # words that stand in for the labels of a task, so that only the examples tell what a label means
    list("ABCDEFGHIJ"),
    [str(number) for number in range(1, 11)],
    ["red", "blue", "green", "yellow", "black", "white", "orange", "purple", "brown", "pink"],
    ["north", "south", "east", "west", "up", "down", "left", "right", "front", "back"],
    ["apple", "river", "stone", "cloud", "tiger", "piano", "window", "garden", "coffee", "mountain"],
    ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"],
    ["foo", "bar", "baz", "qux", "quux", "corge", "grault", "garply", "waldo", "fred"],
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "January", "June", "August"],
]


@dataclass
class PrepareOptions:
    tasks: str = field(metadata={"help": "The folder with train.jsonl.gz and validation.jsonl.gz."})
    output_dir: str = field(default="build/real/prepared", metadata={"help": "Where the files go."})
    splits: list[str] = field(
        default_factory=lambda: ["train", "validation", "suite"], metadata={"help": "Files, and the built-in suite."}
    )


class Templates:
    """The texts around a sample, in tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        mark = "\x00"
        other = {"role": "user", "content": "x"}
        text = self._chat([{"role": "user", "content": mark}], add_generation_prompt=True)
        self.before, self.after = text.split(mark)
        text = self._chat([{"role": "system", "content": mark}, other])
        self.system, self.user = text.split(mark)[0], text.split(mark)[1].split("x")[0]
        text = self._chat([other, {"role": "assistant", "content": mark}, other])
        self.between = text.split(mark)[1].split("x")[0]  # ends the answer, opens the next turn of the user

    def _chat(self, messages: list[dict], **options) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def constants(self) -> dict:
        end = self.between.index("<|im_end|>") + len("<|im_end|>")
        names = {
            "chat_before": self.before, "chat_after": self.after, "chat_system": self.system, "chat_user": self.user,
            "chat_end": self.between[:end], "chat_next": self.between[end:],
        }  # fmt: skip
        return {name: self.ids([text])[0] for name, text in names.items()}


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return all ids one after another, and where each row starts (one more at the end)."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows]), offsets


def real_tasks(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf8") as lines:
        yield from map(json.loads, lines)


def suite_tasks(samples: int = 96) -> Iterator[dict]:
    """The training tasks of the built-in suite."""
    splits = json.loads((Path(__file__).parents[1] / "suite" / "splits.json").read_text())
    chosen = {*splits["seen"], *splits["samples"]}
    for task in built_in_tasks():
        if task.name in chosen:
            yield {
                "name": task.name, "family": f"suite/{task.family}", "description": task.description,
                "descriptions": [task.description] * 3, "labels": None, "demo": [], "test": [],
                "train": [(sample.prompt, sample.completion) for sample in task.train[:samples]],
            }  # fmt: skip


def tokenise(given: Iterable[dict], templates: Templates) -> tuple[dict, list[dict]]:
    prompts, completions, tasks = [], [], []
    for task in given:
        kept = {"name": task["name"], "family": task["family"]}
        kept["described"] = [task["description"], *task["descriptions"]]
        for part in PARTS:
            kept[part] = [len(prompts), len(prompts) + len(task[part])]
            prompts += [prompt for prompt, _ in task[part]]
            completions += [completion for _, completion in task[part]]
        labels = sorted({completion for _, completion in task["train"]}) if task["labels"] else []
        kept["labels"] = {text: ids for text, ids in zip(labels, label_ids(templates, labels), strict=True)}
        tasks.append(kept)
    arrays = {}
    for name, texts in {
        "plain_prompt": [f"- {prompt}:" for prompt in prompts],
        "plain_completion": [f" {completion}\n" for completion in completions],
        "chat_prompt": prompts,
        "chat_completion": completions,
    }.items():
        arrays[name], arrays[f"{name}_at"] = flat(templates.ids(texts))
    described = [text for task in tasks for text in task.pop("described")]
    for name, texts in {
        "plain_description": [f"{text}\n" for text in described],
        "chat_description": described,
    }.items():
        arrays[name], arrays[f"{name}_at"] = flat(templates.ids(texts))
    return arrays, tasks


def save_tasks(arrays: dict, tasks: list[dict], templates: Templates, path: Path) -> None:
    """Write token ids to `path`.npz, and what is known of the tasks to `path`.json."""
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    remaps = [label_ids(templates, words) for words in REMAPS]
    meta = {"tasks": tasks, "constants": templates.constants(), "remaps": remaps}
    path.with_suffix(".json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf8")


def label_ids(templates: Templates, labels: list[str]) -> list[list[list[int]]]:
    """Return, per label, its ids in the plain and in the chat template."""
    plain, chat = templates.ids([f" {label}\n" for label in labels]), templates.ids(labels)
    return [list(pair) for pair in zip(plain, chat, strict=True)]


def quantised_base() -> dict[str, torch.Tensor]:
    """Return the base's tensors as they are packaged, in blocks of 4 or 8 bits, named as in transformers."""
    config = AutoConfig.from_pretrained(smollm2_path())
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    tensors = {}
    for tensor in gguf.GGUFReader(smollm2_gguf_path()).tensors:
        place = tensor.name.split(".")
        if place[0] == "blk":
            name = f"model.layers.{place[1]}.{names[place[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[place[0]]
        raw = torch.from_numpy(tensor.data.copy())
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(place[-2])
        if heads:  # GGUF stores the two halves of a rotated head in turn
            raw = raw.view(heads, -1, 2, raw.shape[-1]).transpose(1, 2).reshape(raw.shape)
        tensors[name] = raw.contiguous()
    return tensors


def save_base(tensors: dict[str, torch.Tensor], config, output: Path) -> None:
    """Write a Llama's tensors in files of at most 31 MB, and what its config says of them."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(other.nbytes for other in parts[-1].values()) + tensor.nbytes > PART_BYTES:
            parts.append({})
        parts[-1][name] = tensor
    for number, part in enumerate(parts):
        save_file(part, output / f"base.{number}.safetensors")
    shape = {
        "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, "head_dim": config.head_dim,
        "epsilon": config.rms_norm_eps, "theta": config.rope_parameters["rope_theta"],
    }  # fmt: skip
    (output / "base.json").write_text(json.dumps(shape))


def main() -> None:
    (options,) = HfArgumentParser(PrepareOptions).parse_args_into_dataclasses()
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    templates = Templates(AutoTokenizer.from_pretrained(smollm2_path()))
    for split in options.splits:
        given = suite_tasks() if split == "suite" else real_tasks(Path(options.tasks) / f"{split}.jsonl.gz")
        arrays, tasks = tokenise(given, templates)
        save_tasks(arrays, tasks, templates, output / split)
        print(f"{split}: {len(tasks)} tasks, {len(arrays['plain_prompt_at']) - 1} samples")
    save_base(quantised_base(), AutoConfig.from_pretrained(smollm2_path()), output)


if __name__ == "__main__":
    main()
