"""Processes: killed, interrupted, out of disk, several at once. Names are the ids of docs/source/reliability.md.

Faults are real ones in child processes where that is cheap: SIGKILL, SIGINT, a limit on the size of files.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    files,
    make_llama,
    make_tasks,
    odd_base,
    save_base_and_tasks,
    state_of,
    training_arguments,
)
from peft import LoraConfig
from safetensors.torch import load_file
from test_zoo import ABOUT, make_state_dict

import hf_icm_lora.collection
import hf_icm_lora.zoo
from hf_icm_lora import (
    AlreadyExistsError,
    ArgumentError,
    CollectionArguments,
    ExampleLoss,
    IcmLoraError,
    IncompatibleAdapterError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraZoo,
    TaskVectorExtractor,
    TaskVectorSpec,
    TrainingError,
    ZooError,
    collect_zoo,
    evaluate_generator,
    save_adapter,
)
from hf_icm_lora.files import TEMPORARY, commit_directory, commit_file, sweep_temporary, write_json
from hf_icm_lora.trainer import last_checkpoint

ROOT = Path(__file__).parent.parent
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_encoder_layers": 1, "num_decoder_layers": 1}


def fork(function, *args):
    """Call a function in a child process, which is forked so that it need not import everything again."""
    if process := os.fork():
        return process
    try:
        function(*args)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def finish(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def assert_whole(path):
    """All that a zoo lists can be loaded, and what it does not list is a temporary folder."""
    zoo = LoraZoo(path)
    for name, record in zoo.records.items():
        for step in record["snapshots"]:
            zoo.lora_weights(name, step)
    found = {folder for folder in (zoo.path / "adapters").glob("*") if not folder.name.startswith(TEMPORARY)}
    assert found == {record["folder"] for record in zoo.records.values()}
    return zoo


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def lora_config():
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def arguments(tmp_path, **fields):
    fields = {"max_steps": 2, "eval_steps": 1, "use_cpu": True} | fields
    return CollectionArguments(output_dir=str(tmp_path / "trainer"), **fields)


def entries(zoo):
    """Task -> hashes of its files, of the record without its seconds."""
    found = {}
    for name, record in zoo.records.items():
        found[name] = {"record": {field: record[field] for field in record if field not in ("seconds", "folder")}}
        for file in record["folder"].rglob("adapter_*"):
            found[name][str(file.relative_to(record["folder"]))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


# P1: killed while writing


@pytest.mark.parametrize(
    ("module", "function", "listed"),
    [
        ("zoo", "save_adapter", False),
        ("adapter", "save_file", False),
        ("zoo", "write_json", False),
        ("files.os", "rename", False),
        ("files.os", "replace", False),
        ("zoo", "_read_record", True),  # after the commit and before the return
    ],
)
def test_P1_kill_while_adding(tmp_path, monkeypatch, module, function, listed):  # noqa: N802
    zoo = LoraZoo.create(tmp_path / "zoo", **ABOUT)
    zoo.add("before", {4: make_state_dict(1), 8: make_state_dict(2)})
    before = files(zoo.path)

    def add_and_die():
        monkeypatch.setattr(f"hf_icm_lora.{module}.{function}", die)
        zoo.add("killed", {4: make_state_dict(3), 8: make_state_dict(4)})

    assert finish(fork(add_and_die)) == -signal.SIGKILL
    again = assert_whole(zoo.path)
    assert sorted(again) == (["before", "killed"] if listed else ["before"])
    assert before.items() <= files(zoo.path).items()
    if not listed:
        again.add("killed", {4: make_state_dict(3), 8: make_state_dict(4)})
    for path in zoo.path.rglob("*"):
        os.utime(path, (0, 0))
    sweep_temporary(zoo.path)
    assert not list(zoo.path.rglob(f"{TEMPORARY}*"))
    assert sorted(assert_whole(zoo.path)) == ["before", "killed"]


def test_P1_kill_while_making_a_zoo(tmp_path, monkeypatch):  # noqa: N802
    def create_and_die():
        monkeypatch.setattr("hf_icm_lora.files.os.replace", die)
        LoraZoo.create(tmp_path / "zoo", **ABOUT)

    assert finish(fork(create_and_die)) == -signal.SIGKILL
    assert len(LoraZoo.create(tmp_path / "zoo", **ABOUT)) == 0


def test_P1_killed_collections_lose_nothing(tmp_path):  # noqa: N802
    """A small run of benchmarks/kill.py."""

    def run_benchmark():
        sys.argv = ["kill.py", "--kills", "5", "--output", str(tmp_path / "kill.json")]
        sys.path.insert(0, str(ROOT / "benchmarks"))
        runpy.run_path(str(ROOT / "benchmarks" / "kill.py"), run_name="__main__")

    assert finish(fork(run_benchmark)) == 0
    figures = json.loads((tmp_path / "kill.json").read_text())
    assert (figures["kills"], figures["losses"], figures["differing"]) == (5, 0, 0)
    assert sum(figures["tasks_complete_when_killed"]) == 5


def test_P1_results_of_the_kill_benchmark():  # noqa: N802
    figures = json.loads((ROOT / "benchmarks" / "results" / "kill.json").read_text())
    assert figures["kills"] >= 200
    assert figures["during_collection"] > 0.9 * figures["kills"]
    assert figures["before_the_zoo"] < figures["kills"] / 2
    assert figures["losses"] == figures["differing"] == 0


# P2: disk full


def limited(size, function, *args):
    """Call a function in a child process that can write no file beyond `size` bytes; return what it said."""
    reader, writer = os.pipe()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            function(*args)
            said = "nothing"
        except BaseException as error:
            said = f"{isinstance(error, OSError)} {error}"
        os.write(writer, said.encode())

    process = fork(limit)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    assert finish(process) == 0
    return said


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_P2_disk_full(tmp_path, size):  # noqa: N802
    zoo = LoraZoo.create(tmp_path / "zoo", **ABOUT)
    zoo.add("before", {4: make_state_dict(1)})
    before = files(zoo.path)
    said = limited(size, zoo.add, "new", {4: make_state_dict(2)})
    assert said.startswith("True ")  # an OSError
    assert str(zoo.path) in said
    assert "File too large" in said
    assert files(zoo.path) == before
    assert list(assert_whole(zoo.path)) == ["before"]
    zoo.add("new", {4: make_state_dict(2)})


@pytest.mark.parametrize("writer", [commit_file, commit_directory, write_json])
def test_P2_disk_full_names_the_file(tmp_path, writer):  # noqa: N802
    def write():
        if writer is write_json:
            return write_json(tmp_path / "target", {"a": "b" * 5000})
        with writer(tmp_path / "target") as temporary:
            (temporary if writer is commit_file else temporary / "file").write_text("b" * 5000)

    said = limited(1000, write)
    assert f"File too large: '{tmp_path / 'target'}'" in said
    assert os.listdir(tmp_path) == []


def test_P2_disk_full_while_collecting_is_not_skipped(tmp_path, tokenizer):  # noqa: N802
    """It concerns all tasks, and training them would be for nothing."""
    tasks = make_tasks(3)

    def collect():
        args = arguments(tmp_path, on_error="skip")
        collect_zoo(tmp_path / "zoo", make_llama(), tokenizer, tasks, lora_config(), args)

    said = limited(1400, collect)
    assert said.startswith("True ")
    assert str(tmp_path / "zoo") in said
    assert (tmp_path / "zoo" / "collection.log").read_text().count("\n") == 1
    assert len(assert_whole(tmp_path / "zoo")) == 0
    collect()
    assert len(assert_whole(tmp_path / "zoo")) == 3


# P3: several writers


@pytest.mark.parametrize("num_processes", [2, 4])
def test_P3_several_collectors(tmp_path, tokenizer, num_processes):  # noqa: N802
    call = (make_llama(), tokenizer, make_tasks(3), lora_config(), arguments(tmp_path))
    together = [fork(collect_zoo, tmp_path / "zoo", *call) for _ in range(num_processes)]
    assert [finish(process) for process in together] == [0] * num_processes
    zoo = assert_whole(tmp_path / "zoo")
    assert not list(zoo.path.rglob(f"{TEMPORARY}*"))
    assert entries(zoo) == entries(collect_zoo(tmp_path / "alone", *call))
    lines = (zoo.path / "collection.log").read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == ["'shift/1'", "'shift/2'", "'shift/3'"]


def test_P3_collectors_share_the_tasks(tmp_path, tokenizer, monkeypatch):  # noqa: N802
    """Each task is fine-tuned once, and what a killed process was at another one takes up."""
    tasks, collect_task = make_tasks(6), hf_icm_lora.collection._collect_task

    def noted(zoo, model, processing_class, task, args, start):
        with (tmp_path / "begun").open("a") as file:
            file.write(f"{os.getpid()} {task.name}\n")
        if kill_at == task.name:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)  # so that one process alone cannot be through before the other begins
        collect_task(zoo, model, processing_class, task, args, start)

    def begun():
        return [line.split() for line in (tmp_path / "begun").read_text().splitlines()]

    monkeypatch.setattr(hf_icm_lora.collection, "_collect_task", noted)
    call, kill_at = (make_llama(), tokenizer, tasks, lora_config(), arguments(tmp_path)), None
    together = [fork(collect_zoo, tmp_path / "zoo", *call) for _ in range(2)]
    assert [finish(process) for process in together] == [0, 0]
    assert sorted(name for _, name in begun()) == [task.name for task in tasks]
    assert len({process for process, _ in begun()}) == 2
    whole = entries(assert_whole(tmp_path / "zoo"))

    (tmp_path / "begun").unlink()
    kill_at = tasks[0].name
    killed = fork(collect_zoo, tmp_path / "again", *call)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    kill_at = None
    other = fork(collect_zoo, tmp_path / "again", *call)
    assert (finish(killed), finish(other)) == (-signal.SIGKILL, 0)
    assert {process for process, name in begun() if name == tasks[0].name} == {str(killed), str(other)}
    assert entries(assert_whole(tmp_path / "again")) == whole
    assert not list((tmp_path / "again").rglob(f"{TEMPORARY}*"))


def add_with_others(path, index, start):
    zoo = LoraZoo.create(path, **ABOUT)
    while time.time() < start:
        pass
    for name in "abcdefgh":
        with contextlib.suppress(AlreadyExistsError):
            zoo.add(name, {step: make_state_dict(10 * index + step) for step in range(1, 4)}, writer=index)
            (path.parent / f"{index}-{name}").touch()


@pytest.mark.parametrize("num_processes", [2, 4])
def test_P3_first_of_several_writers_wins(tmp_path, num_processes):  # noqa: N802
    path, start = tmp_path / "zoo", time.time() + 0.5
    processes = [fork(add_with_others, path, index, start) for index in range(num_processes)]
    assert [finish(process) for process in processes] == [0] * num_processes
    zoo = assert_whole(path)
    assert sorted(zoo) == list("abcdefgh")
    for name, record in zoo.records.items():
        index = record["writer"]
        assert [file.name for file in tmp_path.glob(f"*-{name}")] == [f"{index}-{name}"]  # one add returned
        for step in range(1, 4):
            stored, written = zoo.load_snapshot(name, step), make_state_dict(10 * index + step)
            assert all(torch.equal(stored[key], written[key]) for key in written)


def test_P3_second_of_two_that_make_different_zoos_is_refused(tmp_path, monkeypatch):  # noqa: N802
    write = hf_icm_lora.zoo.write_json

    def late(path, content):
        if not path.exists():
            monkeypatch.setattr("hf_icm_lora.zoo.write_json", lambda *_: write(path, about))
        hf_icm_lora.zoo.write_json(path, content)

    other = LoraZoo.create(tmp_path / "other", **ABOUT | {"template": "{prompt}>{completion}"})
    about = other.about
    monkeypatch.setattr("hf_icm_lora.zoo.write_json", late)
    with pytest.raises(ZooError, match="a zoo with another template"):
        LoraZoo.create(tmp_path / "zoo", **ABOUT)


def test_P3_sweeping_beside_writers(tmp_path):  # noqa: N802
    """Folders vanish while they are looked through."""
    path, start = tmp_path / "zoo", time.time() + 0.2
    LoraZoo.create(path, **ABOUT)
    process = fork(add_with_others, path, 0, start)
    while not (tmp_path / "0-h").exists():
        sweep_temporary(path)
        assert_listed(path)
    assert finish(process) == 0
    assert sorted(assert_whole(path)) == list("abcdefgh")


def assert_listed(path):
    zoo = LoraZoo(path)
    for name in zoo:
        zoo.load_snapshot(name)


# P4: no permission


def denied(path, *_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_P4_read_only_folder(tmp_path, monkeypatch, call):  # noqa: N802
    zoo = LoraZoo.create(tmp_path / "zoo", **ABOUT)
    zoo.add("before", {4: make_state_dict(1)})
    before = files(zoo.path)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, denied)
        with pytest.raises(OSError, match="Permission denied: '.*zoo/adapters"):
            zoo.add("new", {4: make_state_dict(2)})
    assert files(zoo.path) == before
    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", denied)
        with pytest.raises(PermissionError, match="elsewhere"):
            LoraZoo.create(tmp_path / "elsewhere", **ABOUT)


# P5: links


@pytest.fixture
def zoo(tmp_path):
    zoo = LoraZoo.create(tmp_path / "zoo", **ABOUT)
    for index, name in enumerate("ab"):
        zoo.add(name, {4: make_state_dict(index), 8: make_state_dict(index + 10)})
    return zoo


@pytest.mark.parametrize("what", ["zoo", "zoo/adapters", "task", "snapshot"])
def test_P5_links_are_refused(tmp_path, zoo, what):  # noqa: N802
    folders = {"task": zoo.task_folder("a"), "snapshot": zoo.task_folder("a") / "step-4"}
    folder = folders.get(what, tmp_path / what)
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    before = files(tmp_path)
    for open_it in (lambda: LoraZoo(zoo.path), lambda: LoraZoo.create(zoo.path, **ABOUT)):
        with pytest.raises(ZooError, match=rf"{folder.name} is a symbolic link to {tmp_path / 'outside'}: expected"):
            open_it()
    assert files(tmp_path) == before


def test_P5_new_zoo_is_not_made_through_a_link(tmp_path):  # noqa: N802
    (tmp_path / "outside").mkdir()
    (tmp_path / "zoo").symlink_to("outside")
    with pytest.raises(ZooError, match="is a symbolic link"):
        LoraZoo.create(tmp_path / "zoo", **ABOUT)
    assert os.listdir(tmp_path / "outside") == []


@pytest.mark.parametrize(
    "change",
    [
        {"snapshots": ["4/../../../../outside"], "best_step": "4/../../../../outside"},
        {"snapshots": [4, "8/.."]},
        {"best_step": 5},
        {"best_step": "4"},
        {"snapshots": None},
        {"name": ["a"]},
        {"snapshots": [True], "best_step": True},
    ],
)
def test_P5_record_that_leads_outside_is_refused(tmp_path, zoo, change):  # noqa: N802
    save_adapter(tmp_path / "outside", zoo.lora_config, make_state_dict(9))
    file = zoo.task_folder("a") / "task.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ZooError, match=r"task\.json: expected a name, snapshots as whole numbers"):
        LoraZoo(zoo.path)


def test_P5_linked_files_of_the_hubs_cache_are_read(tmp_path, zoo):  # noqa: N802
    """In its snapshots every file is a link to a blob beside them."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    blobs.mkdir()
    for number, (name, content) in enumerate(files(zoo.path).items()):
        (blobs / str(number)).write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    cached = assert_whole(snapshot)
    assert entries(cached) == entries(zoo)


