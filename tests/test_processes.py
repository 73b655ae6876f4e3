"""Processes that were launched together: they share work, or leave each other alone."""

import os

import pytest
import torch
from conftest import make_tasks

from hf_icm_lora import TaskVectorExtractor, TaskVectorSpec, TrainingError, task_vectors
from hf_icm_lora.processes import gathered, leave_group, own_part


@pytest.fixture
def launched(monkeypatch):
    """The environment of the second of two processes, which may be changed."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)


@pytest.mark.parametrize(("visible", "own"), [(None, "1"), ("4,6", "6")])
def test_a_process_that_leaves_has_one_device_and_no_group(launched, monkeypatch, visible, own):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    leave_group()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & set(os.environ)


def test_a_process_of_its_own_has_nothing_to_leave(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = dict(os.environ)
    leave_group()
    assert dict(os.environ) == before


def test_a_device_in_use_cannot_be_left(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(TrainingError, match="before a device or a process group is used"):
        leave_group()


def test_one_process_does_everything():
    assert own_part(["a", "b", "c"]) == ["a", "b", "c"]
    assert gathered({"a": 1}) == {"a": 1}


def test_a_process_without_a_task_gets_the_vectors_of_the_others(monkeypatch, llama, tokenizer):
    tasks, extractor = make_tasks(1), TaskVectorExtractor(TaskVectorSpec(num_draws=2))
    expected = extractor.extract(llama, tokenizer, tasks).banks
    monkeypatch.setattr(task_vectors, "own_part", lambda items: [])
    monkeypatch.setattr(task_vectors, "gathered", lambda part: {**part, **expected})
    assert extractor.extract(llama, tokenizer, tasks).banks == expected
