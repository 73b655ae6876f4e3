"""The report of an evaluation: summaries are those of their tasks, and what is written can be read."""

import json
import math
import random
import re

import pytest
import torch

from hf_icm_lora import CorruptFileError, format_report, read_report, recovered_accuracy, recovered_gain
from hf_icm_lora.report import bootstrap_interval, family_means, rank_correlation, storage, summarize, write_report

LOSSES = {  # row -> loss on each task; fine-tuning did not help the last one
    "base": (3.0, 3.0, 3.0, 2.0),
    "task_lora": (1.0, 2.0, 1.0, 2.5),
    "mean_lora": (2.5, 4.5, 3.0, 2.0),
    "generated": (1.5, 2.0, 0.5, 1.0),
}
RIGHT = {  # row -> share of right answers; on the second task fine-tuning gains less than 10 points
    "base": (0.0, 0.1, 0.2, 0.0),
    "task_lora": (0.8, 0.19, 0.6, 0.5),
    "mean_lora": (0.0, 0.0, 0.0, 0.1),
    "generated": (0.4, 0.9, 0.7, 0.0),
}
TASKS = ("a/1", "a/2", "b/1", "b/2")
FAMILIES = {name: name[0] for name in TASKS}


def make_scores(losses=LOSSES, right=RIGHT, **generated):
    """What `summarize` reads: scores of each task in each row; those named are of the row `generated` alone."""
    scores = {
        row: {
            name: {"loss": loss, "exact_match": share}
            for name, loss, share in zip(TASKS, own, right[row], strict=True)
        }
        for row, own in losses.items()
    }
    for figure, values in generated.items():
        for name, value in zip(TASKS, values, strict=True):
            scores["generated"][name][figure] = value
    return scores


def make_report(scores):
    return {
        "rows": {row: f"What {row} is." for row in scores},
        "by_family": False,
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
    ("base", "right", "oracle", "expected"),
    [(0, 0.4, 0.8, 0.5), (0.2, 0.2, 0.8, 0), (0.2, 0.8, 0.8, 1), (0.2, 1, 0.8, 1), (0.5, 0.3, 0.7, -1),
     (0.5, 0, 0.7, -1), (0.2, 0.9, 0.29, None), (0.5, 0.6, 0.5, None), (0.5, 0.5, 0.2, None),
     (16 / 30, 17.5 / 30, 19 / 30, 0.5)],
)  # fmt: skip
def test_recovered_accuracy(base, right, oracle, expected):
    found = recovered_accuracy(base, right, oracle)
    assert found == (None if expected is None else pytest.approx(expected))


def test_recovered_accuracy_is_none_exactly_below_ten_points():
    assert 19 / 30 - 16 / 30 < 0.1  # as floating point has it
    assert recovered_accuracy(16 / 30, 19 / 30, 19 / 30) == 1
    assert recovered_accuracy(0.5, 0.599, 0.599) is None


def test_a_family_counts_once_and_a_task_without_one_too():
    values = {"a/1": 1.0, "a/2": 0.0, "b/1": 0.3, "c": 0.7, "d": 0.1}
    assert family_means(values, {"a/1": "a", "a/2": "a", "b/1": "c", "c": None}) == [0.5, 0.3, 0.7, 0.1]
    assert family_means({}, {}) == []


def test_interval_of_a_mean():
    draws = random.Random(7)
    values = [draws.gauss(0.4, 0.2) for _ in range(100)]
    low, high = bootstrap_interval(values)
    error = torch.tensor(values).std().item() / 10
    mean = sum(values) / 100
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(values) == [low, high]
    assert bootstrap_interval(values, seed=1) != [low, high]
    assert bootstrap_interval([0.3]) is bootstrap_interval([]) is None


def test_interval_leaves_global_random_state_alone():
    before = torch.random.get_rng_state(), random.getstate()
    bootstrap_interval([0.1, 0.5, 0.9])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


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
    assert row["exact_match"] == 0.025
    assert list(row["tasks"]) == list(TASKS)


def test_right_answers_come_first_and_have_intervals():
    rows = summarize(make_scores())
    found = {row: [s["recovered_accuracy"] for s in summary["tasks"].values()] for row, summary in rows.items()}
    expected = {"base": [0, 0, 0], "task_lora": [1, 1, 1], "mean_lora": [0, -0.5, 0.2], "generated": [0.5, 1, 0]}
    for row, (first, second, *others) in found.items():
        assert second is None
        assert [first, *others] == pytest.approx(expected[row])
    row = rows["generated"]
    assert list(row)[:5] == ["exact_match", "exact_match_interval", "mean_recovered_accuracy",
                             "mean_recovered_accuracy_interval", "median_recovered_accuracy"]  # fmt: skip
    assert row["exact_match"] == 0.5
    assert row["exact_match_interval"] == bootstrap_interval(RIGHT["generated"])
    figures = [row[f"{kind}_recovered_accuracy"] for kind in ("mean", "median", "min")]
    assert figures == pytest.approx([0.5, 0.5, 0])
    assert row["mean_recovered_accuracy_interval"] == bootstrap_interval([0.5, 1.0, 0.0])
    assert "label_accuracy" not in row


