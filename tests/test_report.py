"""The report of an evaluation: summaries are those of their tasks, and what is written can be read."""

import json
import math

import pytest
import torch

from hf_icm_lora import CorruptFileError, format_report, read_report, recovered_gain
from hf_icm_lora.report import rank_correlation, storage, summarize, write_report

LOSSES = {  # row -> loss on each task; fine-tuning did not help the last one
    "base": (3.0, 3.0, 3.0, 2.0),
    "task_lora": (1.0, 2.0, 1.0, 2.5),
    "mean_lora": (2.5, 4.5, 3.0, 2.0),
    "generated": (1.5, 2.0, 0.5, 1.0),
}
TASKS = ("a/1", "a/2", "b/1", "b/2")


def make_scores(losses=LOSSES, **generated):
    """What `summarize` reads: scores of each task in each row; those named are of the row `generated` alone."""
    scores = {
        row: {name: {"loss": loss, "exact_match": loss / 4} for name, loss in zip(TASKS, own, strict=True)}
        for row, own in losses.items()
    }
    for figure, values in generated.items():
        for name, value in zip(TASKS, values, strict=True):
            scores["generated"][name][figure] = value
    return scores


def make_report(scores):
    return {
        "rows": {row: f"What {row} is." for row in scores},
        "splits": {"seen": summarize(scores)},
        "storage": {"generator_bytes": 5e6, "adapter_bytes": 1e6, "break_even_tasks": 5, "num_seen_tasks": 9},
        "seconds": {"task_vector": 0.5, "rows": {"generated": 0.02}, "attachment": 0.01, "fine_tuning": 30.0},
    }


@pytest.mark.parametrize(
    ("base", "loss", "oracle", "gain"),
    [(3, 3, 1, 0), (3, 1, 1, 1), (3, 2, 1, 0.5), (3, 0, 1, 1), (3, 9, 1, -1), (3, 4, 1, -0.5), (1, 0, 1, None),
     (1, 1, 2, None), (1, 0.5, 1.5, None), (2, 5, 1, -1), (3, math.nan, 1, -1), (3, math.inf, 1, -1)],
)  # fmt: skip
def test_recovered_gain(base, loss, oracle, gain):
    assert recovered_gain(base, loss, oracle) == gain


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3], [5, 6, 90], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 1, 2], [1, 2, 3], 0.75**0.5),
        ([1, 1], [1, 2], None),
    ],
)
def test_rank_correlation(x, y, expected):
    assert rank_correlation(x, y) == (None if expected is None else pytest.approx(expected))


def test_summary_is_that_of_its_tasks():
    rows = summarize(make_scores())
    assert list(rows) == list(LOSSES)
    gains = {row: [score["recovered_gain"] for score in summary["tasks"].values()] for row, summary in rows.items()}
    assert gains == {
        "base": [0, 0, 0, None], "task_lora": [1, 1, 1, None], "mean_lora": [0.25, -1, 0, None],
        "generated": [0.75, 1, 1, None],
    }  # fmt: skip
    row = rows["mean_lora"]
    assert row["mean_recovered_gain"] == pytest.approx(-0.25)
    assert row["median_recovered_gain"] == 0
    assert row["min_recovered_gain"] == -1
    assert row["mean_loss"] == 3  # also of the task without a G
    assert row["exact_match"] == 0.75
    assert list(row["tasks"]) == list(TASKS)


def test_split_in_which_fine_tuning_gained_nothing_has_no_mean():
    rows = summarize(make_scores(LOSSES | {"task_lora": (5.0,) * 4}))
    for row in rows.values():
        assert row["mean_recovered_gain"] is row["median_recovered_gain"] is row["min_recovered_gain"] is None
    assert rows["generated"]["mean_loss"] == 1.25
    table = format_report(make_report(make_scores(LOSSES | {"task_lora": (5.0,) * 4})))
    assert "| generated | - | - | - | 1.250 |" in table
    assert "fine-tuning gained nothing: a/1, a/2, b/1, b/2." in table


def test_what_is_known_of_some_rows_is_summarized_for_them():
    rows = summarize(make_scores(gain_on_examples=(0.2, 0.3, 0.4, 0.5), nearest_seen_distance=(1.0, 2.0, 3.0, 4.0)))
    assert rows["generated"]["nearest_seen_distance"] == 2.5
    assert rows["generated"]["gain_on_examples_correlation"] == pytest.approx(0.75**0.5)  # of the three with a G
    assert not {"nearest_seen_distance", "gain_on_examples_correlation"} & rows["base"].keys()
    constant = summarize(make_scores(gain_on_examples=(0.2,) * 4))
    assert constant["generated"]["gain_on_examples_correlation"] is None


def test_scores_are_not_changed():
    scores = make_scores()
    before = json.dumps(scores)
    summarize(scores)
    assert json.dumps(scores) == before


def test_table_shows_every_row_and_what_is_below_it():
    scores = make_scores(gain_on_examples=(0.2, 0.3, 0.4, 0.5))
    for distance, row in enumerate(("generated", "task_lora", "mean_lora")):
        for score in scores[row].values():
            score["nearest_seen_distance"] = distance
    table = format_report(make_report(scores))
    assert "### Seen tasks (4)" in table
    assert "| generated | 0.92 | 1.00 | 0.75 | 1.250 | 31 % |" in table
    assert "| mean_lora | -0.25 | 0.00 | -1.00 | 3.000 | 75 % |" in table
    assert "deviation: generated 0.00, task_lora 1.00, mean_lora 2.00." in table
    assert "with the gain on the examples (row generated): 0.87." in table
    assert "Without G, since fine-tuning gained nothing: b/2." in table
    assert "- `mean_lora`: What mean_lora is." in table
    assert "Generator 5.0 MB, one fp16 adapter 1.00 MB: smaller than 5 adapters or more (9 seen tasks)." in table
    assert "task vector 0.50, generation 0.020, attachment 0.010; fine-tuning one LoRA 30.0." in table


def test_report_is_strict_json_and_stands_in_its_files(tmp_path):
    report = make_report(make_scores(LOSSES | {"task_lora": (5.0,) * 4}))
    write_report(report, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["evaluation.json", "evaluation.md"]
    assert read_report(tmp_path / "new" / "evaluation.json") == report
    assert (tmp_path / "new" / "evaluation.md").read_text(encoding="utf-8") == format_report(report)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": {}}', "[" * 100_000])
def test_file_that_is_no_report_is_refused(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content, encoding="utf-8")
    with pytest.raises(CorruptFileError, match=r"evaluation\.json: expected a report"):
        read_report(tmp_path / "evaluation.json")
    with pytest.raises(OSError, match="missing"):
        read_report(tmp_path / "missing.json")


def test_storage_against_as_many_adapters_as_tasks_were_seen():
    class Generator:
        layout = type("Layout", (), {"num_weights": 10, "num_shared_weights": 5})

        def state_dict(self):
            return {"a": torch.zeros(16), "b": torch.zeros(25, dtype=torch.int8)}

    found = storage(Generator(), 3)
    assert found == {
        "generator_bytes": 89, "adapter_bytes": 20, "shared_bytes": 10, "num_seen_tasks": 3,
        "ratio": round(89 / 70, 3), "break_even_tasks": 4,
    }  # fmt: skip
    assert 3 * 20 + 10 < 89 <= 4 * 20 + 10
