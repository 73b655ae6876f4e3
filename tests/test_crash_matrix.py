"""The crash matrix: every call that changes the file system fails once, in each way, and nothing half is ever seen.

In each case a writer is run again and again, with its first, second, ... such call failing, until it gets through:

    error    the call fails as on a full disk, after it wrote a part; the writer can still clean up
    dead     the call and all after it do so: what a killed process leaves
    late     the call is done, and then it and all after it fail

Then what stands there is opened, and the writer is run again without faults.
"""

import builtins
import errno
import hashlib
import io
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from conftest import files
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_zoo import ABOUT, CONFIG, make_state_dict, vectors

import hf_icm_lora.adapter
import hf_icm_lora.task_vectors
from hf_icm_lora import (
    AlreadyExistsError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraZoo,
    export_gguf,
    load_adapter,
    save_adapter,
)
from hf_icm_lora.files import TEMPORARY, sweep_temporary, write_json
from hf_icm_lora.report import read_report

SAVERS = [hf_icm_lora.adapter, hf_icm_lora.task_vectors]
CALLS = ["mkdir", "rename", "replace", "fsync", "chmod", "unlink", "rmdir"]
MODES = ["error", "dead", "late"]
SHARD = "30KB"  # of a tiny generator, which makes three files of it


class Crash(BaseException):
    """The process ends here."""


class Faults:
    """Count the calls that change the file system, and fail at one of them."""

    def __init__(self, fails_at, mode):
        self.fails_at, self.mode, self.calls = fails_at, mode, 0

    def wrap(self, function, part=lambda *_: None, whole=None):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls < self.fails_at or (self.mode == "error" and self.calls > self.fails_at):
                return function(*args, **kwargs)
            if self.calls == self.fails_at:
                (whole or function)(*args, **kwargs) if self.mode == "late" else part(*args)
            if self.mode == "error":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise Crash

        return call

    def open(self, function):
        def write_a_part(path, *_):
            with function(path, "w") as file:
                file.write("{")

        failing = self.wrap(function, write_a_part, lambda *args, **kwargs: function(*args, **kwargs).close())

        def call(path, mode="r", *args, **kwargs):
            return (failing if set(mode) & set("wax+") else function)(path, mode, *args, **kwargs)

        return call


@contextmanager
def faults_at(number, mode):
    """Let the call of this number fail, and yield the counter."""

    def half(_tensors, path, *_, **__):
        Path(path).write_bytes(b"\x50\x00\x00\x00\x00\x00\x00\x00{")

    faults = Faults(number, mode)
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, faults.wrap(getattr(os, name)))
        save = safetensors.torch.save_file
        for module in SAVERS:
            patch.setattr(module, "save_file", faults.wrap(save, half))
        patch.setattr(transformers.modeling_utils, "safe_save_file", faults.wrap(save, half))
        opening = faults.open(builtins.open)
        patch.setattr(builtins, "open", opening)
        patch.setattr(io, "open", opening)
        yield faults


def run(write, number, mode):
    """Run a writer with a fault; return whether it got through, and whether the fault was reached."""
    with faults_at(number, mode) as faults:
        try:
            write()
            done = True
        except (OSError, Crash):
            done = False
    return done, faults.calls >= number


def visible(path):
    """The files that a reader takes for something, with their hashes."""
    names = {name: content for name, content in files(path).items() if TEMPORARY not in name}
    return {name: hashlib.sha256(content).hexdigest() for name, content in names.items()}


def matrix(folder, write, check, mode, before=lambda _: None):
    """Fail at every call, check, repeat; return the number of faults."""
    number, reached = 1, True
    while reached:
        root = folder / str(number)
        root.mkdir()
        before(root)
        old = visible(root)
        done, reached = run(lambda: write(root), number, mode)  # noqa: B023
        check(root, old, done)
        with suppress(AlreadyExistsError):  # what was committed before the fault is there
            write(root)
        check(root, old, True)
        for path in root.rglob("*"):
            os.utime(path, (0, 0))
        sweep_temporary(root)
        assert not list(root.rglob(f"{TEMPORARY}*"))
        shutil.rmtree(root)
        number += 1
        assert number < 500
    print(number - 2, "faults")  # which docs/source/reliability.md adds up
    return number - 2


