"""The stand-in for the Hub as the real clients see it: each `check_*` runs in a process that knows no other Hub."""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
from hub import LFS, Hub

FILES = {
    "README.md": b"---\nlicense: mit\n---\nHello\n",
    "model.safetensors": bytes(range(256)),
    "sub/deep/empty.txt": b"",
    "sub/model.safetensors": bytes(1000),
    "sub/notes.txt": b"notes",
}


def write(folder, files=FILES):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def uploaded(hub, repo_id, revision="main"):
    files = hub.repos["model", repo_id].files(revision)
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def commits(hub):
    return [path for method, path in hub.log if method == "POST" and "/commit/" in path]


def check_upload_and_download(hub, folder):
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    api, repo_id = HfApi(), "user/files"
    assert api.whoami()["name"] == "user"
    assert api.create_repo("files") == api.create_repo(repo_id, exist_ok=True) == f"{hub.url}/{repo_id}"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo_id)

    commit = api.upload_folder(repo_id=repo_id, folder_path=write(folder))
    assert uploaded(hub, repo_id) == FILES
    assert set(hub.blobs.values()) == {content for path, content in FILES.items() if path.endswith(LFS)}
    assert set(api.list_repo_files(repo_id)) == {".gitattributes", *FILES}
    assert [entry.path for entry in api.list_repo_tree(repo_id, "sub")] == [
        "sub/deep", "sub/model.safetensors", "sub/notes.txt"
    ]  # fmt: skip
    assert [entry.path for entry in api.get_paths_info(repo_id, ["sub", "README.md", "none"])] == ["sub", "README.md"]
    assert api.model_info(repo_id).sha == commit.oid
    assert FILES.items() <= read(snapshot_download(repo_id)).items()

    assert api.upload_folder(repo_id=repo_id, folder_path=folder).oid == commit.oid
    assert len(commits(hub)) == 1  # the files are the same
    api.delete_file("README.md", repo_id)
    api.delete_folder("sub", repo_id)
    assert set(uploaded(hub, repo_id)) == {"model.safetensors"}
    with pytest.raises(HfHubHTTPError, match="doesn't exist"):
        api.delete_file("README.md", repo_id)


def check_revisions(hub, folder):
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError

    api, repo_id = HfApi(), "user/revisions"
    api.create_repo(repo_id)
    first = api.model_info(repo_id).sha
    api.create_branch(repo_id, branch="dev")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo_id, branch="dev")
    api.upload_folder(repo_id=repo_id, folder_path=write(folder), revision="dev")
    pull = api.upload_file(repo_id=repo_id, path_or_fileobj=b"one", path_in_repo="one", create_pr=True)
    assert pull.pr_revision == "refs/pr/1"
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"two", path_in_repo="two", revision="refs/pr/1")

    assert uploaded(hub, repo_id) == {}
    assert uploaded(hub, repo_id, "dev") == FILES
    assert uploaded(hub, repo_id, "refs/pr/1") == {"one": b"one", "two": b"two"}
    assert Path(hf_hub_download(repo_id, "sub/notes.txt", revision="dev")).read_bytes() == b"notes"
    assert set(read(snapshot_download(repo_id, revision="refs/pr/1"))) == {".gitattributes", "one", "two"}
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    assert set(read(snapshot_download(repo_id, revision=first))) == {".gitattributes"}
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(repo_id, revision="none")
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id=repo_id, folder_path=folder, revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(repo_id, "none")


def check_who_may_do_what(hub, folder):
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    api = HfApi()
    for name in ("public", "private", "gated"):
        api.create_repo(name, private=name == "private")
        api.upload_file(repo_id=f"user/{name}", path_or_fileobj=b"mine", path_in_repo="file")
    hub.repos["model", "user/gated"].gated = True

    theirs = {"repo_id": "user/public", "path_or_fileobj": b"theirs", "path_in_repo": "file"}
    for token, hidden, forbidden in ((False, "401", "401"), ("hf_other", "404", "403")):
        with pytest.raises(RepositoryNotFoundError, match=hidden):
            api.model_info("user/private", token=token)
        with pytest.raises(RepositoryNotFoundError, match=hidden):
            hf_hub_download("user/private", "file", token=token)
        assert api.model_info("user/gated", token=token).gated
        with pytest.raises(GatedRepoError, match=forbidden):
            hf_hub_download("user/gated", "file", token=token)
        with pytest.raises(HfHubHTTPError, match=forbidden):
            api.upload_file(**theirs, token=token)
        with pytest.raises(HfHubHTTPError, match=forbidden):
            api.create_repo("user/theirs", token=token)
    assert api.upload_file(**theirs, token="hf_other", create_pr=True).pr_num == 1
    assert Path(hf_hub_download("user/private", "file")).read_bytes() == b"mine"
    assert Path(hf_hub_download("user/gated", "file")).read_bytes() == b"mine"
    assert uploaded(hub, "user/public") == {"file": b"mine"}


