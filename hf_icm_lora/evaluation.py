"""Evaluation: the generator against every plain rival, on seen and unseen tasks, in one run.

Each rival is a row: a function that makes, from what it is given of a task, the adapter or the prompt to be scored on
the task's test samples. To add one, write the function and name it in `ROWS` or `MORE_ROWS`. Its docstring is what
reports, `--help` and the pages say about it.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .adapter import AdapterSlot
from .base_model import frozen_base, require_bare, restored
from .behaviour import SCALES, ExampleLoss
from .completion import MOST_LABELS, CompletionCollator, label_accuracy, render, score_completions
from .errors import ArgumentError, IncompatibleAdapterError, TaskError, TaskVectorError, ZooError
from .generation import write_adapter
from .lora_config import canonical_lora_config
from .modeling_lora_generator import LoraGeneratorModel
from .processes import gathered, own_part, state
from .provenance import run_metadata
from .report import storage, summarize, write_report
from .rivals import Rivals
from .task_vectors import TaskVectorExtractor, TaskVectorSpec
from .tasks import Sample, Task, check_unique_names
from .zoo import LoraZoo

FINE_TUNE_RATE = 1e-2  # of the row fine_tuned: from B = 0 it has farther to go than from a generated adapter
MOST_TOKENS = 1024  # of a sample with the prompt before it, which loses its beginning first


@dataclass(frozen=True)
class Given:
    """What a row is given of a task: its examples, all models, the seen tasks' LoRAs, and no test sample.

    Args:
        name (`str`), description (`str`, *optional*): As in [`Task`].
        examples (`Sequence[Sample]`): The same for all rows.
        vector (`torch.Tensor` of shape `(num_draws, num_task_vectors, task_vector_size)`): Of the examples.
        wrong_examples (`Sequence[Sample]`): Those of another task.
        generator (`LoraGeneratorModel`): The one to be scored.
        base_model (`PeftModel`): The base, with an adapter that is off for everything a row calls.
        processing_class: Its tokenizer.
        zoo (`LoraZoo`): Seen tasks' LoRAs, and the task's own.
        rivals (`Rivals`): Of the seen tasks.
        refine_steps (`int`): Gradient steps of the rows that take some.
        seed (`int`): Of what a row draws.
    """

    name: str
    description: str | None
    examples: Sequence[Sample]
    vector: torch.Tensor
    wrong_examples: Sequence[Sample]
    generator: LoraGeneratorModel
    base_model: PeftModel
    processing_class: Any
    zoo: LoraZoo
    rivals: Rivals
    refine_steps: int
    seed: int

    @cached_property
    def generated(self) -> torch.Tensor:
        """The generated adapter `(num_weights,)`, which several rows start from."""
        return self.written_by(self.generator, self.examples)

    @cached_property
    def example_loss(self) -> ExampleLoss:
        """The base model's loss on the examples under an adapter."""
        layout, shared_weights = self.zoo.layout, self.zoo.shared_weights
        return ExampleLoss(
            self.base_model, self.processing_class, layout, shared_weights, self.examples, self.zoo.template
        )

    def written_by(
        self,
        generator: LoraGeneratorModel,
        examples: Sequence[Sample] = (),
        description: str | None = None,
    ) -> torch.Tensor:
        """Return what a generator writes from examples, a description, or both: `(num_weights,)`."""
        return write_adapter(
            generator, self.base_model, self.processing_class, examples, description, self.zoo.template
        )


# An adapter of the zoo's layout `(num_weights,)`, or the samples that the base reads before every prompt.
Row = Callable[[Given], torch.Tensor | Sequence[Sample]]


def base(given: Given) -> Sequence[Sample]:
    """The base model alone: G = 0."""
    return ()


def task_lora(given: Given) -> torch.Tensor:
    """The LoRA that was fine-tuned on the task, the oracle: G = 1."""
    return given.zoo.lora_weights(given.name)


