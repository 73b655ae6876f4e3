"""Tasks: every accepted form of a sample, what is refused, and files that give the same tasks back."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from hf_icm_lora import Sample, Task, TaskError, load_tasks, save_tasks, task_from_dataset
from hf_icm_lora.tasks import check_unique_names, to_sample


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (Sample("a", "b"), ("a", "b")),
        (("a", "b"), ("a", "b")),
        (["a", "b"], ("a", "b")),
        ({"prompt": "a", "completion": "b"}, ("a", "b")),
        ({"prompt": "a", "completion": "b", "text": "c", "id": 3}, ("a", "b")),
        ({"completion": "b"}, ("", "b")),
        ({"text": "b"}, ("", "b")),
        ("b", ("", "b")),
        ("ab", ("", "ab")),  # a string of two characters is text, not a pair
        (("", "b"), ("", "b")),
        ((" a ", " b\n"), (" a ", " b\n")),  # nothing is stripped
    ],
)
def test_every_form_of_a_sample(raw, expected):
    assert to_sample(raw) == Sample(*expected)
    assert Task("t", demo=[raw]).demo == (Sample(*expected),)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (("a",), "pair, a mapping .* or a string; found"),
        (("a", "b", "c"), "found .*'c'"),
        ({"prompt": "a"}, "found .*'prompt'"),
        (3, "found 3"),
        (None, "found None"),
        (("a", 3), "to hold text, found str, int"),
        ((None, "b"), "to hold text, found NoneType, str"),
        ({"prompt": None, "completion": "b"}, "to hold text"),
        ({"text": None}, "to hold text"),
        (("a", ""), "an empty one .*'a'"),
        (("a", " \n"), "an empty one"),
        ("", "an empty one"),
    ],
)
def test_malformed_samples_are_named(raw, message):
    with pytest.raises(TaskError, match=message):
        to_sample(raw)
    with pytest.raises(TaskError, match=rf"task 'my task', test\[1\] .*{message}"):
        Task("my task", test=[("x", "y"), raw])


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_task_needs_a_name(name):
    with pytest.raises(TaskError, match="non-empty name, found"):
        Task(name, train=[("a", "b")])


def test_task_needs_samples():
    with pytest.raises(TaskError, match="'t' has no samples in any of its splits"):
        Task("t")


@pytest.mark.parametrize("split", ["train", "demo", "test"])
@pytest.mark.parametrize("samples", ["some text", {"prompt": "a", "completion": "b"}, None, 3])
def test_a_split_is_a_sequence_of_samples_and_not_one_sample(split, samples):
    with pytest.raises(TaskError, match=f"task 't', {split}.* sequence of samples"):
        Task("t", **{"train": [("x", "y")], split: samples})


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [("a", "b")], "test": [("a", "b")]}, "'a' stands in 'train' and in 'test'"),
        ({"train": [("a", "b")], "demo": [("a", "c")]}, "'a' stands in 'train' and in 'demo'"),
        ({"demo": [("x", "y"), ("a", "b")], "test": [("a", "b")]}, "'a' stands in 'demo' and in 'test'"),
        ({"train": ["plain"], "test": [{"text": "plain"}]}, "'plain' stands in 'train' and in 'test'"),
    ],
)
def test_splits_must_not_overlap(splits, message):
    with pytest.raises(TaskError, match=f"Task 't': {message}"):
        Task("t", **splits)


def test_one_split_may_repeat_a_prompt_and_completions_may_recur():
    task = Task("t", train=[("a", "b"), ("a", "c")], test=[("b", "b")])
    assert (len(task.train), len(task.test)) == (2, 1)


def test_generators_and_datasets_are_read_once_into_tuples():
    task = Task("t", train=(("a", str(i)) for i in range(3)))
    assert task.train == (Sample("a", "0"), Sample("a", "1"), Sample("a", "2"))
    assert repr(task) == "Task('t': 3 train, 0 demo, 0 test)"


def test_require_names_task_split_and_purpose():
    task = Task("t", demo=[("a", "b")])
    assert task.require("demo", 1, "this") == task.demo
    with pytest.raises(TaskError, match="'t' has 1 'demo' samples, but early stopping needs at least 2"):
        task.require("demo", 2, "early stopping")


def test_names_must_be_unique(tmp_path):
    tasks = [Task("a", demo=["x"]), Task("b", demo=["x"]), Task("a", demo=["y"])]
    for check in (check_unique_names, lambda tasks: save_tasks(tasks, tmp_path / "tasks.jsonl")):
        with pytest.raises(TaskError, match="Two tasks are named 'a'"):
            check(tasks)
    assert not (tmp_path / "tasks.jsonl").exists()
    assert check_unique_names(iter(tasks[:2])) == tasks[:2]


# Files

LINE_ENDS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n", "\r\n", '"', "\\", "\ufeff", "日本", "🙂"]
words = st.text(min_size=1, max_size=12).filter(str.strip) | st.sampled_from(LINE_ENDS).map(lambda end: f"a{end}b")
samples = st.tuples(words, words)
tasks_strategy = st.lists(
    st.builds(
        lambda name, train, demo, labels, metadata, **texts: Task(
            name, train=[("train" + p, c) for p, c in train], demo=[("demo" + p, c) for p, c in demo],
            labels={c for _, c in train + demo} if labels else None,
            metadata={"x" + key: value for key, value in metadata.items()}, **texts,
        ),
        words, st.lists(samples, min_size=1, max_size=3), st.lists(samples, max_size=2), st.booleans(),
        st.dictionaries(words, words | st.integers() | st.booleans() | st.lists(words) | st.none(), max_size=2),
        descriptions=st.lists(words, max_size=3),
        **{field: st.none() | words for field in ("description", "family", "dataset", "license")},
    ),
    max_size=4, unique_by=lambda task: task.name,
)  # fmt: skip


@given(tasks=tasks_strategy, name=st.sampled_from(["tasks.jsonl", "tasks.jsonl.gz"]))
def test_files_give_the_same_tasks_back(tmp_path_factory, tasks, name):
    path = tmp_path_factory.mktemp("tasks") / name
    save_tasks(tasks, path)
    assert load_tasks(path) == tasks


def test_compressed_files_are_read_and_are_equal_for_equal_tasks(tmp_path):
    line = '{"name": "a", "train": [["p", "c"]]}\n'
    (tmp_path / "other.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    tasks = load_tasks(tmp_path / "other.jsonl.gz")
    assert tasks == [Task("a", train=[("p", "c")])]
    for name in ("1.jsonl.gz", "2.jsonl.gz"):
        save_tasks(tasks, tmp_path / name)
    assert gzip.decompress((tmp_path / "1.jsonl.gz").read_bytes()).decode() == line
    assert (tmp_path / "1.jsonl.gz").read_bytes() == (tmp_path / "2.jsonl.gz").read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl.gz", b"{}"), ("a.jsonl.gz", gzip.compress(b"{}" * 99)[:-9]), ("a.jsonl", b'{"name": "\xff"}'),
     ("a.jsonl", gzip.compress(b"{}"))],
)  # fmt: skip
def test_file_that_is_no_text_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=rf"{name}: expected JSON Lines in UTF-8, by gzip if it ends in \.gz"):
        load_tasks(tmp_path / name)


REAL = {  # a line as the real tasks have it
    "name": "reviews/tone", "description": "Is it good?", "descriptions": ["Good or bad?", "Tone."],
    "family": "sentiment", "dataset": "reviews", "license": "MIT", "source": "a site", "kind_in_train": True,
    "labels": ["bad", "good"], "variant": "letters", "train": [["nice", "good"]], "demo": [["poor", "bad"]],
    "test": [["fine", "good"]],
}  # fmt: skip


def test_what_else_is_known_of_a_task_is_kept(tmp_path):
    (tmp_path / "real.jsonl").write_text(json.dumps(REAL) + "\n", encoding="utf-8")
    (task,) = load_tasks(tmp_path / "real.jsonl")
    assert (task.descriptions, task.labels) == (("Good or bad?", "Tone."), ("bad", "good"))
    assert (task.dataset, task.license) == ("reviews", "MIT")
    assert task.metadata == {"source": "a site", "kind_in_train": True, "variant": "letters"}
    save_tasks([task], tmp_path / "again.jsonl")
    assert json.loads((tmp_path / "again.jsonl").read_text(encoding="utf-8")) == REAL
    assert hash(task) == hash(load_tasks(tmp_path / "again.jsonl")[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"description": 3}, "description: expected text, found 3"),
        ({"license": ["MIT"]}, "license: expected text"),
        ({"descriptions": "Reverse."}, "descriptions: expected a sequence of texts, found 'Reverse.'"),
        ({"descriptions": None}, "descriptions: expected a sequence"),
        ({"descriptions": ["Reverse.", " "]}, "descriptions: expected texts, found ' '"),
        ({"labels": ["b", 3]}, "labels: expected texts, found 3"),
        ({"labels": "b"}, "labels: expected a sequence"),
        ({"labels": ["b", "b"]}, "labels: expected every class once"),
        ({"labels": ["c", "d"]}, r"train\[0\]: 'b' is none of its labels \('c', 'd'\)"),
        ({"metadata": ["b"]}, "metadata: expected a mapping"),
        ({"metadata": {"train": []}}, "metadata: train are fields of the task itself"),
    ],
)
def test_further_fields_are_checked(fields, message):
    with pytest.raises(TaskError, match=f"Task 't', {message}"):
        Task("t", train=[("a", "b")], **fields)


def test_metadata_that_is_no_json_is_refused(tmp_path):
    with pytest.raises(TaskError, match="'t', metadata: expected JSON values"):
        save_tasks([Task("t", demo=["x"], metadata={"set": {1}})], tmp_path / "tasks.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", LINE_ENDS)
def test_text_may_hold_any_line_end(tmp_path, end):
    tasks = [Task(f"na{end}me", train=[(f"a{end}b", f"c{end}d")], description=f"e{end}f")]
    save_tasks(tasks, tmp_path / "tasks.jsonl")
    assert load_tasks(tmp_path / "tasks.jsonl") == tasks


def test_files_of_other_programs_are_read(tmp_path):
    path = tmp_path / "tasks.jsonl"
    lines = ['{"name": "a", "train": [["p", "c"]]}', "", '{"name": "b", "test": [{"text": "t"}, "u"]}']
    path.write_bytes("\r\n".join(lines).encode())  # Windows, no newline at the end
    assert load_tasks(path) == [Task("a", train=[("p", "c")]), Task("b", test=["t", "u"])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected one task as a JSON object"),
        ("[1]", "line 2: expected one task"),
        ("3", "line 2: expected one task"),
        ('{"train": [["p", "c"]]}', "line 2: .*name"),
        ('{"name": "b", "train": [["p", "c"]], "labels": 1}', "line 2: .*labels: expected a sequence of texts"),
        ('{"name": "b", "train": [["p", ""]]}', r"line 2: .*train\[0\] to have a completion"),
        ('{"name": "b", "train": null}', "line 2: .*train.* sequence of samples"),
        ('{"name": "a", "train": [["p", "c"]]}', "Two tasks are named 'a'"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"name": "a", "demo": ["x"]}) + "\n" + line + "\n")
    with pytest.raises(TaskError, match=message):
        load_tasks(path)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tasks(tmp_path / "none.jsonl")


# Datasets


def test_dataset_dict_becomes_a_task():
    dataset = DatasetDict(
        train=Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", "y"]}),
        test=Dataset.from_dict({"text": ["t"]}),
    )
    known = {"description": "What.", "family": "f", "dataset": "d", "labels": ["x", "y", "t"]}
    task = task_from_dataset("name", dataset, **known)
    assert task == Task("name", train=[("a", "x"), ("b", "y")], test=["t"], **known)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (DatasetDict(validation=Dataset.from_dict({"text": ["t"]})), r"'name': .*found also \['validation'\]"),
        (DatasetDict(train=Dataset.from_dict({"question": ["t"]})), r"'name', train\[0\] .*'question'"),
        ({"train": [{"text": "t"}], "test": [{"text": "t"}]}, "'t' stands in 'train' and in 'test'"),
        ({}, "no samples"),
    ],
)
def test_datasets_that_are_no_task_are_refused(dataset, message):
    with pytest.raises(TaskError, match=message):
        task_from_dataset("name", dataset)
