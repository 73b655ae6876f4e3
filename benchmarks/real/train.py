"""Train the meta-learned closed form from prepared files: no tokenizer, no Hub, no network.

    python -m benchmarks.real.train --device cuda --max_minutes 8
    python -m benchmarks.real.train --max_steps 3 --budget 2000 --eval_tasks 1     (a smoke run on a CPU)

Each step draws its tasks from (seed, step), so an interrupted run goes on as if nothing had happened: with
`--keep_state True` the optimizer's state lies beside the result. `log.jsonl` gets a line every 10 s.
"""

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from benchmarks.real.episodes import TEMPLATES, Episodes, Stream
from benchmarks.real.score import evaluate, summary
from benchmarks.real.writer import Base, MetaClosedForm, Writer, gather, initialise, nll


@dataclass
class TrainOptions:
    data: str = field(default="build/real/prepared", metadata={"help": "What prepare.py wrote."})
    output_dir: str = field(default="build/real/run", metadata={"help": "Where writer.safetensors and log.jsonl go."})
    start_from: str | None = field(default=None, metadata={"help": "A writer.safetensors to go on with."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    max_minutes: float = field(default=8.0, metadata={"help": "The learning rate falls to 0 until then."})
    max_steps: int | None = field(default=None, metadata={"help": "In place of max_minutes: repeatable."})
    budget: int = field(default=40_000, metadata={"help": "Tokens of a step, about, with padding."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of the maps; other kinds have a fixed share of it."})
    warmup_steps: int = field(default=60, metadata={"help": "Steps until the full learning rate."})
    rank: int = field(default=64, metadata={"help": "Of the adapters."})
    num_memory: int = field(default=8, metadata={"help": "Memory tokens; 0 for examples only."})
    read_weight: float = field(default=0.3, metadata={"help": "Of the reader's own loss on the answers it reads."})
    compiled: bool = field(default=False, metadata={"help": "Compile elementwise operations, for a GPU."})
    workers: int = field(default=0, metadata={"help": "Processes that draw tasks."})
    seed: int = field(default=0, metadata={"help": "Of all that is drawn."})
    eval_tasks: int = field(default=59, metadata={"help": "Validation tasks scored at the end."})
    save_minutes: float = field(default=1.5, metadata={"help": "Between checkpoints."})
    keep_state: bool = field(default=False, metadata={"help": "Keep the optimizer's state, to go on after a break."})


def losses(model: MetaClosedForm, batch: dict, read_weight: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss on the queries plus a part of the reader's, and what is logged."""
    demos = batch["reader_at"].shape[1]
    read = model.read(batch)
    hidden, _ = model.write(batch, read)
    loss, right = nll(model.base, hidden[:, demos:], batch["targets"][:, demos:], batch["mask"][:, demos:])
    if not demos:
        return loss.mean(), {"described": loss.mean(), "described_right": right.float().mean()}
    answers = gather(read.last, batch["reader_at"])[:, 2:]  # the first ones cannot be known
    read_loss, read_right = nll(model.base, answers, batch["targets"][:, 2:demos], batch["mask"][:, 2:demos])
    terms = {"loss": loss, "right": right, "read": read_loss, "read_right": read_right}
    return loss.mean() + read_weight * read_loss.mean(), {name: term.float().mean() for name, term in terms.items()}


def step(model: MetaClosedForm, optimizer: torch.optim.Optimizer, batch: dict, read_weight: float) -> dict:
    """Take one step, unless the gradient is not finite, and return what the log says about it."""
    loss, terms = losses(model, batch, read_weight)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.writer.parameters(), 1.0)
    if torch.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = batch["rows_ids"].numel() + batch["reader_ids"].numel()
    counts = {"tasks": len(batch["mask"]), "tokens": tokens}
    return {name: term.detach() for name, term in terms.items()} | {"norm": norm} | counts


class Run:
    """Where a run stands, on disk and in time."""

    def __init__(self, options: TrainOptions, writer: Writer, optimizer: torch.optim.Optimizer):
        self.options, self.writer, self.optimizer = options, writer, optimizer
        self.output = Path(options.output_dir)
        self.state = self.output / "state.safetensors"
        self.step, self.minutes = 0, 0.0
        if self.state.exists():
            self._resume()
        self.began = time.perf_counter() - 60 * self.minutes

    def passed(self) -> float:
        """Return how much of the run is over, from 0 to 1."""
        self.minutes = (time.perf_counter() - self.began) / 60
        if self.options.max_steps is not None:
            return self.step / self.options.max_steps if self.options.max_steps else 1.0
        return self.minutes / self.options.max_minutes

    def note(self, **values) -> None:
        minutes = round((time.perf_counter() - self.began) / 60, 2)
        line = json.dumps({"step": self.step, "minutes": minutes, **values})
        print(line, flush=True)
        with (self.output / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def save(self) -> None:
        self.writer.save(self.output / "writer.safetensors")
        if self.options.keep_state:
            tensors = {"progress": torch.tensor([self.step, self.minutes], dtype=torch.float64)}
            for name, parameter in self.writer.named_parameters():
                moments = self.optimizer.state[parameter]
                tensors |= {f"{name}/value": parameter.detach()}
                tensors |= {f"{name}/{key}": moments[key] for key in ("step", "exp_avg", "exp_avg_sq")}
            for name, buffer in self.writer.named_buffers():
                tensors[f"{name}/value"] = buffer
            save_file(tensors, self.state)

    def _resume(self) -> None:
        tensors = load_file(self.state, device=self.options.device)
        self.step, self.minutes = int(tensors["progress"][0]), float(tensors["progress"][1])
        with torch.no_grad():
            for name, tensor in [*self.writer.named_parameters(), *self.writer.named_buffers()]:
                tensor.copy_(tensors[f"{name}/value"])
        for name, parameter in self.writer.named_parameters():
            self.optimizer.state[parameter] = {
                "step": tensors[f"{name}/step"].cpu(),
                **{key: tensors[f"{name}/{key}"] for key in ("exp_avg", "exp_avg_sq")},
            }


def train(options: TrainOptions) -> MetaClosedForm:
    device, output = options.device, Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    base = Base(options.data, device, torch.bfloat16, options.compiled)
    writer = Writer(base, options.rank, options.num_memory).to(device)
    model = MetaClosedForm(base, writer)
    episodes = Episodes(options.data, {"train": 0.75, "suite": 0.25})
    validation = Episodes(options.data, {"validation": 1.0})
    optimizer = torch.optim.AdamW(writer.groups(options.learning_rate), betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(options, writer, optimizer)

    def moved(batch: dict) -> dict:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    if options.start_from:
        writer.load(Path(options.start_from))
    elif not run.step:
        stream = iter(Stream(episodes, options.seed + 1000, options.budget // 4))
        with_demos = (moved(batch) for batch in stream if batch["reader_at"].shape[1])
        initialise(model, [next(with_demos) for _ in range(24 if device == "cuda" else 2)])
    run.note(parameters=sum(parameter.numel() for parameter in writer.parameters()))

    rates = [group["lr"] for group in optimizer.param_groups]
    loader = DataLoader(
        Stream(episodes, options.seed, options.budget, first_step=run.step), batch_size=None,
        num_workers=options.workers, pin_memory=device == "cuda", prefetch_factor=4 if options.workers else None,
    )  # fmt: skip
    told = saved = time.perf_counter()
    terms: dict[str, list] = defaultdict(list)
    is_late = run.passed() >= 0.5
    for batch in loader:
        passed = run.passed()
        if passed >= 1:
            break
        if options.eval_tasks and passed >= 0.5 and not is_late:  # so that over-fitting shows
            score(run, model, validation, -(-options.eval_tasks // 4), ("adapter",))
            is_late = True
        factor = min(1, (run.step + 1) / options.warmup_steps) * (0.51 + 0.49 * math.cos(math.pi * passed))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        for name, term in step(model, optimizer, moved(batch), options.read_weight).items():
            terms[name].append(term)
        run.step += 1
        seconds = time.perf_counter() - told
        if seconds > 10 or run.step == options.max_steps:
            tokens = sum(terms.pop("tokens"))
            means = {name: round(float(sum(values) / len(values)), 4) for name, values in terms.items()}
            run.note(**means, tokens_per_second=round(tokens / seconds))
            told, terms = time.perf_counter(), defaultdict(list)
        if time.perf_counter() - saved > 60 * options.save_minutes:
            run.save()
            saved = time.perf_counter()
    run.save()
    if options.eval_tasks:
        score(run, model, validation, options.eval_tasks, ("adapter", "reader"))
    return model


def score(run: Run, model: MetaClosedForm, validation: Episodes, num_tasks: int, modes: tuple[str, ...]) -> None:
    """Note the scores of validation tasks, from 12 examples and, with memory tokens, from a description alone."""
    given = [{"demos": 12}]
    if model.writer.num_memory:
        given.append({"demos": 0, "describe": True})
    for mode, template, what in product(modes, TEMPLATES, given):
        found = evaluate(model, validation, mode, template, num_tasks, **what)
        run.note(mode=mode, template=template, **what, **summary(found), found=found)


def main() -> None:
    (options,) = HfArgumentParser(TrainOptions).parse_args_into_dataclasses()
    train(options)


if __name__ == "__main__":
    main()