def generated(given: Given) -> torch.Tensor:
    """The generator's adapter for the examples, at full strength."""
    return given.generated


def wrong_condition(given: Given) -> torch.Tensor:
    """The generator's adapter for the examples of another task."""
    return given.written_by(given.generator, given.wrong_examples)


def mean_lora(given: Given) -> torch.Tensor:
    """The mean of the seen tasks' LoRAs."""
    return given.rivals.mean


def nearest_lora(given: Given) -> torch.Tensor:
    """The LoRA of the seen task, not this one, whose task vector has the largest cosine."""
    return given.rivals.nearest(given.vector, given.name)


def top_k_merge(given: Given) -> torch.Tensor:
    """The LoRAs of the 4 nearest seen tasks, without this one, weighted by a softmax over cosine / temperature."""
    return given.rivals.top_k_merge(given.vector, given.name)


def ridge(given: Given) -> torch.Tensor:
    """What a kernel ridge regression from task vector to weights, over the seen tasks, predicts."""
    return given.rivals.ridge(given.vector)


def few_shot_prompt(given: Given) -> Sequence[Sample]:
    """The base model with the examples, in the template, before every prompt."""
    return given.examples


def description(given: Given) -> torch.Tensor:
    """The generator's adapter for the task's description alone."""
    return given.written_by(given.generator, description=given.description)


def both(given: Given) -> torch.Tensor:
    """The generator's adapter for description and examples."""
    return given.written_by(given.generator, given.examples, given.description)


def scaled(given: Given) -> torch.Tensor:
    """The generated adapter at that scale from 0 to 1 which has the least loss on the examples."""
    losses = given.example_loss.at_scales(given.generated)
    return given.zoo.layout.scaled(given.generated, min(losses, key=lambda scale: losses[scale]))


def best_rival(given: Given) -> torch.Tensor:
    """Of mean_lora, nearest_lora, top_k_merge and ridge, each at scales from 0 to 1, the one with the least loss on
    the examples."""
    known = [rival(given) for rival in PLAIN_RIVALS]
    candidates = torch.stack([given.zoo.layout.scaled(weights, scale) for weights in known for scale in SCALES])
    return candidates[given.example_loss(candidates).argmin()]


def refined(given: Given) -> torch.Tensor:
    """The generated adapter after `refine_steps` gradient steps on the examples."""
    return given.example_loss.refine(given.generated, given.refine_steps)


def fine_tuned(given: Given) -> torch.Tensor:
    """`refine_steps` gradient steps on the examples from B = 0, without a generator, at a learning rate of 1e-2."""
    nothing = given.zoo.layout.scaled(given.rivals.mean, 0.0)
    return given.example_loss.refine(nothing, given.refine_steps, learning_rate=FINE_TUNE_RATE)


def fallback(given: Given) -> torch.Tensor:
    """The generated adapter, or none where it makes the loss on the examples larger: `on_unfamiliar="base"`."""
    harmful = given.example_loss.gain(given.generated) < 0
    return torch.zeros_like(given.generated) if harmful else given.generated


def noisy_nearest(given: Given) -> torch.Tensor:
    """The seen LoRA nearest to the generated one, never the task's own, plus noise of the length of that distance."""
    return given.rivals.noisy_nearest(given.generated, given.name, given.seed)


def _by_name(*rows: Row) -> dict[str, Row]:
    return {row.__name__: row for row in rows}


PLAIN_RIVALS = (mean_lora, nearest_lora, top_k_merge, ridge)  # made of the seen tasks' LoRAs alone
NEED_DESCRIPTION = {"description", "both"}
ROWS = _by_name(base, task_lora, generated, wrong_condition, *PLAIN_RIVALS, few_shot_prompt)  # scored always
MORE_ROWS = _by_name(
    description, both, scaled, best_rival, refined, fine_tuned, fallback, noisy_nearest
)  # if asked for


