"""A zoo: many adapters of one base model and one layout on disk, with their tasks' vectors.

    zoo.json                                  base model, LoRA configuration, layout, template; written once
    task_vectors.safetensors                  see task_vectors.py
    adapters/<task>/                          one task, which appears by one rename
    adapters/<task>/step-40/                  one snapshot: an ordinary PEFT folder
    adapters/<task>/task.json                 its best snapshot, losses, seconds
    collection.log                            what happened when; see collection.py

An interrupted process leaves nothing but a folder whose name starts with `.tmp-`. Folders may be no symbolic links,
or a zoo could lead to files outside of it; files may, since the Hub's cache consists of them.
"""

import copy
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, hf_hub_download, snapshot_download
from tqdm.auto import tqdm

from .adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    save_adapter,
)
from .errors import (
    AlreadyExistsError,
    ArgumentError,
    CorruptAdapterError,
    CorruptFileError,
    IncompatibleAdapterError,
    TaskVectorError,
    ZooError,
)
from .files import (
    TEMPORARY,
    commit_directory,
    locked,
    read_json,
    safe_dirname,
    write_json,
)
from .hub import push_files, require_hub_id
from .layout import LoraLayout
from .lora_config import check_plain_lora, lora_config_to_dict
from .model_card import zoo_card
from .task_vectors import MODES, TaskVectors
from .training_data import LoraZooDataset

FORMAT_VERSION = 1
FIELDS = ("layout", "lora_config", "template", "base_model_name_or_path", "base_model_fingerprint")  # of zoo.json
ZOO_FILE, VECTORS_FILE, TASK_FILE = "zoo.json", "task_vectors.safetensors", "task.json"


