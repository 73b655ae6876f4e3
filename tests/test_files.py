"""Files: whole or not at all, readable by others, and one safe directory name per task name."""

import errno
import json
import math
import os
import re
import shutil
import stat
import struct
import unicodedata
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_icm_lora import AlreadyExistsError, CorruptFileError, files
from hf_icm_lora.files import (
    TEMPORARY,
    commit_directory,
    commit_file,
    commit_files,
    locked,
    read_json,
    read_safetensors,
    safe_dirname,
    sha256_of,
    stale_weights,
    sweep_temporary,
    write_json,
)


class Crash(BaseException):
    """The process ends here."""


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"" for p in sorted(root.rglob("*"))}


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def fill(path, then=None):
    with commit_directory(path) as folder:
        (folder / "a.txt").write_text("a")
        if then:
            then(folder)


def throw(error):
    def thrower(*_):
        raise error

    return thrower


def test_directory_appears_with_all_files_at_once(tmp_path):
    target = tmp_path / "deep" / "er" / "zoo"
    with commit_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent  # one file system, so that the rename is atomic
    assert tree(tmp_path) == {
        "deep": b"",
        "deep/er": b"",
        "deep/er/zoo": b"",
        "deep/er/zoo/sub": b"",
        "deep/er/zoo/sub/a.txt": b"a",
    }


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Crash])
def test_nothing_is_left_when_the_body_raises(tmp_path, error):
    with pytest.raises(error):
        fill(tmp_path / "target", throw(error))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("error", [OSError("disk full"), Crash()])
def test_target_does_not_appear_when_the_rename_fails(tmp_path, monkeypatch, error):
    monkeypatch.setattr(os, "rename", throw(error))
    with pytest.raises(type(error)):
        fill(tmp_path / "target")
    assert tree(tmp_path) == {}


def test_what_a_killed_writer_leaves_is_not_the_target_and_can_be_swept(tmp_path, monkeypatch):
    def die(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / f"{TEMPORARY}nested").write_text("a")
        raise Crash

    with monkeypatch.context() as killed:  # a killed process runs no `finally`
        killed.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Crash):
            fill(tmp_path / "adapters" / "target", die)
    (tmp_path / f"{TEMPORARY}file").write_text("half")
    kept = tmp_path / "adapters" / "kept.tmp-not-a-prefix"
    kept.write_text("a")
    assert not (tmp_path / "adapters" / "target").exists()
    for path in [*tmp_path.rglob("*")]:
        os.utime(path, (0, 0))
    sweep_temporary(tmp_path)
    assert tree(tmp_path) == {"adapters": b"", "adapters/kept.tmp-not-a-prefix": b"a"}


def test_sweeping_goes_on_where_others_sweep_too(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{TEMPORARY}{name}").mkdir()
    ages = {
        f"{TEMPORARY}a": throw(FileNotFoundError("swept by another")),
        f"{TEMPORARY}b": lambda: os.stat_result([0] * 10),
    }
    monkeypatch.setattr(Path, "lstat", lambda path: ages[path.name]())
    busy = shutil.rmtree

    def rmtree(path, ignore_errors=False):
        busy(path)
        if not ignore_errors:
            raise OSError("something in it is in use")

    monkeypatch.setattr(files.shutil, "rmtree", rmtree)
    sweep_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{TEMPORARY}a"]


def test_sweeping_does_not_disturb_another_process_that_is_writing(tmp_path):
    fill(tmp_path / "target", lambda _: sweep_temporary(tmp_path))
    with commit_file(tmp_path / "file") as temporary:
        temporary.write_text("a")
        sweep_temporary(tmp_path)
    assert tree(tmp_path) == {"file": b"a", "target": b"", "target/a.txt": b"a"}


@pytest.mark.parametrize("existing", ["full", "empty", "file"])
def test_existing_target_is_untouched(tmp_path, existing):
    target = tmp_path / "target"
    if existing == "file":
        target.write_text("old")
    else:
        target.mkdir()
    if existing == "full":
        (target / "old.txt").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(AlreadyExistsError, match="target exists already"):
        fill(target, lambda _: pytest.fail("The body must not run."))
    assert tree(tmp_path) == before


def test_target_that_another_process_made_meanwhile_is_untouched(tmp_path):
    def race(_):
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "theirs.txt").write_text("theirs")

    with pytest.raises(AlreadyExistsError, match="made by another process meanwhile"):
        fill(tmp_path / "target", race)
    assert tree(tmp_path) == {"target": b"", "target/theirs.txt": b"theirs"}


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_umask_is_honoured_whatever_the_writer_did(tmp_path, mask, file_mode, folder_mode):
    with umask(mask):
        with commit_directory(tmp_path / "target") as folder:
            (folder / "a").touch(mode=0o600)  # as safetensors does
            (folder / "sub").mkdir(mode=0o700)
        write_json(tmp_path / "b.json", {})
        assert os.umask(mask) == mask  # and is not changed
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"target": folder_mode, "sub": folder_mode, "a": file_mode, "b.json": file_mode}


