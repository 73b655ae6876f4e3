"""What is told of a run: enough to repeat it, and nothing of the machine's owner."""

import importlib.metadata

import pytest

from hf_icm_lora.provenance import is_local, package_versions, public_arguments, run_metadata


def test_a_run_is_told_with_versions_machine_and_seed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/train.py", "--token=abc"])
    told = run_metadata(seed=7)
    assert told["command"] == "train.py --token=***"
    assert told["seed"] == 7
    assert told["machine"].keys() == {"processor", "system", "threads"}
    assert told["versions"]["peft"] == importlib.metadata.version("peft")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    def version(name):
        if name == "hf_icm_lora":
            raise importlib.metadata.PackageNotFoundError
        return "1.2.3"

    monkeypatch.setattr("importlib.metadata.version", version)
    found = package_versions()
    assert (found["hf_icm_lora"], found["transformers"]) == ("not installed", "1.2.3")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/home/me/train.py", "--zoo", "/data/my/zoo/"], ["train.py", "--zoo", "zoo"]),
        (["x", "--zoo=/data/zoo", "--out=~/out"], ["x", "--zoo=zoo", "--out=out"]),
        (["x", "--hub_token", "abc", "--seed", "1"], ["x", "--hub_token", "***", "--seed", "1"]),
        (["x", "--api_key=abc"], ["x", "--api_key=***"]),
        (["x", "--anything", "hf_abcdefghij"], ["x", "--anything", "***"]),
        (["x", "C:\\Users\\me\\zoo"], ["x", "zoo"]),
        (["x", "zoo/one", "user/name", "--lr", "1e-3"], ["x", "zoo/one", "user/name", "--lr", "1e-3"]),
    ],
)
def test_command_lines_are_told_without_paths_and_secrets(arguments, told):
    assert public_arguments(arguments) == told


def test_what_is_a_folder_and_what_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert all(map(is_local, ["base", "./x", "/x/y", str(tmp_path), "a/b/c"]))
    assert not any(map(is_local, ["gpt2", "user/name", "HuggingFaceTB/SmolLM2-135M-Instruct"]))