def test_with_families_means_and_intervals_are_over_families():
    scores = make_scores(gain_on_examples=(0.2, 0.3, 0.4, 0.5))
    of_tasks, row = summarize(scores)["generated"], summarize(scores, FAMILIES)["generated"]
    assert row["exact_match"] == pytest.approx(0.5 * 0.65 + 0.5 * 0.35)
    assert row["mean_recovered_accuracy"] == pytest.approx(0.5)  # (0.5 and the mean of 1 and 0)
    assert row["mean_recovered_accuracy_interval"] == pytest.approx([0.5, 0.5])
    assert row["exact_match_interval"] == [0.35, 0.65] != of_tasks["exact_match_interval"]
    assert row["mean_recovered_gain"] == pytest.approx(0.5 * 0.875 + 0.5 * 1)
    assert row["mean_loss"] == pytest.approx(0.5 * 1.75 + 0.5 * 0.75)
    for name in ("median_recovered_accuracy", "min_recovered_gain", "gain_on_examples_correlation", "tasks"):
        assert row[name] == of_tasks[name]
    report = make_report(scores)
    assert "of a bootstrap over tasks" in format_report(report)
    assert "bootstrap over families, which all have the same weight" in format_report(report | {"by_family": True})


def test_label_accuracy_has_a_column_if_any_task_has_labels():
    scores = make_scores()
    assert "by label" not in format_report(make_report(scores))
    for row in ("base", "generated"):
        for place, name in enumerate(("a/1", "b/1")):
            scores[row][name]["label_accuracy"] = place / 2 + 0.25
    row = summarize(scores)["generated"]
    assert (row["label_accuracy"], row["label_accuracy_interval"]) == (0.5, bootstrap_interval([0.25, 0.75]))
    table = format_report(make_report(scores))
    assert "| row | right answers | by label | recovered |" in table
    assert "| generated | 50 % [18, 80] | 50 % [25, 75] | 0.50 [0.00, 1.00] |" in table
    assert re.search(r"\| mean_lora \| [^|]+ \| - \|", table)


def test_split_in_which_fine_tuning_gained_nothing_has_no_mean():
    rows = summarize(make_scores(LOSSES | {"task_lora": (5.0,) * 4}))
    for row in rows.values():
        assert row["mean_recovered_gain"] is row["median_recovered_gain"] is row["min_recovered_gain"] is None
    assert rows["generated"]["mean_loss"] == 1.25
    table = format_report(make_report(make_scores(LOSSES | {"task_lora": (5.0,) * 4})))
    assert "| - | - | - | 1.250 |" in table
    assert "fine-tuning gained nothing: a/1, a/2, b/1, b/2." in table


def test_split_in_which_fine_tuning_gained_no_right_answers_has_no_recovered_accuracy():
    scores = make_scores(right=dict.fromkeys(LOSSES, (0.5,) * 4))
    row = summarize(scores)["generated"]
    kinds = ("mean", "median", "min")
    assert [row[f"{kind}_recovered_accuracy"] for kind in kinds] == [None] * 3
    assert row["mean_recovered_accuracy_interval"] is None
    table = format_report(make_report(scores))
    assert "| generated | 50 % | - | - | - | 0.92 | 1.00 | 0.75 | 1.250 |" in table
    assert "gained less than 10 points of right answers: a/1, a/2, b/1, b/2." in table


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
    assert "| row | right answers | recovered | median | min | mean G | median G | min G | loss |" in table
    assert "| generated | 50 % [18, 80] | 0.50 [0.00, 1.00] | 0.50 | 0.00 | 0.92 | 1.00 | 0.75 | 1.250 |" in table
    assert "| mean_lora | 2 % [0, 8] | -0.10 [-0.50, 0.20] | 0.00 | -0.50 | -0.25 | 0.00 | -1.00 | 3.000 |" in table
    assert "gained less than 10 points of right answers: a/2." in table
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


def test_without_a_lora_of_the_task_nothing_is_recovered_and_right_answers_count():
    shares = {"base": 0.0, "generated": 0.5}
    rows = summarize({row: {"a": {"loss": 1.0, "exact_match": share}} for row, share in shares.items()})
    assert rows["generated"]["exact_match"] == 0.5
    assert rows["generated"]["mean_recovered_accuracy"] is rows["generated"]["mean_recovered_gain"] is None
    assert rows["generated"]["tasks"]["a"]["recovered_accuracy"] is None