def test_json_is_readable_text_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    for content in ({"a": [1]}, {"größe": "ß\u2028"}):
        write_json(path, content)
        assert json.loads(path.read_text(encoding="utf-8")) == content
    assert "größe" in path.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["a.json"]


def test_numbers_that_json_lacks_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, float("nan"), (float("inf"), 2)], 3: {"b": -float("inf")}})
    expected = {"a": [1.5, None, [None, 2]], "3": {"b": None}}
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == expected


@pytest.mark.parametrize("fail", ["content", "rename"])
def test_interrupted_json_leaves_the_old_file(tmp_path, monkeypatch, fail):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    if fail == "rename":
        monkeypatch.setattr(os, "replace", throw(Crash()))
    with pytest.raises((Crash, TypeError)):
        write_json(path, {"new": 2 if fail == "rename" else {object()}})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_file_appears_only_when_its_writer_is_done(tmp_path):
    with commit_file(tmp_path / "a") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "whole"


texts = st.text(max_size=80) | st.sampled_from(
    ["", ".", "..", "/", "../../etc/passwd", "a\0b", "CON", "~", "a" * 5000]
)


@given(texts)
def test_directory_name_is_one_safe_component(name):
    directory = safe_dirname(name)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", directory)  # ASCII, no separator, no dot
    assert len(directory) <= 255
    assert not directory.startswith(("-", "_"))
    assert (Path("/root") / directory).resolve().parent == Path("/root")


@given(st.lists(texts, unique_by=lambda name: unicodedata.normalize("NFC", name), max_size=20))
def test_different_names_have_different_directories_also_where_case_is_ignored(names):
    assert len({safe_dirname(name).lower() for name in names}) == len(names)


@given(texts)
def test_normal_forms_of_one_name_share_a_directory(name):
    assert len({safe_dirname(unicodedata.normalize(form, name)) for form in ("NFC", "NFD")}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("A", "a"), ("a/b", "a-b"), ("a b", "a_b"), ("日本", "中国"), ("a" * 200, "a" * 201), ("ß", "ss"), ("x", " x")],
)
def test_look_alike_names_stay_apart(one, other):
    assert safe_dirname(one).lower() != safe_dirname(other).lower()


def test_directory_name_is_readable():
    assert (
        safe_dirname("country names/Größe") == "country_names-Gro_e-c53b79a5"
    )  # never another: zoos are looked up by it
    assert safe_dirname("_-" + "a" * 70).startswith("a" * 60 + "-")
    assert safe_dirname("日本").startswith("task-")


def test_hash_knows_where_parts_end():
    stored = "601d5476e2ccfe2c87a2bba7a322659734a05749d5b5aa781f513e4912db0d5f"
    assert sha256_of("ab", b"c") == stored  # never another: files hold it
    assert sha256_of("ab", "c") != sha256_of("a", "bc")
    assert sha256_of("a", "") != sha256_of("a")
    assert sha256_of("ü") == sha256_of("ü".encode())


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_hash_is_unambiguous(one, other):
    assert (sha256_of(*one) == sha256_of(*other)) == (one == other)