# P6: Ctrl-C


def test_P6_ctrl_c_while_collecting(tmp_path, tokenizer):  # noqa: N802
    from hf_icm_lora.cli import main

    base, tasks = save_base_and_tasks(tmp_path, tokenizer)
    path, log = tmp_path / "zoo", tmp_path / "log"
    argv = ["collect", "--output_dir", str(path), "--base_model", base, "--tasks", tasks, "--dtype", "float32"]
    argv += ["--use_cpu", "True", "--eval_steps", "2", "--patience", "500"]

    def collect():
        # A shell without job control starts what runs in the background deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.exit(main([*argv, "--max_steps", "200"]))

    child = fork(collect)
    while not list(path.glob("adapters/*/task.json")):  # into the second task
        assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert finish(child) == 130
    assert "Traceback" not in log.read_text()
    assert len(assert_whole(path)) < 4
    assert not list(path.rglob(f"{TEMPORARY}*"))
    assert main([*argv, "--max_steps", "4"]) == 0
    assert len(assert_whole(path)) == 4


# P7: half-written checkpoints


def make_trainer(zoo, output_dir, **fields):
    torch.manual_seed(0)
    model = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo.subset(["shift/1", "shift/2"]), **SIZES))
    fields = {"save_strategy": "steps", "save_steps": 2} | fields
    args = training_arguments(output_dir, output_dir=str(output_dir), **fields)
    return LoraGeneratorTrainer(model, args, train_dataset=zoo.subset(["shift/1", "shift/2"]).as_dataset())


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = make_trainer(world.zoo, folder)
    trainer.train()
    return folder, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