class LoraZoo:
    """A zoo directory, or some of its tasks.

    Args:
        path (`str` or `Path`): The directory. Complete tasks are found when it is opened.
        tasks (`Iterable[str]`, *optional*): Names to keep; all by default.

    Raises:
        ZooError: if there is no zoo, it is of a newer version, a folder of it is a symbolic link, or a named task is
            not in it.

    Example:
        >>> zoo = LoraZoo("zoo")  # doctest: +SKIP
        >>> seen, unseen = zoo.subset(["capital"]), zoo.subset(["currency"])  # doctest: +SKIP
        >>> seen.as_dataset()[0]["lora_weights"].shape  # doctest: +SKIP
        torch.Size([184320])
    """

    def __init__(self, path: str | Path, tasks: Iterable[str] | None = None):
        self.path = Path(path)
        _refuse_links(self.path, self.path / "adapters")
        self.about = _read_json(self.path / ZOO_FILE, "a zoo")
        if (version := self.about.get("format_version")) != FORMAT_VERSION:
            raise ZooError(
                f"{self.path}: expected format version {FORMAT_VERSION}, found {version!r:.200}. If that is newer "
                "than this package, upgrade hf_icm_lora."
            )
        if missing := [field for field in FIELDS if field not in self.about]:
            raise ZooError(f"{self.path / ZOO_FILE}: expected the fields {FIELDS}, found no {missing}.")
        for field, kind in (("lora_config", dict), *((name, str) for name in FIELDS[2:])):
            if not isinstance(self.about[field], kind):
                raise ZooError(f"{self.path / ZOO_FILE}: {field}: found {self.about[field]!r:.200}.")
        check_plain_lora(self.about["lora_config"])
        self.layout = LoraLayout.from_dict(self.about["layout"])
        self.lora_config: dict[str, Any] = self.about["lora_config"]
        self.template: str = self.about["template"]
        self.base_model_name_or_path: str = self.about["base_model_name_or_path"]
        self.base_model_fingerprint: str = self.about["base_model_fingerprint"]
        complete = {}
        for file in sorted(self.path.glob(f"adapters/*/{TASK_FILE}")):
            if not file.parent.name.startswith(TEMPORARY):
                record = _read_record(file)
                complete[record["name"]] = record | {"folder": file.parent}
        names = sorted(complete) if tasks is None else list(tasks)
        if unknown := [name for name in names if name not in complete]:
            raise ZooError(f"{self.path} has no complete task {unknown[:3]}; it has {sorted(complete)[:10]}.")
        self.records: dict[str, dict[str, Any]] = {name: complete[name] for name in names}
        self.remote: dict[str, Any] | None = None  # of a streamed zoo: where its adapters are

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        layout: LoraLayout,
        lora_config: Mapping[str, Any],
        base_model_name_or_path: str,
        base_model_fingerprint: str,
        template: str,
    ) -> "LoraZoo":
        """Make a new zoo, or open one that was made for the same things.

        Raises:
            ZooError: if a zoo stands there that differs; the message names the first difference.
        """
        path = Path(path)
        _refuse_links(path)
        about = {
            "format_version": FORMAT_VERSION,
            "base_model_name_or_path": base_model_name_or_path,
            "base_model_fingerprint": base_model_fingerprint,
            "lora_config": lora_config_to_dict(lora_config),
            "template": template,
            "layout": layout.to_dict(),
        }
        path.mkdir(parents=True, exist_ok=True)
        # Listed before zoo.json is looked for, since another process may be making the same zoo.
        is_empty = all(entry.name.startswith(TEMPORARY) for entry in path.iterdir())
        if not (path / ZOO_FILE).exists():
            if not is_empty:
                raise ZooError(
                    f"{path} is neither empty nor a zoo: expected {ZOO_FILE} in it. Choose another directory."
                )
            write_json(path / ZOO_FILE, about)
        zoo = cls(path)
        for field in ("base_model_fingerprint", "lora_config", "template", "layout"):
            if zoo.about[field] != about[field]:
                raise ZooError(
                    f"{path} is a zoo with another {field}: expected {str(about[field])[:200]}, found "
                    f"{str(zoo.about[field])[:200]}. Choose another directory, or the zoo's own settings."
                )
        return zoo

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        tasks: Iterable[str] | None = None,
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        local_dir: str | Path | None = None,
        streaming: bool = False,
    ) -> "LoraZoo":
        """Download a zoo that [`~LoraZoo.push_to_hub`] uploaded.

        Args:
            repo_id (`str`): A dataset repository on the Hub.
            tasks (`Iterable[str]`, *optional*): As in `LoraZoo`; only these are downloaded.
            revision (`str`, *optional*): Branch, tag or commit.
            token (`bool` or `str`, *optional*): As in `huggingface_hub`.
            local_dir (`str` or `Path`, *optional*): Where to put it, for a zoo that is to be changed; by default into
                the Hub's cache.
            streaming (`bool`, *optional*, defaults to `False`): Whether adapters stay on the Hub, each to be fetched
                when it is read, and not kept: for zoos larger than the disk. It is then for reading only.

        Raises:
            ZooError: if the repository is no zoo.
            ArgumentError: if a zoo is to be streamed and to have a `local_dir`.
            RepositoryNotFoundError, GatedRepoError, LocalEntryNotFoundError and others: from `huggingface_hub`.

        Example:
            >>> zoo = LoraZoo.from_hub("user/my-zoo")  # doctest: +SKIP
        """
        if streaming and local_dir is not None:
            raise ArgumentError("A zoo is either streamed or downloaded into a local_dir: pass one of the two.")
        names = None if tasks is None else list(tasks)
        files = [ZOO_FILE, VECTORS_FILE]
        for folder in ["*"] if names is None else map(safe_dirname, names):
            files += [f"adapters/{folder}/{TASK_FILE}", f"adapters/{folder}/step-*/{CONFIG_FILE}"]
            files += [] if streaming else [f"adapters/{folder}/step-*/{WEIGHTS_FILE}"]
        path = snapshot_download(
            repo_id, repo_type="dataset", revision=revision, token=token, local_dir=local_dir, allow_patterns=files
        )
        if not Path(path, ZOO_FILE).exists():
            raise ZooError(f"The dataset repository {repo_id!r} is no zoo: expected {ZOO_FILE} in it.")
        zoo = cls(path, names)
        if streaming:  # a snapshot is named after its commit
            zoo.remote = {"repo_id": repo_id, "repo_type": "dataset", "revision": Path(path).name, "token": token}
        return zoo

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model_name_or_path: str | None = None,
        license: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload the complete tasks, their vectors, a table of them and a card to a dataset repository, in one commit.

        Args:
            repo_id (`str`): The repository.
            base_model_name_or_path (`str`, *optional*): The base model's id on the Hub, for a zoo that was made from a
                local copy of it.
            license (`str`, *optional*): For the card, as the Hub names it.
            commit_message, commit_description, private, token, revision, create_pr: As in `push_to_hub` of models.

        Returns:
            `CommitInfo`: a string, too: the commit's URL.

        Raises:
            ZooError: if there is no task to upload.
            PublishingError: if the base model is a local folder.
        """
        if not self.records:
            raise ZooError(f"{self.path}: no complete task to upload.")
        if self.remote:
            raise ZooError(f"{self.path}: a streamed zoo is for reading; without streaming it can be uploaded.")
        base = base_model_name_or_path or self.base_model_name_or_path
        require_hub_id(base, "pass its id as base_model_name_or_path")
        rename = {"base_model_name_or_path": base}
        table = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.task_table())
        card = zoo_card(self, repo_id=repo_id, base_model_name_or_path=base, license=license)
        files: dict[str, str | Path | bytes] = {
            "README.md": card.content.encode(),
            "tasks.jsonl": table.encode(),
            ZOO_FILE: _as_json(self.about | rename),
        }
        if self.has_task_vectors:
            files[VECTORS_FILE] = self.path / VECTORS_FILE
        for record in self.records.values():
            folder: Path = record["folder"]
            snapshots = [file for step in record["snapshots"] for file in (folder / f"step-{step}").iterdir()]
            for file in [folder / TASK_FILE, *snapshots]:
                renamed = _as_json(_read_json(file, "an adapter") | rename) if file.name == CONFIG_FILE else file
                files[file.relative_to(self.path).as_posix()] = renamed
        return push_files(
            files,
            repo_id,
            repo_type="dataset",
            commit_message=commit_message or f"Upload a zoo of {len(self)} adapters",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    def task_table(self) -> list[dict[str, Any]]:
        """Return one row per task: its name, family and description, and how its LoRA was fine-tuned."""
        return [
            {
                "name": name,
                "family": record.get("family"),
                "description": record.get("description"),
                "best_step": record["best_step"],
                "snapshots": record["snapshots"],
                "validation_loss": record.get("validation_losses", {}).get(str(record["best_step"])),
                "seconds": record.get("seconds"),
                "folder": f"adapters/{record['folder'].name}",
            }
            for name, record in self.records.items()
        ]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __contains__(self, name: str) -> bool:
        return name in self.records

    def __repr__(self) -> str:
        return f"LoraZoo({str(self.path)!r}: {len(self)} tasks, {self.layout.num_weights:,} weights per adapter)"

    def subset(self, tasks: Iterable[str]) -> "LoraZoo":
        """Return the same zoo restricted to some tasks, in the given order."""
        names = list(tasks)
        if not self.records.keys() >= set(names):  # perhaps complete by now
            return LoraZoo(self.path, names)
        subset = copy.copy(self)
        subset.records = {name: self.records[name] for name in names}
        return subset

    def task_folder(self, name: str) -> Path:
        """Return where a task's snapshots stand, complete or not."""
        return self.path / "adapters" / safe_dirname(name)

    def holds(self, name: str) -> bool:
        """Whether a task is complete in the directory by now, also if another process added it."""
        return (self.task_folder(name) / TASK_FILE).exists()

    def add(self, name: str, snapshots: Mapping[int, Mapping[str, torch.Tensor]], **record: Any) -> None:
        """Add a task with its snapshots; it counts as complete when this returns, and not at all if it fails.

        Of several processes that add one task, the first wins.

        Args:
            name (`str`): Name of the task.
            snapshots (`Mapping[int, Mapping]`): Training step -> PEFT state dict.
            record: What else `task.json` should say, such as `best_step`, which defaults to the last one.

        Raises:
            AlreadyExistsError: if the task is complete already.
            ZooError: if there is no snapshot, or none of `best_step`.
            IncompatibleAdapterError, CorruptAdapterError: if a snapshot has another layout, or values that are not
                finite.
        """
        folder = self.task_folder(name)
        held = f"{self.path} already holds the task {name!r}: {folder.name} exists in it."
        if folder.exists():
            raise AlreadyExistsError(held)
        if not snapshots:
            raise ZooError(f"Task {name!r} needs at least one snapshot, found none.")
        record = {"name": name, "snapshots": sorted(snapshots), "best_step": max(snapshots)} | record
        if record["best_step"] not in snapshots:
            raise ZooError(f"Task {name!r} has no snapshot of its best step {record['best_step']}.")
        expected = self.shared_weights if self.records else None
        for step, state_dict in snapshots.items():
            _, shared = self.layout.pack(state_dict, self.lora_config)
            expected = shared if expected is None else expected
            if not torch.equal(shared, expected):
                raise IncompatibleAdapterError(
                    f"Task {name!r}, step {step}: lora_A differs from the zoo's, but gauge {self.layout.gauge!r} "
                    "means one A for all adapters."
                )
        config = self.lora_config | {"base_model_name_or_path": self.base_model_name_or_path, "inference_mode": True}
        try:
            with commit_directory(folder) as temporary:
                for step, state_dict in snapshots.items():
                    save_adapter(temporary / f"step-{step}", config, state_dict)
                write_json(temporary / TASK_FILE, record)
        except AlreadyExistsError as error:
            raise AlreadyExistsError(held) from error
        self.records[name] = _read_record(folder / TASK_FILE) | {"folder": folder}

    @contextmanager
    def claimed(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Claim a task while it is worked on, so that other processes leave it alone; it ends when the process does.

        Args:
            name (`str`): Name of the task.
            wait (`bool`, *optional*, defaults to `False`): Whether to wait until nobody else has claimed it.

        Yields:
            `bool`: whether it is free for this process.
        """
        folder = self.task_folder(name)
        folder.parent.mkdir(exist_ok=True)
        with locked(folder.with_name(f"{TEMPORARY}lock-{folder.name}"), wait) as free:
            yield free

    @cached_property
    def shared_weights(self) -> torch.Tensor:
        """The weights that all adapters share, `(num_shared_weights,)`."""
        name = next(iter(self.records))
        return self.layout.pack(self.load_snapshot(name), self.lora_config)[1]

    def load_snapshot(self, name: str, step: int | None = None) -> dict[str, torch.Tensor]:
        """Read one snapshot as a PEFT state dict.

        Args:
            name (`str`): Name of the task.
            step (`int`, *optional*): Its training step; the one with the least validation loss by default.

        Raises:
            CorruptAdapterError, IncompatibleAdapterError: as `load_adapter`.
        """
        record = self.records[name]
        folder = record["folder"] / f"step-{record['best_step'] if step is None else step}"
        if self.remote is None:
            return load_adapter(folder)[1]
        with tempfile.TemporaryDirectory() as temporary:
            file = f"{folder.relative_to(self.path).as_posix()}/{WEIGHTS_FILE}"
            fetched = Path(hf_hub_download(filename=file, local_dir=temporary, tqdm_class=_NoBar, **self.remote))
            shutil.copy(folder / CONFIG_FILE, fetched.parent)
            return load_adapter(fetched.parent)[1]

    def lora_weights(self, name: str, step: int | None = None) -> torch.Tensor:
        """Read one snapshot as a packed vector `(num_weights,)`."""
        lora_weights, shared = self.layout.pack(self.load_snapshot(name, step), self.lora_config)
        if not torch.equal(shared, self.shared_weights):
            raise CorruptAdapterError(f"{self.records[name]['folder']}: its lora_A is not the zoo's.")
        return lora_weights

    def add_task_vectors(self, vectors: TaskVectors) -> None:
        """Store the vectors of the zoo's tasks, in place of older ones.

        Those of tasks that `vectors` lacks are kept if they were made in the same way. If not, they are dropped, and
        since one zoo has one way, that is refused if the directory holds LoRAs of those tasks.

        Raises:
            TaskVectorError: if they were made by another base model or with another template, or lack a task.
        """
        if vectors.base_model_fingerprint != self.base_model_fingerprint:
            raise TaskVectorError(
                f"The task vectors come from the base model {vectors.base_model_fingerprint[:12]}, the zoo's adapters "
                f"are for {self.base_model_fingerprint[:12]} ({self.base_model_name_or_path})."
            )
        if vectors.spec.template != self.template:
            raise TaskVectorError(
                f"Expected task vectors with the zoo's template {self.template!r}, found {vectors.spec}."
            )
        if missing := [name for name in self.records if name not in vectors.banks]:
            raise TaskVectorError(f"There are no task vectors for {missing[:3]}.")
        if self.has_task_vectors:
            stored = self.task_vectors
            others = {name: bank for name, bank in stored.banks.items() if name not in vectors.banks}
            if stored.spec == vectors.spec:
                vectors = dataclasses.replace(vectors, banks={**others, **vectors.banks})
            elif lost := sorted(others.keys() & LoraZoo(self.path).records.keys()):
                raise TaskVectorError(
                    f"{self.path} holds vectors of {lost[:3]} that were made with {stored.spec}; found new ones "
                    f"without these tasks, made with {vectors.spec}. Extract the vectors of all tasks of the zoo."
                )
        vectors.save(self.path / VECTORS_FILE)

    @property
    def has_task_vectors(self) -> bool:
        """Whether vectors were added."""
        return (self.path / VECTORS_FILE).exists()

    @property
    def task_vectors(self) -> TaskVectors:
        """The zoo's task vectors.

        Raises:
            ZooError: if none were added yet.
        """
        if not self.has_task_vectors:
            raise ZooError(f"{self.path} has no task vectors yet: call add_task_vectors(extractor.extract(...)).")
        return TaskVectors.load(self.path / VECTORS_FILE)

    def as_dataset(self, modes: Sequence[str] = MODES, num_snapshots: int | None = None) -> LoraZooDataset:
        """Return the zoo's tasks as a dataset for [`LoraGeneratorTrainer`].

        Args:
            modes (`Sequence[str]`, *optional*): Which task vectors to use: from `"demonstrations"`, from `"both"`
                demonstrations and the description, from the `"description"` alone.
            num_snapshots (`int`, *optional*): Latest snapshots of each task to use; 1 is the best one alone; all by
                default.
        """
        return LoraZooDataset(self, modes, num_snapshots)


class _NoBar(tqdm):
    """No progress bar for each of many files."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"disable": True})


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise ZooError(f"{path.parent} is not {what}: {path.name} is missing.") from error
    except CorruptFileError as error:
        raise ZooError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise ZooError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def _read_record(file: Path) -> dict[str, Any]:
    record = _read_json(file, "a task record")
    name, steps, best = (record.get(field) for field in ("name", "snapshots", "best_step"))
    # Numbers, since they become parts of paths.
    numbers = [best, *steps] if isinstance(steps, list) else []
    if not isinstance(name, str) or best not in numbers[1:] or not all(type(step) is int for step in numbers):
        raise ZooError(
            f"{file}: expected a name, snapshots as whole numbers, and one of them as best_step; found "
            f"{str({'name': name, 'snapshots': steps, 'best_step': best})[:200]}."
        )
    _refuse_links(file.parent, *(file.parent / f"step-{step}" for step in numbers))
    return record


def _refuse_links(*folders: Path) -> None:
    for folder in folders:
        if folder.is_symlink():
            raise ZooError(
                f"{folder} is a symbolic link to {folder.resolve()}: expected a folder. Open the zoo where it really "
                "is, or copy what the link leads to."
            )