# Several files at once


def test_files_are_moved_with_the_last_one_last(tmp_path, monkeypatch):
    moved, folder = [], tmp_path / "deep" / "generator"
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    for text in ("old", "new"):
        with umask(0o027), commit_files(str(folder), last="config.json") as temporary:
            for name in ("z.safetensors", "config.json", "a.txt"):
                (temporary / name).write_text(text)
                (temporary / name).chmod(0o600)
            assert tree(folder).get("a.txt") == (b"old" if text == "new" else None)
        assert tree(folder) == dict.fromkeys(("a.txt", "config.json", "z.safetensors"), text.encode())
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert moved == ["a.txt", "z.safetensors", "config.json"] * 2


def test_no_file_is_moved_when_one_cannot_be_written(tmp_path):
    def write():
        with commit_files(tmp_path, "config.json") as folder:
            (folder / "a.txt").write_text("new")
            raise OSError(errno.ENOSPC, "No space left")

    (tmp_path / "config.json").write_text("old")
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left: '.*'"):
        write()
    assert tree(tmp_path) == {"config.json": b"old"}


ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
TWO, THREE = ([f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)] for n in (2, 3))


@pytest.mark.parametrize(
    ("there", "new", "stale"),
    [
        ([ONE], [*TWO, INDEX], [ONE]),
        ([*TWO, INDEX], [ONE], [*TWO, INDEX]),
        ([*TWO, INDEX], [*THREE, INDEX], TWO),
        ([ONE], [ONE], []),
        ([ONE, INDEX], ["README.md"], []),  # a card alone replaces no weights
        (
            ["adapter_model.safetensors", "my-model.safetensors", "model.safetensors.txt", "model-1.safetensors"],
            [ONE],
            [],
        ),
    ],
)
def test_weights_in_other_files_leave_none_of_the_older_ones(tmp_path, there, new, stale):
    assert stale_weights(iter(there), iter(new)) == stale
    for name in there:
        (tmp_path / name).touch()
    with commit_files(tmp_path, "config.json") as folder:
        for name in [*new, "config.json"]:
            (folder / name).touch()
    assert set(tree(tmp_path)) == {"config.json", *new, *there} - set(stale)


# Reading what may come from elsewhere


def refused(read, path, message):
    with pytest.raises(CorruptFileError, match=message):
        read(path)


def test_json_is_read_from_ordinary_files_of_a_bounded_size(tmp_path, monkeypatch):
    file, pipe = tmp_path / "about.json", tmp_path / "pipe.json"
    file.write_text('{"a": "ü"}', encoding="utf-8")
    assert read_json(file) == {"a": "ü"}
    monkeypatch.setattr(files, "MAX_JSON", 11)
    assert read_json(str(file)) == {"a": "ü"}
    monkeypatch.setattr(files, "MAX_JSON", 10)
    refused(read_json, file, "expected up to 10 bytes, found 11")
    monkeypatch.undo()
    file.write_text("[" * 100_000)
    refused(read_json, file, "nested too deeply")
    os.mkfifo(pipe)
    refused(read_json, pipe, "not a file")
    refused(read_json, tmp_path, "not a file")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def entry(name, numbers=1, start=0):
    return f'"{name}":{{"dtype":"F32","shape":[{numbers}],"data_offsets":[{start},{start + 4 * numbers}]}}'


def write_tensors(path, header, data=b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)


