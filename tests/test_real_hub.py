"""benchmarks/real/hub.py: every line of the table makes a task of rows as its data set has them, by the rules."""

import random
from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from benchmarks.real.hub import HUB_TASKS, SIZES, HubTask, one_line, to_task
from hf_icm_lora import TaskError, load_tasks, save_tasks

TEXT, NUMBER = Value("string"), Value("int32")
LABELLED = {"text": Sequence(TEXT), "label": Sequence(TEXT)}
EMOTIONS = ["admiration", "amusement", "anger", "approval", "caring", "curiosity", "gratitude", "love", "optimism"]
GROUPS = ["women", "trans people", "gay people", "black people", "disabled people", "Muslims", "immigrants", None]
FEATURES = {  # the columns, as the cards of the data sets have them
    "fancyzhx/amazon_polarity": {"label": ClassLabel(names=["negative", "positive"]), "title": TEXT, "content": TEXT},
    "sealuzh/app_reviews": {"package_name": TEXT, "review": TEXT, "date": TEXT, "star": Value("int8")},
    "stanfordnlp/snli": {
        "premise": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=["entailment", "neutral", "contradiction"])
    },
    "google-research-datasets/paws": {
        "id": NUMBER, "sentence1": TEXT, "sentence2": TEXT, "label": ClassLabel(names=["0", "1"])
    },
    "google-research-datasets/go_emotions": {"text": TEXT, "labels": Sequence(ClassLabel(names=EMOTIONS)), "id": TEXT},
    "tdavidson/hate_speech_offensive": {
        "count": NUMBER, "class": ClassLabel(names=["hate speech", "offensive language", "neither"]), "tweet": TEXT
    },
    "Paul/hatecheck": {"test_case": TEXT, "label_gold": TEXT, "target_ident": TEXT},
    "UCLNLP/adversarial_qa": {
        "title": TEXT, "context": TEXT, "question": TEXT,
        "answers": {"text": Sequence(TEXT), "answer_start": Sequence(NUMBER)},
    },
    "allenai/quartz": {"question": TEXT, "choices": LABELLED, "answerKey": TEXT, "para": TEXT},
    "allenai/qasc": {"question": TEXT, "choices": LABELLED, "answerKey": TEXT, "fact1": TEXT, "fact2": TEXT},
    "allenai/common_gen": {"concept_set_idx": NUMBER, "concepts": Sequence(TEXT), "target": TEXT},
    "openai/gsm8k": {"question": TEXT, "answer": TEXT},
}  # fmt: skip


def value(name: str, feature, i: int, draws: random.Random):
    """A value of a column in the i-th row."""
    if name in ("class", "label") and isinstance(feature, ClassLabel):
        return draws.randrange(-1, feature.num_classes)  # -1: annotators disagreed
    if name == "labels":
        return draws.sample(range(len(EMOTIONS)), draws.choice([1, 1, 1, 2]))
    if name == "choices":
        return {"text": [f"one {i}", f"two {i}"], "label": ["A", "B"]}
    known = {
        "star": draws.randint(1, 5), "label_gold": draws.choice(["hateful", "non-hateful"]),
        "target_ident": draws.choice(GROUPS), "answerKey": draws.choice("AB"),
        "answers": {"text": [f"answer {i}"] if i % 9 else [], "answer_start": [3] if i % 9 else []},
        "answer": f"It is <<{i}*2={2 * i}>>{2 * i}.\n#### 1,{i:03}", "concepts": [f"dog{i}", "run"],
        "premise": f"A man & {i // 3}", "context": f"Passage {i // 4}", "para": f"Fact {i // 2}",
    }  # fmt: skip
    return known.get(name, f"{name}\n  number {i}" if feature == TEXT else i)


def rows_of(dataset: str) -> Dataset:
    draws, features = random.Random(dataset), FEATURES[dataset]
    count = 3200 if "emotions" in dataset else 1600  # a task reads two of nine emotions
    rows = [{name: value(name, feature, i, draws) for name, feature in features.items()} for i in range(count)]
    return Dataset.from_list(rows, features=Features(features))


@pytest.fixture(scope="module")
def tasks():
    rows = {dataset: rows_of(dataset) for dataset in FEATURES}
    return {spec.name: to_task(spec, rows[spec.dataset]) for spec in HUB_TASKS}


def test_the_table_is_of_known_data_sets_and_names_each_task_once():
    assert {spec.dataset for spec in HUB_TASKS} == set(FEATURES)
    assert len({spec.name for spec in HUB_TASKS}) == len(HUB_TASKS) >= 20
    assert len({spec.family for spec in HUB_TASKS}) >= 12