def opened(path):
    """Open a zoo and load everything that it lists."""
    zoo = LoraZoo(path)
    for name, record in zoo.records.items():
        for step in record["snapshots"]:
            zoo.lora_weights(name, step)
    if zoo.has_task_vectors:
        assert zoo.task_vectors.banks
    return zoo


SNAPSHOTS = {4: make_state_dict(1), 8: make_state_dict(2)}


@pytest.mark.parametrize("mode", MODES)
def test_create(tmp_path, mode):
    def check(root, _, done):
        if done or (root / "zoo" / "zoo.json").exists():
            assert len(opened(root / "zoo")) == 0

    assert matrix(tmp_path, lambda root: LoraZoo.create(root / "zoo", **ABOUT), check, mode) >= 5


@pytest.mark.parametrize("mode", MODES)
def test_add(tmp_path, mode):
    def before(root):
        zoo = LoraZoo.create(root / "zoo", **ABOUT)
        zoo.add("before", {4: make_state_dict(3)})

    def write(root):
        LoraZoo(root / "zoo").add("new", SNAPSHOTS)

    def check(root, old, done):
        zoo = opened(root / "zoo")
        assert set(zoo) - {"new"} == {"before"}
        assert "new" in zoo or not done
        assert old.items() <= visible(root).items()
        if "new" in zoo:
            for step, state_dict in SNAPSHOTS.items():
                stored = zoo.load_snapshot("new", step)
                assert all(torch.equal(stored[key], state_dict[key]) for key in state_dict)
        else:
            assert visible(root) == old

    assert matrix(tmp_path, write, check, mode, before) >= 30


@pytest.mark.parametrize("mode", MODES)
def test_task_vectors(tmp_path, mode):
    def before(root):
        zoo = LoraZoo.create(root / "zoo", **ABOUT)
        zoo.add("a", {4: make_state_dict(3)})
        zoo.add_task_vectors(vectors(["a"], draws=2))

    def check(root, _, done):
        found = len(opened(root / "zoo").task_vectors.banks["a"]["both"])
        assert found == 4 or (found == 2 and not done)

    write = lambda root: LoraZoo(root / "zoo").add_task_vectors(vectors(["a"]))  # noqa: E731
    assert matrix(tmp_path, write, check, mode, before) >= 4


@pytest.mark.parametrize("mode", MODES)
def test_adapter(tmp_path, mode):
    def check(root, _, done):
        assert done <= (root / "adapter").exists()
        if (root / "adapter").exists():
            _, state_dict = load_adapter(root / "adapter")
            assert all(torch.equal(state_dict[key], tensor) for key, tensor in make_state_dict(1).items())

    write = lambda root: save_adapter(root / "adapter", CONFIG, make_state_dict(1))  # noqa: E731
    assert matrix(tmp_path, write, check, mode) >= 10


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    zoo = LoraZoo.create(tmp_path_factory.mktemp("crash") / "zoo", **ABOUT)
    for index, name in enumerate("ab"):
        zoo.add(name, {4: make_state_dict(index)})
    zoo.add_task_vectors(vectors("ab"))
    return zoo


def make_generator(zoo, seed, **fields):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1}
    sizes |= {"condition_size": 16}  # or one tensor would be most of the weights
    model = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo, **sizes | fields))
    model.fit_normalizer(zoo.as_dataset())
    return model.eval()


def assert_same(model, other):
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("mode", MODES)
def test_new_generator(tmp_path, zoo, mode):
    """A folder is no generator until `config.json`, its last file, is there."""
    generator = make_generator(zoo, 1)

    def check(root, _, done):
        assert done <= (root / "generator" / "config.json").exists()
        if (root / "generator" / "config.json").exists():
            assert_same(LoraGeneratorModel.from_pretrained(root / "generator"), generator)

    assert matrix(tmp_path, lambda root: generator.save_pretrained(root / "generator"), check, mode) >= 10