WRITTEN = ["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("fault", ["missing", "half"])
def test_P7_half_written_checkpoint(world, checkpoints, tmp_path, monkeypatch, name, fault):  # noqa: N802
    if (name, fault) == ("rng_state.pth", "half"):
        pytest.skip("written before trainer_state.json, and only its loss later is looked for")
    folder, expected = shutil.copytree(checkpoints[0], tmp_path / "out"), checkpoints[1]
    file = folder / "checkpoint-6" / name
    content = file.read_bytes()
    file.unlink() if fault == "missing" else file.write_bytes(content[: len(content) // 2])
    (folder / "checkpoint-best").mkdir()  # a user's own
    taken = []
    load = LoraGeneratorTrainer._load_from_checkpoint
    monkeypatch.setattr(
        LoraGeneratorTrainer, "_load_from_checkpoint", lambda *args: (taken.append(args[1]), load(*args))
    )
    trainer = make_trainer(world.zoo, folder)
    trainer.train(resume_from_checkpoint=True)
    assert {Path(path).name for path in taken} == {"checkpoint-4"}
    assert trainer.state.global_step == 6
    assert all(torch.equal(tensor, expected[key]) for key, tensor in trainer.model.state_dict().items())


def test_P7_whole_checkpoints(world, checkpoints, tmp_path):  # noqa: N802
    folder = shutil.copytree(checkpoints[0], tmp_path / "out")
    assert Path(last_checkpoint(folder)).name == "checkpoint-6"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / "checkpoint-6" / name).unlink()
    assert Path(last_checkpoint(folder)).name == "checkpoint-4"
    assert Path(last_checkpoint(folder, weights_only=True)).name == "checkpoint-6"


def test_P7_no_whole_checkpoint(world, tmp_path):  # noqa: N802
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(IcmLoraError, match=r"expected a whole checkpoint .* found \[2\]: start without"):
        make_trainer(world.zoo, tmp_path).train(resume_from_checkpoint=True)


# P8: permissions


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_P8_umask(world, tmp_path, tokenizer, mask, file_mode, folder_mode):  # noqa: N802
    before = os.umask(mask)
    try:
        zoo = collect_zoo(tmp_path / "zoo", make_llama(), tokenizer, make_tasks(1), lora_config(), arguments(tmp_path))
        zoo.add_task_vectors(world.zoo.task_vectors)
        make_trainer(world.zoo, tmp_path / "out").model.save_pretrained(tmp_path / "zoo" / "generator")
        generator = LoraGeneratorModel.from_pretrained(tmp_path / "zoo" / "generator")
        generator.export_adapter(tmp_path / "zoo" / "adapter", world.zoo.task_vectors.banks["shift/1"]["both"][0])
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "zoo").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {file_mode}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {folder_mode}


# P9: seeds


def test_P9_same_seed(tmp_path, tokenizer):  # noqa: N802
    zoos, vectors, generators, adapters = [], [], [], []
    for name in ("one", "other"):
        torch.rand(5)  # the global state is not what counts
        folder, tasks = tmp_path / name, make_tasks(2)
        zoo = collect_zoo(folder / "zoo", make_llama(), tokenizer, tasks, lora_config(), arguments(folder))
        extractor = TaskVectorExtractor(TaskVectorSpec(num_demonstrations=3, num_draws=2))
        zoo.add_task_vectors(extractor.extract(make_llama(), tokenizer, tasks))
        trainer = make_trainer(zoo, folder / "out", save_strategy="no")
        trainer.train()
        trainer.model.save_pretrained(folder / "generator")
        model = trainer.model.generate_adapter(
            make_llama(), processing_class=tokenizer, examples=[("ab", "bc")], refine_steps=2
        )
        model.save_pretrained(folder / "adapter")
        zoos.append(entries(zoo))
        vectors.append(load_file(zoo.path / "task_vectors.safetensors"))  # whose metadata may stand in any order
        generators.append((folder / "generator" / "model.safetensors").read_bytes())
        adapters.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert zoos[0] == zoos[1]
    assert generators[0] == generators[1]
    for one, other in (vectors, adapters):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


# P10: the user's model is the user's


def failing_base(error=None, fails_at=0):
    """A base with a hook of its user's, which may fail in some call."""
    base, calls = odd_base(), []

    def hook(*_):
        calls.append(1)
        if error and len(calls) == fails_at:
            raise error("stop")

    base.model.layers[0].register_forward_hook(hook)
    return base


@pytest.fixture(scope="module")
def generator(world, tmp_path_factory):
    trainer = make_trainer(world.zoo, tmp_path_factory.mktemp("generator"), save_strategy="no", max_steps=1)
    trainer.train()
    return trainer.model


def work_on(base, work, zoo, generator, tokenizer, folder):
    tasks = make_tasks(3)
    if work == "vectors":
        TaskVectorExtractor(TaskVectorSpec(num_draws=2), batch_size=8).extract(base, tokenizer, tasks)
    elif work == "evaluate":
        evaluate_generator(generator, base, tokenizer, zoo, tasks, num_examples=3, more_rows=["scaled", "refined"])
    elif work == "fit":
        example_loss = ExampleLoss(base, tokenizer, zoo.layout, zoo.shared_weights, [("ab", "bc")])
        example_loss(torch.zeros(2, zoo.layout.num_weights))
        example_loss.refine(torch.zeros(zoo.layout.num_weights), 2)
    else:
        collect_zoo(folder / "zoo", base, tokenizer, tasks, lora_config(), arguments(folder))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("work", "fails_at"), [("collect", 4), ("vectors", 2), ("evaluate", 9), ("fit", 2)])
