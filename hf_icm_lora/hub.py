"""To the Hub and back: a repository gets all of its files in one commit, or none of them."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from peft import PeftModel

from .errors import IncompatibleAdapterError, PublishingError
from .files import stale_weights
from .model_card import adapter_card
from .provenance import LIBRARY, is_local

CARD_FILE = "README.md"


def push_files(
    files: Mapping[str, str | Path | bytes],
    repo_id: str,
    *,
    repo_type: str = "model",
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    keep_card: bool = True,
) -> CommitInfo:
    """Put files into a repository, made if there is none, in one commit.

    A model's weights that it holds under names that the new ones do not have are removed.

    Args:
        files (`Mapping`): Path in the repository -> a file, or its content.
        repo_id, repo_type, commit_message, commit_description, private, token, revision, create_pr: As in
            `huggingface_hub`; a branch that does not exist is made.
        keep_card (`bool`, *optional*, defaults to `True`): Whether a card that is there already stays.

    Returns:
        `CommitInfo`: a string, too: the commit's URL.

    Raises:
        HfHubHTTPError, HFValidationError: from `huggingface_hub`; the repository is then as it was, or empty.
    """
    api = HfApi(token=token, library_name=LIBRARY)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision and not revision.startswith("refs/pr/") and not create_pr:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    there = {entry.path for entry in api.list_repo_tree(repo_id, repo_type=repo_type, revision=revision)}
    if keep_card and CARD_FILE in there:
        files = {path: content for path, content in files.items() if path != CARD_FILE}
    stale = [CommitOperationDelete(path) for path in stale_weights(there, files)]
    return api.create_commit(
        repo_id,
        [*(CommitOperationAdd(path, content) for path, content in files.items()), *stale],
        commit_message=commit_message or "Upload with hf_icm_lora",
        commit_description=commit_description,
        repo_type=repo_type,
        revision=revision,
        create_pr=create_pr,
    )


def files_below(folder: str | Path) -> dict[str, Path]:
    """Return the files of a folder by their paths in it, for [`push_files`]."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def require_hub_id(base_model_name_or_path: str | None, what: str) -> None:
    """Refuse to publish what names a folder of this machine as its base model.

    Raises:
        PublishingError: if it does, or names nothing.
    """
    if not base_model_name_or_path or is_local(base_model_name_or_path):
        raise PublishingError(
            f"Expected a base model that others can load, found {base_model_name_or_path!r}, which is no id on the "
            f"Hub: {what}."
        )


def save_adapter_card(
    model: PeftModel,
    output_dir: str | Path,
    repo_id: str | None = None,
    tags: Sequence[str] = (),
    describe_task: bool = True,
) -> None:
    """Write the card of a model's generated adapters into a folder, in place of the one that PEFT writes there.

    Args:
        model (`PeftModel`): With adapters that `generate_adapter` made. The active one stands first in the card.
        output_dir (`str` or `Path`): The folder that `model.save_pretrained` wrote. If it holds some of the adapters,
            the card is of these.
        repo_id (`str`, *optional*): Where it will be on the Hub.
        tags (`Sequence[str]`, *optional*): More tags, for the card.
        describe_task (`bool`, *optional*, defaults to `True`): Whether the card holds description and examples.

    Raises:
        IncompatibleAdapterError: if no adapter of the model was generated.

    Example:
        >>> model.save_pretrained("capital-lora")  # doctest: +SKIP
        >>> save_adapter_card(model, "capital-lora")  # doctest: +SKIP
    """
    records = getattr(model, "lora_generation", {})
    known = [name for name in records if name in model.peft_config]
    saved = [name for name in known if _folder_of(name, output_dir).joinpath("adapter_config.json").exists()]
    there = {name: records[name].to_dict(describe_task) for name in saved or known}
    if not there:
        raise IncompatibleAdapterError(
            f"Expected a PeftModel with an adapter that generate_adapter made, found {list(model.peft_config)}."
        )
    first = model.active_adapter if model.active_adapter in there else next(iter(there))
    card = adapter_card(model.peft_config[first].to_dict(), {first: there[first], **there}, repo_id, tags)
    card.save(Path(output_dir) / CARD_FILE)


def _folder_of(adapter_name: str, output_dir: str | Path) -> Path:
    """Return where PEFT saves an adapter."""
    return Path(output_dir) if adapter_name == "default" else Path(output_dir) / adapter_name


def push_adapter(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = "Upload generated adapter",
    tags: Sequence[str] = (),
    describe_task: bool = True,
    **options,
) -> CommitInfo:
    """Push a model's adapters in one commit, with a card that says how they were made.

    Args:
        model (`PeftModel`): With adapters that `generate_adapter` made.
        repo_id, commit_message: As in [`push_files`].
        tags, describe_task (*optional*): As in [`save_adapter_card`].
        options: `commit_description`, `private`, `token`, `revision`, `create_pr`, as in [`push_files`].

    Returns:
        `CommitInfo`: a string, too: the commit's URL.

    Raises:
        IncompatibleAdapterError: if no adapter of the model was generated.
        PublishingError: if an adapter names a local folder as its base model.

    Example:
        >>> push_adapter(model, "user/capital-lora", private=True)  # doctest: +SKIP
    """
    for config in model.peft_config.values():
        require_hub_id(
            config.base_model_name_or_path, "set model.peft_config[adapter_name].base_model_name_or_path to one"
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)  # or PEFT asks the Hub for the base's vocabulary
        save_adapter_card(model, folder, repo_id, tags, describe_task)
        return push_files(files_below(folder), repo_id, commit_message=commit_message, **options)