@pytest.mark.parametrize("mode", MODES)
def test_generator_over_an_older_one(tmp_path, zoo, mode):
    """Each file is the old one or the new one; between the two renames the weights are new and their record old."""
    old_one, new_one = make_generator(zoo, 1), make_generator(zoo, 2)
    new_one.config.training_runs = [{"steps": 7}]

    def check(root, old, done):
        found, names = visible(root), set(old)
        assert set(found) == names
        loaded = LoraGeneratorModel.from_pretrained(root / "generator")
        is_new = found["generator/model.safetensors"] != old["generator/model.safetensors"]
        assert_same(loaded, new_one if is_new else old_one)
        assert loaded.config.training_runs in ([{"steps": 7}], None)
        assert is_new or loaded.config.training_runs is None  # never the record of weights that are not there
        assert not done or loaded.config.training_runs == [{"steps": 7}]

    faults = matrix(
        tmp_path, lambda root: new_one.save_pretrained(root / "generator"), check, mode,
        lambda root: old_one.save_pretrained(root / "generator"),
    )  # fmt: skip
    assert faults >= 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [("50GB", SHARD), (SHARD, "50GB")], ids=["into shards", "out of shards"])
def test_generator_in_other_files_than_before(tmp_path, zoo, mode, sizes):
    """The older weights are read until all new ones are there, and are gone in the end."""
    old_one, new_one = make_generator(zoo, 1), make_generator(zoo, 2)

    def check(root, _, done):
        loaded = LoraGeneratorModel.from_pretrained(root / "generator")
        is_new = torch.equal(next(loaded.parameters()), next(new_one.parameters()))
        assert_same(loaded, new_one if is_new else old_one)
        names = {path.name for path in (root / "generator").glob("*.safetensors*")}
        assert not done or is_new
        assert not done or ("model.safetensors" in names) is (sizes[1] == "50GB")
        assert not done or len(names) == (1 if sizes[1] == "50GB" else 4)  # three shards and their index

    faults = matrix(
        tmp_path, lambda root: new_one.save_pretrained(root / "generator", max_shard_size=sizes[1]), check, mode,
        lambda root: old_one.save_pretrained(root / "generator", max_shard_size=sizes[0]),
    )  # fmt: skip
    assert faults >= 10


def test_generator_of_another_size_is_an_error_and_no_mixture(tmp_path, zoo):
    make_generator(zoo, 1).save_pretrained(tmp_path / "generator")
    other = make_generator(zoo, 2, hidden_size=32)
    outcomes, number, reached = set(), 1, True
    while reached:
        shutil.copytree(tmp_path / "generator", tmp_path / str(number))
        _, reached = run(lambda: other.save_pretrained(tmp_path / str(number)), number, "dead")  # noqa: B023
        try:
            outcomes.add(LoraGeneratorModel.from_pretrained(tmp_path / str(number)).config.hidden_size)
        except (RuntimeError, ValueError) as error:
            outcomes.add("mismatch" if "size" in str(error) or "shape" in str(error) else str(error))
        number += 1
    assert outcomes == {16, "mismatch", 32}


@pytest.mark.parametrize("mode", MODES)
def test_exported_adapter(tmp_path, zoo, mode):
    generator, vector = make_generator(zoo, 1), zoo.task_vectors.banks["a"]["both"][0]

    def check(root, _, done):
        assert done <= (root / "adapter").exists()
        if (root / "adapter").exists():
            assert len(load_adapter(root / "adapter")[1]) == 8

    write = lambda root: generator.export_adapter(root / "adapter", vector, rank=1)  # noqa: E731
    assert matrix(tmp_path, write, check, mode) >= 10