def test_P10_model_is_as_before(world, generator, tokenizer, tmp_path, work, fails_at, error):  # noqa: N802
    base = failing_base(error, fails_at)
    before = state_of(base)
    if error:
        with pytest.raises(error, match="stop"):
            work_on(base, work, world.zoo, generator, tokenizer, tmp_path)
    else:
        work_on(base, work, world.zoo, generator, tokenizer, tmp_path)
    assert state_of(base) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("where", ["reading", "attaching"])
def test_P10_model_is_as_before_when_generation_fails(generator, tokenizer, monkeypatch, where, error):  # noqa: N802
    base = failing_base(error if where == "reading" else None, fails_at=1)
    before = state_of(base)

    def fail(*_, **__):
        raise error("stop")

    if where == "attaching":
        monkeypatch.setattr("hf_icm_lora.adapter._targets", fail)
    with pytest.raises((error, IncompatibleAdapterError), match="stop") as caught:
        generator.generate_adapter(base, processing_class=tokenizer, examples=[("ab", "bc")], check_base_model=False)
    assert where == "reading" or (caught.type is IncompatibleAdapterError) == (error is RuntimeError)
    assert state_of(base) == before


def test_P10_generated_adapter_is_taken_off_again(generator, tokenizer):  # noqa: N802
    """Attached, it freezes the base and puts it in eval mode, as `PeftModel.from_pretrained` does."""
    base = make_llama().requires_grad_(False)
    base(torch.tensor([[1]]), output_hidden_states=True)
    before = state_of(base)
    model = generator.generate_adapter(base, processing_class=tokenizer, examples=[("ab", "bc")], refine_steps=1)
    assert state_of(model.unload()) == before


