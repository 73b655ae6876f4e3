"""Right answers of the meta-learned closed form on validation tasks, beside the prompt and beside wrong examples.

    python -m benchmarks.real.score --writer build/real/run/writer.safetensors --modes adapter prompt wrong

`MODES` says what each mode is.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from benchmarks.real.episodes import Episodes
from benchmarks.real.writer import Base, MetaClosedForm, Writer, gather, nll, stored_sizes

MODES = {
    "adapter": "the adapter written from the task's examples, and no prompt",
    "wrong": "the adapter written from another task's examples",
    "constant": "the part of the adapter that all tasks share",
    "prompt": "the base with the examples in its prompt",
    "reader": "the trained reader with the examples in its prompt",
}


@dataclass
class ScoreOptions:
    writer: str = field(metadata={"help": "A writer.safetensors of train.py."})
    data: str = field(default="build/real/prepared", metadata={"help": "What prepare.py wrote."})
    split: str = field(default="validation", metadata={"help": "The tasks that are scored."})
    modes: list[str] = field(default_factory=lambda: list(MODES), metadata={"help": f"Of {', '.join(MODES)}."})
    templates: list[str] = field(default_factory=lambda: ["plain", "chat"], metadata={"help": "plain, chat, or both."})
    num_tasks: int | None = field(default=None, metadata={"help": "Evenly spaced by length; all by default."})
    demos: int = field(default=12, metadata={"help": "Examples of a task; 0 for its description alone."})
    queries: int = field(default=32, metadata={"help": "Test samples of a task."})
    describe: bool = field(default=False, metadata={"help": "The reader, or the prompt, begins with the description."})
    wording: int = field(default=0, metadata={"help": "Of the description: 0, or another one, 1 to 3."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    output: str | None = field(default=None, metadata={"help": "A JSON file for the scores of each task."})


@torch.no_grad()
def evaluate(
    model: MetaClosedForm,
    episodes: Episodes,
    mode: str,
    template: str,
    num_tasks: int | None = None,
    demos: int = 12,
    queries: int = 32,
    describe: bool = False,
    wording: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return, per task, the loss on its test samples and the share that greedy decoding writes exactly."""
    device = model.base.embed.device
    longest = [episodes.lengths[slice(*task["test"])].max() for task in episodes.tasks]
    order = sorted(range(len(episodes.tasks)), key=longest.__getitem__)
    chosen = order[:: max(1, len(order) // num_tasks)][:num_tasks] if num_tasks else order
    found = {}
    for index in tqdm(chosen, desc=f"{mode}, {template}", disable=None):
        task = episodes.tasks[index]
        count = min(queries, task["test"][1] - task["test"][0])
        batch = episodes.held_out([index], demos, count, template, describe, wording)
        if mode == "wrong":  # the next task but one of about the same length, which is rarely a variant of this one
            other = order[(order.index(index) + 2) % len(order)]
            batch = joined(episodes.held_out([other], demos, 1, template, describe, wording), batch, demos)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        targets, mask = batch["targets"][:, demos:], batch["mask"][:, demos:]
        if mode in ("prompt", "reader"):
            hidden = _after_the_examples(model, episodes, batch, demos, template, trained=mode == "reader")
        else:
            read = model.read(batch)
            if mode == "constant":  # no position counts, and memory tokens say nothing
                batch["mask"] = torch.zeros_like(batch["mask"])
                read = read._replace(memory=[torch.zeros_like(states) for states in read.memory])
            hidden = model.write(batch, read)[0][:, demos:]
        loss, right = nll(model.base, hidden, targets, mask)
        found[task["name"]] = (round(loss.mean().item(), 4), round(right.float().mean().item(), 4))
    return found


def joined(examples: dict, queries: dict, demos: int) -> dict:
    """Return the demonstrations of one batch with the queries of another."""
    batch = {name: examples[name] for name in ("reader_ids", "reader_end")}
    answer = max(examples["mask"].shape[-1], queries["mask"].shape[-1])
    length = max(examples["rows_ids"].shape[-1], queries["rows_ids"].shape[-1])
    for name in ("rows_ids", "rows_at", "targets", "mask", "kind"):
        wide = length if name == "rows_ids" else answer
        parts = [examples[name][:, :demos], queries[name][:, demos:]]
        batch[name] = torch.cat([torch.nn.functional.pad(part, (0, wide - part.shape[-1])) for part in parts], 1)
    batch["reader_at"] = torch.nn.functional.pad(examples["reader_at"], (0, answer - examples["mask"].shape[-1]))
    return batch


def _after_the_examples(model, episodes, batch, demos: int, template: str, trained: bool) -> torch.Tensor:
    """Return the last layer's output at the queries' answers, each read after all the examples."""
    device = model.base.embed.device
    context, before = batch["reader_ids"][0, : batch["reader_end"][0]], 0
    if template == "chat":
        before = len(episodes.constants["chat_before"])
        if demos:
            context = torch.cat([context, torch.tensor(episodes.constants["chat_next"], device=device)])
    rows = batch["rows_ids"][0, demos:, before:]
    ids = torch.cat([context.expand(len(rows), -1), rows], 1)
    read = torch.cat([model.last(part, trained) for part in ids.split(8)])
    return gather(read[None], (batch["rows_at"][:, demos:] + len(context) - before).clamp_min(0))


def summary(found: dict[str, tuple[float, float]]) -> dict[str, float]:
    loss, right = torch.tensor(list(found.values())).mean(0).tolist()
    return {"loss": round(loss, 4), "right": round(right, 4)}


def main() -> None:
    (options,) = HfArgumentParser(ScoreOptions).parse_args_into_dataclasses()
    base = Base(options.data, options.device, torch.bfloat16)
    stored = Path(options.writer)
    model = MetaClosedForm(base, Writer(base, **stored_sizes(stored)).to(options.device))
    model.writer.load(stored)
    episodes = Episodes(options.data, {options.split: 1.0})
    scores = {}
    for mode in options.modes:
        for template in options.templates:
            found = evaluate(
                model, episodes, mode, template, options.num_tasks, options.demos, options.queries, options.describe,
                options.wording,
            )  # fmt: skip
            scores[f"{mode}, {template}"] = {**summary(found), "tasks": found}
            print(f"{mode}, {template}: {summary(found)}", flush=True)
    if options.output:
        Path(options.output).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