def descriptions(rows: Mapping[str, Row]) -> dict[str, str]:
    """Return what each row is, in a sentence.

    Example:
        >>> descriptions(ROWS)["base"]
        'The base model alone: G = 0.'
    """
    return {name: " ".join((inspect.getdoc(row) or "").split()) for name, row in rows.items()}


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
    template: str | None = None,
    by_family: bool = False,
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
        num_examples (`int`, *optional*, defaults to 12): `demo` samples that every row is given, the same for all.
        more_rows (`Sequence[str]`, *optional*): Rows of `evaluation.MORE_ROWS` to score beside those of
            `evaluation.ROWS`.
        refine_steps (`int`, *optional*, defaults to 20): Gradient steps of the rows `refined` and `fine_tuned`.
        other_generators (`Mapping[str, LoraGeneratorModel]`, *optional*): More generators of the same layout and
            lora_A, scored on the same examples: row name -> generator.
        template (`str`, *optional*): What all rows are scored in, by default the zoo's template, in which adapters are
            made. What an adapter does only in the template that it was made in is worth little.
        by_family (`bool`, *optional*, defaults to `False`): Whether means are over families of equal weight, and not
            over tasks: for tasks of which some families have many.
        batch_size (`int`, *optional*, defaults to 32): Samples per forward pass.
        output_dir (`str` or `Path`, *optional*): Where to write `evaluation.json` and `evaluation.md`.

    Returns:
        `dict`: The report, as written to `evaluation.json`; [`format_report`] makes a table of it.

    Raises:
        IncompatibleAdapterError: if zoo, generators and base model do not belong together.
        TaskError: if there is no task, or one lacks samples or, for a row that reads it, a description; or if the
            template is none.
        TaskVectorError: if the zoo has no vector of demonstrations for a seen task.
        ArgumentError: if a further row is unknown, or another generator has the name of a row.
        ZooError: if a task has no LoRA in the zoo.

    Example:
        >>> report = evaluate_generator(generator, base, tokenizer, zoo, tasks)  # doctest: +SKIP
        >>> report["splits"]["unseen"]["generated"]["mean_recovered_accuracy"]  # doctest: +SKIP
        0.3106
    """
    started = time.perf_counter()
    others = dict(other_generators or {})
    rows = _chosen_rows(more_rows, others)
    _check_models(base_model, [generator, *others.values()], zoo)
    tasks = _checked_tasks(tasks, rows, zoo)
    template = template or zoo.template
    render(Sample("x", "y"), template, processing_class)  # or TaskError now
    seen = set(generator.config.training_tasks or ())
    rivals = _rivals_in(zoo, seen)
    splits = {
        "seen": [task for task in tasks if task.name in seen],
        "unseen": [task for task in tasks if task.name not in seen],
    }
    spec, vectors = _spec_of(generator), {}
    vector_seconds: list[float] = []
    for task in own_part(tasks):
        with _timed(vector_seconds):
            examples = task.demo[:num_examples]
            vectors[task.name] = TaskVectorExtractor(spec).vector(base_model, processing_class, examples)
    vectors = gathered(vectors)

    scores: dict[str, dict[str, dict[str, dict]]] = {}  # split -> row -> task -> what it scored
    with _slot(base_model, zoo) as slot:
        scorer = _Scorer(slot, rows, batch_size, template)
        for split, members in splits.items():
            scores[split] = {row: {} for row in rows}
            hidden = not logging.is_progress_bar_enabled()
            for task in tqdm(own_part(members), desc=f"Evaluating {split} tasks", disable=hidden):
                given = Given(
                    name=task.name,
                    description=task.description,
                    examples=task.demo[:num_examples],
                    vector=vectors[task.name],
                    wrong_examples=_another(task, members, tasks).demo[:num_examples],
                    generator=generator,
                    base_model=slot.model,
                    processing_class=processing_class,
                    zoo=zoo,
                    rivals=rivals,
                    refine_steps=refine_steps,
                    seed=spec.seed,
                )
                for row, score in scorer(given, task).items():
                    scores[split][row][task.name] = score
            for row in rows:
                of_all = gathered(scores[split][row])
                scores[split][row] = {task.name: of_all[task.name] for task in members}

    fine_tuning = statistics.mean(zoo.records[task.name].get("seconds", 0.0) for task in tasks)
    families = {task.name: task.family for task in tasks} if by_family else None
    report = {
        **run_metadata(spec.seed),
        "num_examples": num_examples,
        "template": template,
        "by_family": by_family,
        "rows": descriptions(rows),
        "splits": {split: summarize(scores[split], families) for split, members in splits.items() if members},
        "storage": storage(generator, len(rivals.names)),
        "seconds": {
            "task_vector": _median(vector_seconds),
            "rows": {row: _median(times) for row, times in scorer.seconds.items()},
            "attachment": _median(scorer.attachment_seconds),
            "fine_tuning": round(fine_tuning, 2),
            "evaluation": round(time.perf_counter() - started, 1),
        },
    }
    if output_dir is not None and state().is_main_process:
        write_report(report, output_dir)
    return report


def _chosen_rows(more_rows: Sequence[str], others: Mapping[str, LoraGeneratorModel]) -> dict[str, Row]:
    if unknown := sorted(set(more_rows) - set(MORE_ROWS)):
        raise ArgumentError(f"more_rows: expected some of {', '.join(MORE_ROWS)}; found {', '.join(unknown)}.")
    if taken := sorted({*ROWS, *MORE_ROWS} & others.keys()):
        raise ArgumentError(f"other_generators: {', '.join(taken)} are names of rows already. Choose other names.")
    chosen = {name: row for name, row in MORE_ROWS.items() if name in more_rows}
    return ROWS | chosen | {name: _row_of(other) for name, other in others.items()}


def _row_of(generator: LoraGeneratorModel) -> Row:
    def row(given: Given) -> torch.Tensor:
        """Another generator's adapter for the same examples."""
        return given.written_by(generator, given.examples)

    return row