@pytest.mark.parametrize("mode", MODES)
def test_exported_gguf_over_an_older_one(tmp_path, mode):
    gguf = pytest.importorskip("gguf")
    base_config = transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)

    def write(root, seed=2):
        export_gguf(root / "adapter.gguf", CONFIG, make_state_dict(seed), base_config)

    def check(root, old, done):
        assert len(gguf.GGUFReader(root / "adapter.gguf").tensors) == 8
        assert (visible(root) != old) or not done

    assert matrix(tmp_path, write, check, mode, lambda root: write(root, 1)) >= 4


@pytest.mark.parametrize("mode", MODES)
def test_report_over_an_older_one(tmp_path, mode):
    def check(root, _, done):
        found = read_report(root / "report.json")
        assert found == {"splits": "new"} or (found == {"splits": "old"} and not done)

    write = lambda root: write_json(root / "report.json", {"splits": "new"})  # noqa: E731
    old = lambda root: write_json(root / "report.json", {"splits": "old"})  # noqa: E731
    assert matrix(tmp_path, write, check, mode, old) >= 4


# Any order of events


class ZooMachine(RuleBasedStateMachine):
    """Writers that add, crash and come back, on one directory. What was added stays, and all that is listed loads."""

    def __init__(self):
        super().__init__()
        self.folder = Path(self.root) / str(len(os.listdir(self.root)))
        self.writers = [LoraZoo.create(self.folder, **ABOUT) for _ in range(2)]
        self.added: dict[str, int] = {}  # name -> seed, of adds that returned
        self.tried: dict[str, set[int]] = {}
        self.seed = 0

    names, writers_ = st.sampled_from(["a", "b", "Größe/日本"]), st.integers(0, 1)

    def snapshots(self, name):
        self.seed += 1
        self.tried.setdefault(name, set()).add(self.seed)
        return {4: make_state_dict(self.seed), 8: make_state_dict(self.seed + 1000)}

    @rule(name=names, writer=writers_)
    def add(self, name, writer):
        snapshots = self.snapshots(name)
        try:
            self.writers[writer].add(name, snapshots)
        except AlreadyExistsError:
            assert name in LoraZoo(self.folder)
        else:
            assert name not in self.added
            self.added[name] = self.seed

    @rule(name=names, writer=writers_, number=st.integers(1, 45), mode=st.sampled_from(MODES))
    def crash(self, name, writer, number, mode):
        snapshots = self.snapshots(name)
        done, _ = run(lambda: self.writers[writer].add(name, snapshots), number, mode)
        if done:
            assert name not in self.added
            self.added[name] = self.seed

    @rule(writer=writers_)
    def reopen(self, writer):
        self.writers[writer] = LoraZoo(self.folder)

    @precondition(lambda self: self.added)
    @rule(writer=writers_, data=st.data())
    def add_again(self, writer, data):
        name = data.draw(st.sampled_from(sorted(self.added)))
        with pytest.raises(AlreadyExistsError, match="already holds the task"):
            self.writers[writer].add(name, self.snapshots(name))

    @rule()
    def sweep(self):
        sweep_temporary(self.folder, min_age=0)

    @invariant()
    def everything_listed_loads_and_nothing_is_lost(self):
        zoo = LoraZoo(self.folder)
        assert self.added.keys() <= set(zoo)
        for name, record in zoo.records.items():
            assert record["snapshots"] == [4, 8]
            stored = [zoo.load_snapshot(name, step) for step in (4, 8)]
            seeds = [self.added[name]] if name in self.added else sorted(self.tried[name])
            assert any(
                torch.equal(state_dict[key], expected[key])
                for seed in seeds
                for key in make_state_dict(seed)
                if ".lora_B" in key
                for state_dict, expected in zip(stored[:1], [make_state_dict(seed)], strict=True)
            )


def test_any_order_of_events(tmp_path):
    machine = type("Machine", (ZooMachine,), {"root": tmp_path})
    limits = settings(
        max_examples=20, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=limits)