def test_tensors_are_read_as_stored(tmp_path):
    file, ones = tmp_path / "x.safetensors", torch.ones(2, 3, dtype=torch.float16)
    save_file({"a": ones, "b": torch.zeros(0)}, file, metadata={"about": "it"})
    tensors, metadata = read_safetensors(file, max_bytes=file.stat().st_size)
    assert tensors.keys() == {"a", "b"}
    assert tensors["a"].dtype == torch.float16
    assert torch.equal(tensors["a"], ones)
    assert metadata == {"about": "it"}
    refused(
        lambda path: read_safetensors(path, max_bytes=path.stat().st_size - 1), file, "a larger max_bytes reads it"
    )
    write_tensors(file, f"{{{entry('a')}}}", struct.pack("<f", 2.5))
    tensors, metadata = read_safetensors(str(file))
    assert (tensors["a"].item(), metadata) == (2.5, {})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f"{{{entry('a')},{entry('a', start=4)}}}", "its header has 'a' twice"),
        (f"{{{entry('b', start=4)},{entry('a')},{entry('b')}}}", "its header has 'b' twice"),
        ('{"__metadata__":{"x":"1","x":"2"}}', "its header has 'x' twice"),
        ("[" * 100_000, "its header: maximum recursion depth"),
        ("{", "its header: Expecting"),
        ("[1]", "not a whole safetensors file"),
        (f"{{{entry('a', 3)}}}", "not a whole safetensors file"),
        ("{" + entry("a").replace("F32", "I32") + "}", r"'a': expected one of \('F64', .*\), found I32"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, message):
    file = tmp_path / "x.safetensors"
    write_tensors(file, header, b"\0" * 8 if "twice" in message else b"\0" * 4)
    refused(read_safetensors, file, message)


def test_headers_that_leave_the_file_are_refused_before_they_are_read(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    for content in (b"", b"\0" * 8, struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2**63) + b"{}"):
        file.write_bytes(content)
        length = int.from_bytes(content[:8], "little")
        refused(read_safetensors, file, f"its header would have {length} bytes, of {len(content)} in all")
    file.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert read_safetensors(file) == ({}, {})
    monkeypatch.setattr(files, "MAX_JSON", 1)
    refused(read_safetensors, file, "its header would have 2 bytes, of 10 in all")
    os.mkfifo(tmp_path / "pipe")
    refused(read_safetensors, tmp_path / "pipe", "not a file")
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "none")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    save_file({"a": torch.ones(2), "b": torch.tensor([1, value])}, tmp_path / "x")
    refused(read_safetensors, tmp_path / "x", "^b holds values that are not finite$")


# Locks and leftovers


def test_a_lock_is_held_by_one_and_goes_with_its_holder(tmp_path):
    with locked(tmp_path / "lock", wait=True) as got:
        assert got
        with locked(tmp_path / "lock", wait=False) as other:
            assert not other
        assert (tmp_path / "lock").exists()  # who was refused does not remove it
    assert not (tmp_path / "lock").exists()
    with pytest.raises(Crash), locked(tmp_path / "lock", wait=False):
        raise Crash
    with locked(tmp_path / "lock", wait=False) as got:
        assert got


BROKEN = SimpleNamespace(flock=throw(OSError(errno.ENOLCK, "No locks")), LOCK_EX=1)


@pytest.mark.parametrize("lock", [None, BROKEN], ids=["Windows", "network"])
def test_where_there_are_no_locks_everybody_gets_them(tmp_path, monkeypatch, lock):
    monkeypatch.setattr(files, "fcntl", lock)
    with locked(tmp_path / "lock", wait=True) as got, locked(tmp_path / "lock", wait=True) as other:
        assert (got, other) == (True, True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("no room"), r"it\.json could not be written: no room"),
        (OSError(errno.ENOSPC, "No space left"), r"\[Errno 28\] No space left: '.*it\.json'"),
        (OSError(errno.EACCES, "Denied", "other"), r"\[Errno 13\] Denied: 'other'"),
        (OSError("of its own"), "^of its own$"),
    ],
)
def test_errors_of_writing_name_the_file(tmp_path, error, message):
    for commit in (commit_file, commit_directory, lambda path: commit_files(tmp_path, "it.json")):
        wanted = message if commit in (commit_file, commit_directory) else message.replace(r"it\.json", tmp_path.name)
        with pytest.raises(OSError, match=wanted), commit(tmp_path / "it.json"):
            raise error
    assert not list(tmp_path.iterdir())