@pytest.mark.parametrize("spec", HUB_TASKS, ids=lambda spec: spec.name)
def test_each_line_makes_a_task_by_the_rules(tasks, spec):
    task = tasks[spec.name]
    assert (task.family, task.description, task.dataset) == (spec.family, spec.description, spec.dataset)
    for split, (fewest, most) in SIZES.items():
        samples = getattr(task, split)
        assert fewest <= len(samples) <= most
        assert max(Counter(sample.completion for sample in samples).values()) < 0.7 * len(samples)
        for text in (text for sample in samples for text in sample):
            assert text == " ".join(text.split())
            assert "None" not in text
    if spec.labels is None:
        assert task.labels is None
        return
    assert task.labels == tuple(sorted(set(spec.labels.values())))
    counts = Counter(sample.completion for sample in task.train)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_what_rows_become(tasks):
    samples = {name: dict(task.train) for name, task in tasks.items()}
    assert all(p.startswith("Title: title number ") for p in samples["amazon_polarity/sentiment"])
    assert all(answer.startswith("1") and answer.isdigit() for answer in samples["math/gsm8k"].values())
    assert all(answer.endswith(", run") for answer in samples["common_gen/concepts"].values())
    for prompt, answer in samples["quartz/answer_with_fact"].items():
        assert prompt.startswith("Fact: Fact ")
        assert answer in prompt.partition("Options: ")[2].split("; ")
    for prompt, answer in samples["adversarial_qa/question_from_answer"].items():
        assert answer == f"question number {prompt.rpartition('answer ')[2]}"


def test_inputs_are_split_once_per_data_set(tasks):
    places: dict[tuple[str, str], set[str]] = {}
    for task in tasks.values():
        for split in SIZES:
            for sample in getattr(task, split):
                text = sample.prompt.partition(" / ")[0] if task.dataset == "stanfordnlp/snli" else sample.prompt
                text = text.partition(" Question:")[0].partition(" Answer:")[0]
                places.setdefault((task.dataset, text), set()).add(split)
    assert len(places) > 1000
    assert all(len(splits) == 1 for splits in places.values())


def test_the_same_rows_give_the_same_task_in_any_order(tasks, tmp_path):
    for spec in (HUB_TASKS[4], HUB_TASKS[10]):
        rows = rows_of(spec.dataset)
        assert to_task(spec, rows.shuffle(seed=3)) == tasks[spec.name]
        assert to_task(spec, rows.to_iterable_dataset()) == tasks[spec.name]
    save_tasks(tasks.values(), tmp_path / "hub.jsonl.gz")
    assert load_tasks(tmp_path / "hub.jsonl.gz") == list(tasks.values())


SPEC = HubTask("a/b", "a", None, "train", "kind", "Say.", "MIT", "{text}", "{label}", {"x": "ex", "y": "why"})


def of_labels(labels, **more):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)] + list(more.get("rows", ()))


def test_a_prompt_with_two_labels_is_left_out_and_of_free_answers_one_is_kept():
    twice = [{"text": "Twice", "label": label} for label in "xy"]
    task = to_task(SPEC, of_labels("xy" * 200) + twice)
    assert "Twice" not in {sample.prompt for split in SIZES for sample in getattr(task, split)}
    free = HubTask("a/c", "a", None, "train", "kind", "Say.", "MIT", "{text}", "{label}")
    rows = [{"text": f"text {i}", "label": f"answer {i}"} for i in range(200)]
    other = to_task(free, [*rows, *({"text": f"text {i}", "label": f"answer {i} b"} for i in range(200))])
    assert other == to_task(free, rows)


def test_rows_that_the_rules_refuse_are_left_out():
    refused = [{"text": "t" * 901, "label": "x"}, {"text": " ", "label": "x"}, {"text": "z", "label": "z"}]
    assert to_task(SPEC, of_labels("xy" * 200) + refused) == to_task(SPEC, of_labels("xy" * 200))
    free = HubTask("a/c", "a", None, "train", "kind", "Say.", "MIT", "{text}", "{label}")
    rows = [{"text": f"text {i}", "label": f"answer {i}"} for i in range(200)]
    assert to_task(free, [*rows, {"text": "long", "label": "l" * 121}]) == to_task(free, rows)


def test_no_answer_has_most_of_a_split():
    task = to_task(SPEC, of_labels(("x" * 12 + "y") * 100))
    for split in SIZES:
        counts = Counter(sample.completion for sample in getattr(task, split))
        assert counts["ex"] < 0.7 * counts.total()
    counts = Counter(sample.completion for sample in task.train)
    assert counts.total() < SIZES["train"][1]  # all there are of the other, and as many of this as that allows
    assert counts["ex"] + 1 >= 0.7 * (counts.total() + 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (of_labels("xy" * 20), r"a/b: a gives \d+ 'train' samples of at least 32. Read more rows"),
        (of_labels("x" * 400), "gives 0 'train' samples"),
        ([], "gives 0 'train' samples"),
        ([{"txt": "a", "label": "x"}], r"a/b: a has no column 'text', only \['label', 'txt'\]"),
    ],
)
def test_rows_that_make_no_task_are_refused(rows, message):
    with pytest.raises(TaskError, match=message):
        to_task(SPEC, rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" a \n\t b\u2028c ", "a b c"), ("a<br />b <b>c</b>", "a b c"), ("a &amp; b &lt; 3", "a & b < 3"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"), ("a\x00b", "a b"), ("naïve 日本 🙂", "naïve 日本 🙂"),
    ],
)  # fmt: skip
def test_texts_are_one_line(text, expected):
    assert one_line(text) == expected