def _check_models(base_model: nn.Module, generators: Sequence[LoraGeneratorModel], zoo: LoraZoo) -> None:
    for one in generators:
        if one.config.base_model_fingerprint != zoo.base_model_fingerprint or one.layout != zoo.layout:
            raise IncompatibleAdapterError(
                f"A generator ({one.layout.fingerprint[:12]}) and {zoo} ({zoo.layout.fingerprint[:12]}) differ in "
                "layout or base model. Use the zoo that the generator was trained on."
            )
        if one.zoo_normalizer.is_fitted and not torch.equal(one.shared_weights.cpu(), zoo.shared_weights):
            raise IncompatibleAdapterError(f"{zoo} has another lora_A than the zoo that a generator was trained on.")
    require_bare(base_model)
    generators[0].check_base_model(base_model)


def _checked_tasks(tasks: Sequence[Task], rows: Mapping[str, Row], zoo: LoraZoo) -> list[Task]:
    tasks = check_unique_names(tasks)
    if not tasks:
        raise TaskError("Expected at least one task to score, found none.")
    for task in tasks:
        task.require("demo", 2, "a task vector")
        task.require("test", 1, "a score")
        if not task.description and (needed := sorted(NEED_DESCRIPTION & rows.keys())):
            raise TaskError(f"Task {task.name!r} has no description, which the row {needed[0]} reads.")
    zoo.subset([task.name for task in tasks])  # or ZooError now, and not after minutes
    return tasks


def _rivals_in(zoo: LoraZoo, seen: set[str]) -> Rivals:
    names = sorted(seen.intersection(zoo))  # behavioural training sees more tasks than the zoo has
    if not names:
        raise ZooError(f"{zoo} holds none of the {len(seen)} tasks that the generator was trained on.")
    banks = zoo.task_vectors.banks
    if missing := [name for name in names if "demonstrations" not in banks.get(name, {})]:
        raise TaskVectorError(f"{zoo} has no task vectors of demonstrations for {missing[:3]}: extract them.")
    return Rivals(
        {name: zoo.lora_weights(name) for name in names}, {name: banks[name]["demonstrations"] for name in names}
    )


