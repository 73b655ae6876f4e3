"""A task: a name, an optional description, and samples in three splits that never overlap.

`train` fits the task's LoRA. `demo` is what a user would give: it feeds the task vector, the few-shot rivals and
the early stopping of the LoRA. `test` is scored and nothing else.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

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
        family (`str`, *optional*): Name shared by related tasks, or the kind of the task. Inputs are split once per
            family.
        descriptions (`Sequence[str]`, *optional*): The description in other words.
        labels (`Sequence[str]`, *optional*): The classes, for a classification: every completion is one of them.
        dataset (`str`, *optional*): The data set that the samples come from.
        license (`str`, *optional*): That of the samples.
        metadata (`Mapping[str, Any]`, *optional*): Whatever else is known of the task, as JSON values. Nothing in the
            package reads it.

    Raises:
        TaskError: if the name is empty, a sample is malformed or has an empty completion, all splits are empty, a
            prompt (for plain text, a completion) stands in two splits, a completion is none of the labels, or one of
            the further fields is not of its type.

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
    descriptions: Sequence[str] = ()
    labels: Sequence[str] | None = None
    dataset: str | None = None
    license: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

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
        self._check_what_else_is_known()

    def _check_what_else_is_known(self) -> None:
        for name in ("description", "family", "dataset", "license"):
            if not isinstance(found := getattr(self, name), str | None):
                raise TaskError(f"Task {self.name!r}, {name}: expected text, found {found!r:.200}.")
        object.__setattr__(self, "descriptions", self._texts("descriptions"))
        if self.labels is not None:
            object.__setattr__(self, "labels", self._texts("labels"))
            self._check_labels(self.labels)
        if not isinstance(self.metadata, Mapping):
            raise TaskError(f"Task {self.name!r}, metadata: expected a mapping, found {self.metadata!r:.200}.")
        if taken := sorted(FIELDS & self.metadata.keys()):
            raise TaskError(f"Task {self.name!r}, metadata: {', '.join(taken)} are fields of the task itself.")
        object.__setattr__(self, "metadata", dict(self.metadata))

    def _texts(self, name: str) -> tuple[str, ...]:
        texts = getattr(self, name)
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise TaskError(f"Task {self.name!r}, {name}: expected a sequence of texts, found {texts!r:.200}.")
        texts = tuple(texts)
        if wrong := [text for text in texts if not isinstance(text, str) or not text.strip()]:
            raise TaskError(f"Task {self.name!r}, {name}: expected texts, found {wrong[0]!r:.200}.")
        return texts

    def _check_labels(self, labels: Sequence[str]) -> None:
        known = set(labels)
        if len(known) != len(labels):
            raise TaskError(f"Task {self.name!r}, labels: expected every class once, found {labels}.")
        for split in SPLITS:
            for index, sample in enumerate(getattr(self, split)):
                if sample.completion not in known:
                    raise TaskError(
                        f"Task {self.name!r}, {split}[{index}]: {sample.completion!r:.100} is none of its labels "
                        f"{labels}. Add it to them, or leave `labels` out if this is no classification."
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


FIELDS = {own.name for own in fields(Task)} - {"metadata"}


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


def to_samples(raws: Iterable, where: str = "examples") -> list[Sample]:
    """Read samples in any of the accepted forms, each as [`to_sample`] does.

    Raises:
        TaskError: if this is one text or one mapping, and no sequence of samples; or as [`to_sample`].

    Example:
        >>> to_samples([("France", "Paris")])
        [Sample(prompt='France', completion='Paris')]
    """
    if isinstance(raws, (str, Mapping)) or not isinstance(raws, Iterable):
        raise TaskError(
            f"Expected {where} to be a sequence of samples, such as (prompt, completion) pairs, found {raws!r:.200}."
        )
    return [to_sample(raw, f"{where}[{index}]") for index, raw in enumerate(raws)]


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


def task_from_dataset(name: str, dataset: Mapping[str, Iterable], /, **others: Any) -> Task:
    """Make a task from a `datasets.DatasetDict` (or any mapping) with the splits `train`, `demo` and `test`.

    Args:
        name (`str`): Name of the task.
        dataset (`Mapping[str, Iterable[Mapping]]`): Split name -> rows with `prompt` and `completion`, or `text`.
        **others: All other fields of [`Task`], such as `description`, `family` and `labels`.

    Raises:
        TaskError: if a split has an unknown name, or a row is no sample.

    Example:
        >>> rows = [{"prompt": "France", "completion": "Paris"}]
        >>> task_from_dataset("capital", {"train": rows}, description="Name the capital.")
        Task('capital': 1 train, 0 demo, 0 test)
    """
    unknown = sorted(set(dataset) - set(SPLITS))
    if unknown:
        raise TaskError(
            f"Task {name!r}: expected only the splits {SPLITS}, found also {unknown}. Rename or drop them."
        )
    splits: dict[str, Any] = {split: list(dataset[split]) for split in SPLITS if split in dataset}
    return Task(name, **splits, **others)


def load_tasks(path: str | Path) -> list[Task]:
    """Read tasks from a JSON Lines file with one task per line; one whose name ends in `.gz` is compressed by gzip.

    A line is an object with the fields of [`Task`]: `{"name": ..., "description": ..., "train": [...], ...}`. What
    else it has becomes `metadata`, as `datasets` keeps the columns that it does not know.

    Raises:
        TaskError: if a line is not such an object (the message names the line), or a name stands twice.
        OSError: if the file cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        text = (gzip.decompress(content) if Path(path).suffix == ".gz" else content).decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: expected JSON Lines in UTF-8, by gzip if it ends in .gz: {error}") from error
    tasks = []
    for number, line in enumerate(text.split("\n"), start=1):  # text may hold U+2028
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise TaskError(f"found {found!r:.200}")
            further = {name: found.pop(name) for name in [*found] if name not in FIELDS}
            tasks.append(Task(**found, metadata=further))
        except (TypeError, ValueError) as error:  # JSONDecodeError and TaskError are ValueErrors
            raise TaskError(f"{path}, line {number}: expected one task as a JSON object: {error}") from error
    return check_unique_names(tasks)


def save_tasks(tasks: Iterable[Task], path: str | Path) -> None:
    """Write tasks as JSON Lines, one per line, so that [`load_tasks`] gives them back.

    Fields that are left at their defaults are not written; those of `metadata` stand beside the others. A file whose
    name ends in `.gz` is compressed by gzip.

    Raises:
        TaskError: if a name stands twice, or a task's metadata cannot be written as JSON.
    """
    content = "".join(map(_line, check_unique_names(tasks))).encode("utf-8")
    if Path(path).suffix == ".gz":
        content = gzip.compress(content, mtime=0)  # equal tasks, equal bytes
    with commit_file(path) as temporary:
        temporary.write_bytes(content)


def _line(task: Task) -> str:
    known = {own.name: getattr(task, own.name) for own in fields(task) if own.name in FIELDS}
    told = {name: value for name, value in known.items() if value not in (None, ())}
    try:
        return json.dumps({**told, **task.metadata}, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise TaskError(f"Task {task.name!r}, metadata: expected JSON values: {error}") from error