def check_failed_uploads_leave_nothing(hub, folder):
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import EntryNotFoundError

    api, repo_id = HfApi(), "user/interrupted"
    upload = {"repo_id": repo_id, "folder_path": write(folder)}
    api.create_repo("whole")
    hub.log.clear()
    hub.blobs.clear()
    api.upload_folder(**upload | {"repo_id": "user/whole"})
    requests = len(hub.log)
    api.create_repo(repo_id)
    for nth in range(1, requests + 1):
        hub.blobs.clear()
        hub.fail(nth=nth, status=403)  # at a status such as 500 the client waits and asks again
        with pytest.raises(Exception, match="403|Error while uploading"):
            api.upload_folder(**upload)
        assert uploaded(hub, repo_id) == {}
    assert "/commit/" in hub.log[-1][1]
    operations = [CommitOperationAdd("one", b"one"), CommitOperationDelete("none")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(repo_id, operations, commit_message="one fails")
    assert uploaded(hub, repo_id) == {}
    hub.fail("/commit/", status=None)
    with pytest.raises(Exception, match="disconnected"):
        api.upload_folder(**upload)
    assert uploaded(hub, repo_id) == {}

    hub.fail("/commit/", after=True)
    with pytest.raises(Exception, match="500"):
        api.upload_folder(**upload)
    assert uploaded(hub, repo_id) == FILES
    done = len(commits(hub))
    api.upload_folder(**upload)
    assert len(commits(hub)) == done


def check_models_and_adapters(hub, folder):
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    model.push_to_hub("user/llama", private=True)
    PreTrainedTokenizerFast(tokenizer_object=backend).push_to_hub("user/llama")
    base = AutoModelForCausalLM.from_pretrained("user/llama")
    assert torch.equal(base(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained("user/llama").get_vocab() == {"a": 0, "b": 1}
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained("user/llama", token="hf_other")

    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora).eval()
    adapted.push_to_hub("user/lora")
    assert "adapter_model.safetensors" in uploaded(hub, "user/lora")
    loaded = AutoPeftModelForCausalLM.from_pretrained("user/lora").eval()
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)
    assert not torch.equal(loaded(ids).logits, model(ids).logits)


def check_datasets(hub, folder):
    from datasets import Dataset, load_dataset
    from huggingface_hub import HfApi

    rows = [{"text": "one", "label": 1}, {"text": "two", "label": 2}]
    write(folder, {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    HfApi().create_repo("user/lines", repo_type="dataset")
    HfApi().upload_folder(repo_id="user/lines", folder_path=folder, repo_type="dataset")
    assert load_dataset("user/lines", split="train").to_list() == rows
    Dataset.from_list(rows).push_to_hub("user/table")
    assert load_dataset("user/table", split="train").to_list() == rows


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


def local_only(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        assert arguments[1][0] == "127.0.0.1", f"A client tried to connect to {arguments[1]}."


def main():
    """Run the checks and print the tracebacks of those that fail."""
    sys.addaudithook(local_only)
    tracebacks = {}
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        environment = hub.environment(Path(folder, "home"))
        os.environ.clear()
        os.environ.update(environment)
        for name, check in CHECKS.items():
            hub.log.clear()
            try:
                check(hub, Path(folder, name))
            except BaseException:
                tracebacks[name] = traceback.format_exc()
    print(json.dumps(tracebacks))


@pytest.fixture(scope="module")
def tracebacks():
    run = subprocess.run([sys.executable, __file__], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_real_clients(name, tracebacks):
    assert name not in tracebacks, tracebacks[name]


def test_a_client_in_another_process(tmp_path):
    code = "from huggingface_hub import HfApi; print(HfApi().create_repo('name', private=True))"
    with Hub() as hub:
        environment = hub.environment(tmp_path, token="hf_other")
        url = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE).stdout
        assert url.decode().strip() == f"{hub.url}/other/name"
        assert hub.log == [("POST", "/api/repos/create")]
        assert hub.repos["model", "other/name"].private


if __name__ == "__main__":
    main()
