"""Files: whole or not at all, readable by others, and one safe directory name per task name."""

import json
import os
import re
import stat
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_icm_lora import files
from hf_icm_lora.files import (
    TEMPORARY,
    commit_directory,
    commit_file,
    safe_dirname,
    sha256_of,
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
    target = tmp_path / "deep" / "zoo"
    with commit_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent  # one file system, so that the rename is atomic
    assert tree(tmp_path) == {"deep": b"", "deep/zoo": b"", "deep/zoo/sub": b"", "deep/zoo/sub/a.txt": b"a"}


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
    with pytest.raises(FileExistsError, match="target exists already"):
        fill(target, lambda _: pytest.fail("The body must not run."))
    assert tree(tmp_path) == before


def test_target_that_another_process_made_meanwhile_is_untouched(tmp_path):
    def race(_):
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "theirs.txt").write_text("theirs")

    with pytest.raises(FileExistsError, match="made by another process meanwhile"):
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
    assert safe_dirname("country names/Größe").startswith("country_names-Gro_e-")
    assert safe_dirname("日本").startswith("task-")


def test_hash_knows_where_parts_end():
    assert sha256_of("ab", "c") != sha256_of("a", "bc")
    assert sha256_of("a", "") != sha256_of("a")
    assert sha256_of("ü") == sha256_of("ü".encode())


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_hash_is_unambiguous(one, other):
    assert (sha256_of(*one) == sha256_of(*other)) == (one == other)
