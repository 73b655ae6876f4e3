"""What the benchmarks share, and that each of them starts."""

import dataclasses
import runpy
from pathlib import Path

import bench
import pytest
from transformers import HfArgumentParser

BENCHMARKS = Path(__file__).parent.parent
SCRIPTS = [path for path in sorted(BENCHMARKS.rglob("*.py")) if not path.name.startswith("test_")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_each_script_can_be_imported_and_has_options_for_a_command_line(monkeypatch, path):
    if path.name == "serving.py":
        pytest.importorskip("llama_cpp")
    if path.name == "make_tasks.py":
        pytest.importorskip("babel")
    for folder in (BENCHMARKS.parent, BENCHMARKS):  # for `python -m benchmarks.run`, and for `python benchmarks/x.py`
        monkeypatch.syspath_prepend(folder)
    names = runpy.run_path(str(path), run_name="benchmark")
    own = [thing for name, thing in names.items() if name.endswith(("Options", "Arguments"))]
    for options in own:
        if dataclasses.is_dataclass(options) and options.__module__ == "benchmark":
            assert "--help" in HfArgumentParser(options).format_help()


def test_arms_run_once_from_each_seed_and_are_kept(tmp_path):
    path, called = tmp_path / "arms.json", []

    def run(arm: int, seed: int) -> dict:
        if arm == 3:
            raise KeyboardInterrupt
        called.append((arm, seed))
        return {"figure": 10 * arm + seed}

    with pytest.raises(KeyboardInterrupt):
        bench.run_arms(path, {"one": 1, "three": 3}, [0], run, {"steps": 4})
    assert bench.kept(path, {})["arms"] == {"one": [{"seed": 0, "figure": 10}]}
    runs = bench.run_arms(path, {"two": 2, "one": 1}, [0, 1], run, {"steps": 5})
    assert called == [(1, 0), (2, 0), (2, 1), (1, 1)]
    assert runs["one"] == [{"seed": 0, "figure": 10}, {"seed": 1, "figure": 11}]
    report = bench.kept(path, {})
    assert (report["arms"], report["steps"], report["seed"]) == (runs, 5, 0)
    assert "command" in report


def test_a_report_is_of_the_last_call(tmp_path):
    bench.write(tmp_path / "report.json", {"command": "an earlier one", "figure": 1}, seed=7)
    report = bench.kept(tmp_path / "report.json", {})
    assert report["figure"] == 1
    assert report["seed"] == 7
    assert report["command"] != "an earlier one"
    assert bench.kept(tmp_path / "none.json", {"splits": {}}) == {"splits": {}}


def test_summaries_have_the_names_of_reports():
    assert bench.summary(iter([0.5, 1.0, -1.0]), "median", "min") == {
        "median_recovered_gain": 0.5, "min_recovered_gain": -1.0
    }  # fmt: skip


def test_tasks_with_a_lora_are_taken_from_all_families_alike():
    seen, whole = bench.with_lora("seen"), bench.with_lora("unseen_family")
    assert sorted(seen) == sorted(bench.SPLITS["seen"])
    families = [name.split("/")[0] for name in seen]
    assert len(set(families[: len(set(families))])) == len(set(families))
    assert len(whole) == 2 * bench.PER_FAMILY
