"""Evaluation: the generator against every plain rival, on seen and unseen tasks, in one run.

Recovered gain G = (base loss - loss) / (base loss - task LoRA loss) on test samples, where the task LoRA was stopped
early on validation samples; clipped to [-1, 1] per task. 1 is as good as fine-tuning, 0 no better than the base.

    base              the base model alone (G = 0)
    task_lora         the LoRA fine-tuned on the task: the oracle (G = 1)
    generated         from the task vector of the given examples
    wrong_condition   from the vector of another task of the same split
    mean_lora         the mean of all seen tasks' LoRAs
    nearest_lora      the LoRA of the seen task whose vector has the largest cosine
    top_k_merge       a softmax over the cosines of the 4 nearest seen tasks weighs their LoRAs
    ridge             kernel ridge regression from task vector to weights
    few_shot_prompt   the base model prompted with the same examples

and, when asked for,

    description       generated from the task's description alone
    both              generated from the description and the same examples
    scaled            the generated adapter at the scale from 0 to 1 that has the least loss on the examples: what
                      `generate_adapter` does, where all rows but this and the next are at full strength
    best_rival        of the four plain rivals at the same scales, the one with the least loss on the examples
    refined           the generated adapter after `refine_steps` gradient steps on the examples
    fine_tuned        as many steps on the same examples from no adapter at all
    fallback          nothing where the generated adapter does harm on the examples, else that adapter
    noisy_nearest     of the seen LoRAs the one nearest to the generated adapter, plus noise to be as far from it

Other generators can be scored in the same run, each as a row of its own.

For a seen task, `nearest_lora` and `top_k_merge` may not choose the task itself. Temperature and ridge penalty are
chosen by leaving one seen task out, in weight space, so no rival sees a test sample either.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .adapter import attach_adapter, canonical_lora_config, frozen_base, require_bare, restored
from .behaviour import SCALES, ExampleLoss
from .completion import CompletionCollator, fill_template, score_completions
from .errors import IncompatibleAdapterError, TaskError, ZooError
from .model_card import run_metadata
from .modeling_lora_generator import LoraGeneratorModel
from .processes import gathered, own_part, state
from .report import storage, summarize, write_report
from .rivals import Rivals
from .task_vectors import TaskVectorExtractor, TaskVectorSpec
from .tasks import Task, check_unique_names
from .zoo import LoraZoo

PLAIN_RIVALS = ("mean_lora", "nearest_lora", "top_k_merge", "ridge")  # made of the seen tasks' LoRAs alone
ROWS = ("base", "task_lora", "generated", "wrong_condition", *PLAIN_RIVALS, "few_shot_prompt")
FINE_TUNE_RATE = 1e-2  # of the row fine_tuned: from B = 0 it has farther to go than from a generated adapter
MORE_ROWS = ("description", "both", "scaled", "best_rival", "refined", "fine_tuned", "fallback", "noisy_nearest")


def evaluate_generator(
    generator: LoraGeneratorModel,
    base_model: nn.Module,
    processing_class,
    zoo: LoraZoo,
    tasks: Sequence[Task],
    *,
    num_examples: int = 12,
    more_rows: Sequence[str] = (),
    refine_steps: int = 20,
    other_generators: Mapping[str, LoraGeneratorModel] | None = None,
    batch_size: int = 32,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Score the generator and all plain rivals on tasks whose LoRAs are in the zoo.

    Under `accelerate launch` all processes must call it; they share the tasks, and all get the report.

    Args:
        generator (`LoraGeneratorModel`): A trained generator. Its `config.training_tasks` are the seen tasks; all
            others are unseen.
        base_model (`PreTrainedModel`): The base model, without adapters; it comes back unchanged.
        processing_class: Its tokenizer.
        zoo (`LoraZoo`): The seen tasks' LoRAs, and one for each task that is scored, as the oracle.
        tasks (`Sequence[Task]`): The tasks to score, with `demo` and `test` samples.
        num_examples (`int`, *optional*, defaults to 12): `demo` samples that the generator, the rivals that need a
            task vector, and the few-shot prompt are given, the same for all.
        more_rows (`Sequence[str]`, *optional*): Further rows, out of `"description"`, `"both"`, `"scaled"`,
            `"best_rival"`, `"refined"`, `"fine_tuned"`, `"fallback"` and `"noisy_nearest"`.
        refine_steps (`int`, *optional*, defaults to 20): Gradient steps of the rows `refined` and `fine_tuned`.
        other_generators (`Mapping[str, LoraGeneratorModel]`, *optional*): More generators of the same layout and
            lora_A, scored on the same examples: row name -> generator.
        batch_size (`int`, *optional*, defaults to 32): Samples per forward pass.
        output_dir (`str` or `Path`, *optional*): Where to write `evaluation.json` and `evaluation.md`.

    Returns:
        `dict`: The report, as written to `evaluation.json`; [`format_report`] makes a table of it.

    Raises:
        IncompatibleAdapterError: if zoo, generators and base model do not belong together.
        TaskError: if there is no task, or one lacks samples or, for the rows `"description"` and `"both"`, a
            description.
        ValueError: if a further row is unknown, or another generator has the name of a row.
        ZooError: if a task has no LoRA in the zoo.
    """
    started = time.perf_counter()
    others = dict(other_generators or {})
    for one in (generator, *others.values()):
        if one.config.base_model_fingerprint != zoo.base_model_fingerprint or one.layout != zoo.layout:
            raise IncompatibleAdapterError(
                f"A generator ({one.layout.fingerprint[:12]}) and {zoo} ({zoo.layout.fingerprint[:12]}) differ in "
                "layout or base model. Use the zoo that the generator was trained on."
            )
        if one.zoo_normalizer.is_fitted and not torch.equal(
            one.zoo_normalizer.shared_weights.cpu(), zoo.shared_weights
        ):
            raise IncompatibleAdapterError(f"{zoo} has another lora_A than the zoo that a generator was trained on.")
    require_bare(base_model)
    generator.check_base_model(base_model)
    if unknown := sorted(set(more_rows) - set(MORE_ROWS)):
        raise ValueError(f"more_rows: expected some of {MORE_ROWS}, found {unknown}.")
    if taken := sorted({*ROWS, *MORE_ROWS} & others.keys()):
        raise ValueError(f"other_generators: {taken} are names of rows already.")
    chosen_rows = (*ROWS, *(row for row in MORE_ROWS if row in more_rows), *others)
    tasks = check_unique_names(tasks)
    if not tasks:
        raise TaskError("Expected at least one task to score, found none.")
    for task in tasks:
        task.require("demo", 2, "a task vector")
        task.require("test", 1, "a score")
        if not {"description", "both"}.isdisjoint(more_rows) and not task.description:
            raise TaskError(f"Task {task.name!r} has no description to generate an adapter from.")
    zoo.subset([task.name for task in tasks])  # or ZooError now, and not after minutes
    seen = set(generator.config.training_tasks or ())
    if not (seen_in_zoo := sorted(seen.intersection(zoo))):  # behavioural training sees more tasks than the zoo has
        raise ZooError(f"{zoo} holds none of the {len(seen)} tasks that the generator was trained on.")
    splits = {
        "seen": [task for task in tasks if task.name in seen],
        "unseen": [task for task in tasks if task.name not in seen],
    }
    seconds: dict[str, list[float]] = {"task_vector": [], "generation": [], "attachment": []}
    extractor, *other_extractors = (
        TaskVectorExtractor(TaskVectorSpec(**one.config.task_vector_spec)) for one in (generator, *others.values())
    )
    vectors = {}  # task name -> (num_draws, num_task_vectors, task_vector_size)
    for task in own_part(tasks):
        with _timed(seconds["task_vector"]):
            vectors[task.name] = extractor.vector(base_model, processing_class, task.demo[:num_examples])
    vectors = gathered(vectors)
    banks = zoo.task_vectors.banks
    rivals = Rivals(
        {name: zoo.lora_weights(name) for name in seen_in_zoo},
        {name: banks[name]["demonstrations"] for name in seen_in_zoo},
    )
    rows: dict[str, dict[str, dict[str, dict]]] = {split: {row: {} for row in chosen_rows} for split in splits}
    own_parts = {split: own_part(members) for split, members in splits.items()}
    total = sum(map(len, own_parts.values())) * len(chosen_rows)
    progress = tqdm(total=total, desc="Evaluating", disable=not logging.is_progress_bar_enabled())
    with _attachable(base_model, zoo) as (model, attach):
        for split, members in splits.items():
            for task in own_parts[split]:
                own, other = vectors[task.name], vectors[_another(task, members, tasks).name]
                with _timed(seconds["generation"]):
                    generated = generator.decode_task_vector(own).cpu()
                weights = {
                    "task_lora": zoo.lora_weights(task.name),
                    "generated": generated,
                    "wrong_condition": generator.decode_task_vector(other).cpu(),
                    "mean_lora": rivals.mean,
                    "nearest_lora": rivals.nearest(own, task.name),
                    "top_k_merge": rivals.top_k_merge(own, task.name),
                    "ridge": rivals.ridge(own),
                }
                examples = task.demo[:num_examples]
                example_loss = ExampleLoss(
                    model, processing_class, zoo.layout, zoo.shared_weights, examples, zoo.template
                )
                gain = example_loss.gain(generated)
                for row, given in (("description", None), ("both", examples)):
                    if row in more_rows:
                        vector = extractor.vector(model, processing_class, given, task.description)
                        weights[row] = generator.decode_task_vector(vector).cpu()
                if "scaled" in more_rows:
                    with _timed(seconds.setdefault("scaled", [])):
                        losses = example_loss.at_scales(generated)
                        weights["scaled"] = zoo.layout.scaled(generated, min(losses, key=losses.get))
                for name, other_extractor in zip(others, other_extractors, strict=True):
                    vector = other_extractor.vector(model, processing_class, examples)
                    weights[name] = others[name].decode_task_vector(vector).cpu()
                if "best_rival" in more_rows:
                    candidates = [zoo.layout.scaled(weights[row], s) for row in PLAIN_RIVALS for s in SCALES]
                    losses = example_loss(torch.stack(candidates)).tolist()
                    weights["best_rival"] = candidates[losses.index(min(losses))]
                if "fallback" in more_rows:
                    weights["fallback"] = torch.zeros_like(generated) if gain < 0 else generated
                if "noisy_nearest" in more_rows:
                    weights["noisy_nearest"] = rivals.noisy_nearest(generated, task.name)
                for row, start, rate in (
                    ("refined", generated, {}),
                    ("fine_tuned", zoo.layout.scaled(rivals.mean, 0.0), {"learning_rate": FINE_TUNE_RATE}),
                ):
                    if row in more_rows:
                        with _timed(seconds.setdefault(row, [])):
                            weights[row] = example_loss.refine(start, refine_steps, **rate)
                shown = "".join("".join(fill_template(sample, zoo.template)) for sample in examples)
                for row in chosen_rows:
                    context = shown if row == "few_shot_prompt" else ""
                    is_encoder_decoder = base_model.config.is_encoder_decoder
                    collate = CompletionCollator(processing_class, is_encoder_decoder, zoo.template, context, 1024)
                    if row in weights:
                        with _timed(seconds["attachment"]):
                            attach(weights[row])
                        rows[split][row][task.name] = _score(model, collate, task, batch_size)
                    else:
                        with frozen_base(model) as bare:
                            rows[split][row][task.name] = _score(bare, collate, task, batch_size)
                    progress.update()
                rows[split]["generated"][task.name] |= _weight_errors(generated, weights["task_lora"])
                rows[split]["generated"][task.name]["gain_on_examples"] = gain
                for row, own_weights in weights.items():
                    rows[split][row][task.name]["nearest_seen_distance"] = rivals.distance(own_weights, task.name)
    progress.close()
    for split, members in splits.items():
        for row in chosen_rows:
            scores = gathered(rows[split][row])
            rows[split][row] = {task.name: scores[task.name] for task in members}

    report = {
        **run_metadata(generator.config.task_vector_spec["seed"]),
        "num_examples": num_examples,
        "splits": {split: summarize(tables) for split, tables in rows.items() if tables["base"]},
        "storage": storage(generator, len(seen_in_zoo)),
        "seconds": {
            **{name: round(statistics.median(times), 4) for name, times in seconds.items() if times},
            "fine_tuning": round(statistics.mean(zoo.records[task.name].get("seconds", 0.0) for task in tasks), 2),
            "evaluation": round(time.perf_counter() - started, 1),
        },
    }
    if output_dir is not None and state().is_main_process:
        write_report(report, output_dir)
    return report


