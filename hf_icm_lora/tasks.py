"""A task: a name, an optional description, and samples in three splits that never overlap.

`train` fits the task's LoRA. `demo` is what a user would give: it feeds the task vector, the few-shot rivals and
the early stopping of the LoRA. `test` is scored and nothing else.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .errors import TaskError
from .files import commit_file


class Sample(NamedTuple):
    """One sample of a task: a prompt and the completion that is right for it.

    Args:
        prompt (`str`): What the model reads; empty for plain text.
        completion (`str`): What the model should write; the loss is taken here and nowhere else.
    """

    prompt: str
    completion: str


SPLITS = ("train", "demo", "test")


@dataclass(frozen=True)
class Task:
    """A task and its samples.

    Args:
        name (`str`): Unique within a zoo; any text, never used as a path.
        train (`Sequence`): Samples that fit the task's LoRA. A sample is a [`Sample`], a `(prompt, completion)` pair,
            a mapping with those keys (or `text` alone), or a plain string, which is a completion without a prompt.
        demo (`Sequence`): Samples for task vectors, few-shot prompts and early stopping.
        test (`Sequence`): Samples that are scored.
        description (`str`, *optional*): The task in a sentence of natural language.
        family (`str`, *optional*): Name shared by related tasks. Inputs are split once per family.

    Raises:
        TaskError: if the name is empty, a sample is malformed or has an empty completion, all splits are empty, or a
            prompt (for plain text, a completion) stands in two splits.

    Example:
        >>> Task("capital", train=[("France", "Paris")], demo=[("Japan", "Tokyo")], test=[("Kenya", "Nairobi")])
        Task('capital': 1 train, 1 demo, 1 test)
    """

    name: str
    train: Sequence[Sample] = ()
    demo: Sequence[Sample] = ()
    test: Sequence[Sample] = ()
    description: str | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise TaskError(f"A task needs a non-empty name, found {self.name!r}.")
        for split in SPLITS:
            raws = getattr(self, split)
            if isinstance(raws, (str, Mapping)) or not isinstance(raws, Iterable):
                raise TaskError(
                    f"Expected task {self.name!r}, {split} to be a sequence of samples, found {raws!r:.200}."
                )
            samples = tuple(to_sample(raw, f"task {self.name!r}, {split}[{index}]") for index, raw in enumerate(raws))
            object.__setattr__(self, split, samples)
        if not (self.train or self.demo or self.test):
            raise TaskError(f"Task {self.name!r} has no samples in any of its splits {SPLITS}.")
        split_of: dict[str, str] = {}
        for split in SPLITS:
            for sample in getattr(self, split):
                text = sample.prompt or sample.completion
                if split_of.setdefault(text, split) != split:
                    raise TaskError(
                        f"Task {self.name!r}: {text!r} stands in {split_of[text]!r} and in {split!r}, but splits must "
                        "not overlap. Remove it from one of them."
                    )

    def __repr__(self) -> str:
        return f"Task({self.name!r}: {len(self.train)} train, {len(self.demo)} demo, {len(self.test)} test)"

    def require(self, split: str, at_least: int, purpose: str) -> Sequence[Sample]:
        """Return the samples of a split, or say which task lacks what.

        Raises:
            TaskError: if the split holds fewer than `at_least` samples.
        """
        samples = getattr(self, split)
        if len(samples) < at_least:
            raise TaskError(
                f"Task {self.name!r} has {len(samples)} {split!r} samples, but {purpose} needs at least {at_least}."
            )
        return samples


def to_sample(raw: Sample | Mapping | Sequence[str] | str, where: str = "sample") -> Sample:
    """Read one sample in any of the accepted forms.

    Args:
        raw: A [`Sample`], a `(prompt, completion)` pair, a mapping with the keys `prompt` and `completion` or the
            key `text`, or a string (plain text).
        where (`str`): How an error message should call this sample.

    Raises:
        TaskError: if it is none of these, or the completion is empty.

    Example:
        >>> to_sample({"prompt": "France", "completion": "Paris"})
        Sample(prompt='France', completion='Paris')
    """
    if isinstance(raw, str):
        prompt, completion = "", raw
    elif isinstance(raw, Mapping) and "completion" in raw:
        prompt, completion = raw.get("prompt", ""), raw["completion"]
    elif isinstance(raw, Mapping) and "text" in raw:
        prompt, completion = "", raw["text"]
    elif isinstance(raw, (tuple, list)) and len(raw) == 2:
        prompt, completion = raw
    else:
        raise TaskError(
            f"Expected {where} to be a (prompt, completion) pair, a mapping with 'prompt' and 'completion' or with "
            f"'text', or a string; found {raw!r:.200}."
        )
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise TaskError(f"Expected {where} to hold text, found {type(prompt).__name__}, {type(completion).__name__}.")
    if not completion.strip():
        raise TaskError(f"Expected {where} to have a completion, found an empty one (prompt {prompt!r:.100}).")
    return Sample(prompt, completion)


def check_unique_names(tasks: Iterable[Task]) -> list[Task]:
    """Return the tasks as a list after checking that no name stands twice.

    Raises:
        TaskError: on the first repeated name.
    """
    tasks, seen = list(tasks), set()
    for task in tasks:
        if task.name in seen:
            raise TaskError(f"Two tasks are named {task.name!r}; names must be unique. Rename one of them.")
        seen.add(task.name)
    return tasks


def task_from_dataset(name: str, dataset, *, description: str | None = None, family: str | None = None) -> Task:
    """Make a task from a `datasets.DatasetDict` (or any mapping) with the splits `train`, `demo` and `test`.

    Args:
        name (`str`): Name of the task.
        dataset (`Mapping[str, Iterable[Mapping]]`): Split name -> rows with `prompt` and `completion`, or `text`.
        description (`str`, *optional*), family (`str`, *optional*): As in [`Task`].

    Raises:
        TaskError: if a split has an unknown name, or a row is no sample.

    Example:
        >>> rows = [{"prompt": "France", "completion": "Paris"}]
        >>> task_from_dataset("capital", {"train": rows})
        Task('capital': 1 train, 0 demo, 0 test)
    """
    unknown = sorted(set(dataset) - set(SPLITS))
    if unknown:
        raise TaskError(
            f"Task {name!r}: expected only the splits {SPLITS}, found also {unknown}. Rename or drop them."
        )
    splits = {split: list(dataset[split]) for split in SPLITS if split in dataset}
    return Task(name, **splits, description=description, family=family)


def load_tasks(path: str | Path) -> list[Task]:
    """Read tasks from a JSON Lines file with one task per line.

    A line is an object with the fields of [`Task`]: `{"name": ..., "description": ..., "train": [...], ...}`.

    Raises:
        TaskError: if a line is not such an object (the message names the line), or a name stands twice.
        OSError: if the file cannot be read.
    """
    tasks = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):  # text may hold U+2028
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            tasks.append(Task(**fields))
        except (TypeError, ValueError) as error:  # JSONDecodeError and TaskError are ValueErrors
            raise TaskError(f"{path}, line {number}: expected one task as a JSON object: {error}") from error
    return check_unique_names(tasks)


def save_tasks(tasks: Iterable[Task], path: str | Path) -> None:
    """Write tasks as JSON Lines, one per line, so that [`load_tasks`] gives them back."""
    lines = [json.dumps(task.__dict__, ensure_ascii=False) + "\n" for task in check_unique_names(tasks)]
    with commit_file(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