# Long work


def test_error_in_one_task_is_skipped_on_request(tmp_path, tokenizer, monkeypatch, caplog):
    collect_task = hf_icm_lora.collection._collect_task

    def fail_at_second(zoo, model, processing_class, task, *args):
        if task.name == "shift/2":
            monkeypatch.setattr(hf_icm_lora.collection, "score_completions", out_of_memory)
        collect_task(zoo, model, processing_class, task, *args)

    def out_of_memory(*args):
        calls.append(1)
        if len(calls) == 3:
            monkeypatch.setattr(hf_icm_lora.collection, "score_completions", score)
            raise torch.OutOfMemoryError("Tried to\nallocate 2 GiB.")
        return score(*args)

    calls, score = [], hf_icm_lora.collection.score_completions
    base = failing_base()
    before = state_of(base)
    call = (base, tokenizer, make_tasks(3), lora_config())
    with monkeypatch.context() as patched:
        patched.setattr(hf_icm_lora.collection, "_collect_task", fail_at_second)
        zoo = collect_zoo(tmp_path / "zoo", *call, arguments(tmp_path, on_error="skip"))
    assert state_of(base) == before
    assert list(zoo) == ["shift/1", "shift/3"]
    first, second, third = (zoo.path / "collection.log").read_text().splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S+  'shift/1'  2 steps, loss \d\.\d{4} at step \d, \S+ s", first
    )
    assert second.endswith("  'shift/2'  OutOfMemoryError: Tried to allocate 2 GiB.")
    assert "  'shift/3'  2 steps" in third
    again = collect_zoo(tmp_path / "zoo", *call, arguments(tmp_path))  # and the next call makes up for it
    assert entries(again) == entries(collect_zoo(tmp_path / "other", *call, arguments(tmp_path)))