@contextmanager
def _attachable(base_model: nn.Module, zoo: LoraZoo):
    """Yield the base as a `PeftModel` and a function that puts packed weights into it; the base is restored after."""
    lora_config = canonical_lora_config(zoo.lora_config, zoo.layout.max_rank)

    def attach(lora_weights: torch.Tensor, model: nn.Module) -> PeftModel:
        return attach_adapter(model, lora_config, zoo.layout.unpack(lora_weights, zoo.shared_weights), "evaluation")

    with restored(base_model):
        model = attach(torch.zeros(zoo.layout.num_weights), base_model)
        try:
            yield model, partial(attach, model=model)
        finally:
            model.unload()


def _another(task: Task, members: Sequence[Task], tasks: Sequence[Task]) -> Task:
    """Choose the task whose vector is the wrong one: of the same split if it has two, half a list away.

    Neighbours in a list are often of one family, and alike.
    """
    others = members if len(members) > 1 else tasks
    return others[(others.index(task) + len(others) // 2) % len(others)]


class _timed:  # noqa: N801
    """Append the seconds spent in the `with` block to a list."""

    def __init__(self, times: list[float]):
        self.times = times

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.times.append(time.perf_counter() - self.start)


@torch.no_grad()
def _score(model: nn.Module, collate: CompletionCollator, task: Task, batch_size: int) -> dict[str, float]:
    loss, tokens, exact = 0.0, 0, 0
    samples = sorted(task.test, key=lambda sample: len(sample.prompt + sample.completion))  # little padding
    for start in range(0, len(samples), batch_size):
        scores = score_completions(model, collate(samples[start : start + batch_size]))
        loss, tokens = loss + scores.loss.sum().item(), tokens + scores.num_tokens.sum().item()
        exact += int(scores.exact.sum())
    return {"loss": loss / tokens, "exact_match": exact / len(task.test)}


def _weight_errors(generated: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Compare packed weights; with a frozen A this compares B @ A up to the metric that A gives."""
    return {
        "relative_error": ((generated - target).norm() / target.norm().clamp(min=1e-12)).item(),
        "cosine": nn.functional.cosine_similarity(generated, target, dim=0).item(),
    }