@contextmanager
def _slot(base_model: nn.Module, zoo: LoraZoo) -> Iterator[AdapterSlot]:
    """Yield a place in the base model that weights are written into; the base is as it was after that."""
    lora_config = canonical_lora_config(zoo.lora_config, zoo.layout.max_rank)
    with restored(base_model):
        slot = AdapterSlot(base_model, lora_config, zoo.layout, zoo.shared_weights, "evaluation")
        try:
            yield slot
        finally:
            slot.model.unload()


def _spec_of(generator: LoraGeneratorModel) -> TaskVectorSpec:
    return TaskVectorSpec(**(generator.config.task_vector_spec or {}))


def _another(task: Task, members: Sequence[Task], tasks: Sequence[Task]) -> Task:
    """Choose the task whose vector is the wrong one: of the same split if it has two, half a list away.

    Neighbours in a list are often of one family, and alike.
    """
    others = members if len(members) > 1 else tasks
    return others[(others.index(task) + len(others) // 2) % len(others)]


class _Scorer:
    """Make what each row scores for a task, score it on the task's test samples, and note how long making it took."""

    def __init__(self, slot: AdapterSlot, rows: Mapping[str, Row], batch_size: int, template: str):
        self.slot, self.rows, self.batch_size, self.template = slot, rows, batch_size, template
        self.seconds: dict[str, list[float]] = {row: [] for row in rows}
        self.attachment_seconds: list[float] = []

    def __call__(self, given: Given, task: Task) -> dict[str, dict[str, float]]:
        scores = {}
        for row, make in self.rows.items():
            with _timed(self.seconds[row]):
                made = make(given)
            if isinstance(made, torch.Tensor):
                with _timed(self.attachment_seconds):
                    self.slot.write(made)
                scores[row] = self._score(self.slot.model, given, task)
                scores[row]["nearest_seen_distance"] = given.rivals.distance(made, given.name)
            else:
                with frozen_base(self.slot.model) as bare:
                    scores[row] = self._score(bare, given, task, made)
        # With a frozen A, comparing weights compares B @ A up to the metric that A gives.
        own, target = given.generated, given.zoo.lora_weights(given.name)
        scores["generated"]["relative_error"] = ((own - target).norm() / target.norm().clamp(min=1e-12)).item()
        scores["generated"]["cosine"] = F.cosine_similarity(own, target, dim=0).item()
        scores["generated"]["gain_on_examples"] = given.example_loss.gain(own)
        return scores

    @torch.no_grad()
    def _score(self, model: nn.Module, given: Given, task: Task, examples: Sequence[Sample] = ()) -> dict[str, float]:
        is_encoder_decoder, template = given.base_model.config.is_encoder_decoder, self.template
        collate = CompletionCollator(
            given.processing_class, is_encoder_decoder, template, examples, max_length=MOST_TOKENS
        )
        loss, tokens, exact = 0.0, 0, 0
        samples = sorted(task.test, key=lambda sample: len(sample.prompt + sample.completion))  # little padding
        for start in range(0, len(samples), self.batch_size):
            scores = score_completions(model, collate(samples[start : start + self.batch_size]))
            loss += scores.loss.sum().item()
            tokens += int(scores.num_tokens.sum())
            exact += int(scores.exact.sum())
        found = {"loss": loss / tokens, "exact_match": exact / len(samples)}
        if task.labels and 2 <= len(task.labels) <= MOST_LABELS:
            found["label_accuracy"] = label_accuracy(model, collate, samples, task.labels, self.batch_size)
        return found


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds spent in the `with` block to a list."""
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def _median(seconds: Sequence[float]) -> float | None:
    """Return `None` of nothing: of several processes, one may have no task to take the time of."""
    return round(statistics.median(seconds), 4) if seconds else None