def test_error_in_one_task_stops_by_default(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(hf_icm_lora.collection, "score_completions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect_zoo(tmp_path / "zoo", make_llama(), tokenizer, make_tasks(3), lora_config(), arguments(tmp_path))
    log = (tmp_path / "zoo" / "collection.log").read_text()
    assert log.endswith("  'shift/1'  ZeroDivisionError: division by zero\n")
    with pytest.raises(ArgumentError, match="on_error: expected 'stop' or 'skip', found 'no'"):
        arguments(tmp_path, on_error="no")


@pytest.mark.parametrize("part", ["train", "demo"])
def test_loss_that_is_not_finite_names_task_and_step(tmp_path, tokenizer, monkeypatch, part):
    score, steps = hf_icm_lora.collection.score_completions, []

    def poisoned(model, batch):
        scores = score(model, batch)
        steps.append(model.training)
        poison = steps.count(True) == 2 and model.training == (part == "train")
        return scores._replace(loss=scores.loss * float("nan")) if poison else scores

    monkeypatch.setattr(hf_icm_lora.collection, "score_completions", poisoned)
    with pytest.raises(TrainingError, match="Task 'shift/1', step 2: the loss became nan. Lower the learning rate"):
        collect_zoo(tmp_path / "zoo", make_llama(), tokenizer, make_tasks(1), lora_config(), arguments(tmp_path))
    assert len(LoraZoo(tmp_path / "zoo")) == 0


def test_log_is_never_uploaded(world, monkeypatch):
    """An error in it may name a folder of this machine."""
    uploaded = {}
    monkeypatch.setattr(hf_icm_lora.zoo, "push_files", lambda files, *_, **__: uploaded.update(files))
    world.zoo.push_to_hub("user/zoo", base_model_name_or_path="user/base")
    assert (world.zoo.path / "collection.log").exists()
    assert "zoo.json" in uploaded
    assert not any("log" in name or "collection" in name for name in uploaded)
