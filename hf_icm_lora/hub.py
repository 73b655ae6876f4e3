"""To the Hub and back: a repository gets all of its files in one commit, or none of them."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from peft import PeftModel

from .errors import IcmLoraError
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
        IcmLoraError: if it does, or names nothing.
    """
    if not base_model_name_or_path or is_local(base_model_name_or_path):
        raise IcmLoraError(
            f"Expected a base model that others can load, found {base_model_name_or_path!r}, which is no id on the "
            f"Hub: {what}."
        )


def carry_card(model: PeftModel) -> None:
    """Make a `PeftModel` save and push generated adapters with a card that says so, instead of PEFT's."""
    # On the object, since the class is PEFT's own, one of several, and users check for it.
    model.create_or_update_model_card = save_adapter_card.__get__(model)
    model.save_pretrained = save_adapters.__get__(model)
    model.push_to_hub = push_adapter.__get__(model)


def save_adapters(model: PeftModel, save_directory: str | Path, save_embedding_layers: bool = False, **kwargs) -> None:
    """Save as `PeftModel.save_pretrained` does, but without asking the Hub about the base model's vocabulary."""
    type(model).save_pretrained(model, save_directory, save_embedding_layers=save_embedding_layers, **kwargs)


def save_adapter_card(
    model: PeftModel, output_dir: str | Path, repo_id: str | None = None, tags: Sequence[str] = ()
) -> None:
    """Write the card of a model's generated adapters into a folder, the active one first."""
    there = {name: about for name, about in model.lora_generation.items() if name in model.peft_config}
    if not there:  # all of them were deleted meanwhile
        return
    first = model.active_adapter if model.active_adapter in there else next(iter(there))
    generated = {first: there[first], **there}
    card = adapter_card(model.peft_config[first].to_dict(), generated, repo_id, tags)
    card.save(Path(output_dir) / CARD_FILE)


def push_adapter(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = "Upload generated adapter",
    tags: Sequence[str] | None = None,
    **options,
) -> CommitInfo:
    """Push a model's adapters, as its `save_pretrained` writes them, with a card that says how they were made.

    Args:
        repo_id, commit_message: As in [`push_files`].
        tags (`Sequence[str]`, *optional*): More tags, for the card.
        options: `commit_description`, `private`, `token`, `revision`, `create_pr`, as in [`push_files`].

    Raises:
        IcmLoraError: if an adapter names a local folder as its base model.
    """
    for config in model.peft_config.values():
        require_hub_id(
            config.base_model_name_or_path, "set model.peft_config[adapter_name].base_model_name_or_path to one"
        )
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(model, folder)
        save_adapter_card(model, folder, repo_id, tags or ())
        return push_files(files_below(folder), repo_id, commit_message=commit_message, **options)
