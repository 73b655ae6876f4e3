"""The built-in suite: its size, its splits, and its file. How it is made: `benchmarks/suite/test_make_tasks.py`."""

import gzip
import hashlib
import json
import statistics
from collections import Counter, defaultdict
from itertools import combinations, groupby
from pathlib import Path

import pytest

from hf_icm_lora import Task, built_in_tasks
from hf_icm_lora.errors import TaskError
from hf_icm_lora.suite import SUITE_FILE, read_suite
from hf_icm_lora.tasks import SPLITS

ROOT = Path(__file__).parent.parent
# Of every name, description and sample, in its split and in order: adapters and results of these tasks exist.
DIGEST = "1aba4757a05d73db26adf50f8f522ad8c13132a83807ab359ad9e66e9f2c1c45"

# Families that ask for the inputs of other families in other words.
ASKED_IN_OTHER_WORDS = {
    "country_translations": {"country_names", "country_facts"},
    "language_translations": {"language_names"},
    "currency_translations": {"currency_names"},
    "calendar_translations": {"calendar"},
    "quantity_translations": {"quantities"},
    "number_translations": {"number_words", "ordinals", "number_transforms", "number_steps"},
}
TRANSLATIONS = {"country_names", "language_names", "currency_names", "calendar", "quantities", "number_words",
                *ASKED_IN_OTHER_WORDS}  # fmt: skip
SHARED_POOLS = [  # families that draw from one pool
    {"country_names", "country_facts"},
    {"number_words", "ordinals", "number_transforms", "number_steps"},
    {"word_forms", "string_transforms", "string_steps"},
]


@pytest.fixture(scope="module")
def tasks():
    return built_in_tasks()


@pytest.fixture(scope="module")
def answers(tasks):
    return {task.name: dict([*task.train, *task.demo, *task.test]) for task in tasks}


def test_size_and_names(tasks):
    assert len(tasks) == 1222
    families = Counter(task.family for task in tasks)
    assert len(families) == 28
    assert min(families.values()) >= 15
    assert list(families) == [family for family, _ in groupby(task.family for task in tasks)]
    assert len({task.name for task in tasks}) == len(tasks)
    assert all(task.name.startswith(f"{task.family}/") for task in tasks)


def test_no_sample_ever_changes(tasks):
    fields = ("name", "train", "demo", "test", "description", "family")
    told = [{field: getattr(task, field) for field in fields} for task in tasks]
    assert hashlib.sha256(repr(told).encode()).hexdigest() == DIGEST


def test_the_benchmark_has_a_use_for_every_task(tasks):
    splits = json.loads((ROOT / "benchmarks" / "suite" / "splits.json").read_text(encoding="utf-8"))
    assert sorted(name for names in splits.values() for name in names) == sorted(task.name for task in tasks)


def test_descriptions_are_distinct_sentences(tasks):
    assert len({task.description for task in tasks}) == len(tasks)
    assert all(task.description[0].isupper() and task.description.endswith(".") for task in tasks)


def test_samples_are_short_plain_text(tasks):
    for task in tasks:
        for split in SPLITS:
            samples = getattr(task, split)
            assert len({sample.prompt for sample in samples}) == len(samples)
            for prompt, completion in samples:
                assert prompt.isascii() or task.family in ASKED_IN_OTHER_WORDS
                assert prompt == prompt.strip()
                assert completion == " ".join(completion.split())
                assert 0 < len(completion) <= 40


def test_split_sizes(tasks):
    assert all(len(task.train) <= 160 and len(task.demo) <= 32 and len(task.test) <= 60 for task in tasks)
    assert [task.name for task in tasks if len(task.test) < 40] == []
    assert [task.name for task in tasks if len(task.demo) < 24] == []
    assert [task.name for task in tasks if len(task.train) < 80] == []


def test_a_test_input_is_no_input_of_another_split_anywhere(tasks):
    splits = defaultdict(set)
    for task in tasks:
        for split in SPLITS:
            for prompt, _ in getattr(task, split):
                splits[prompt].add(split)
    assert {prompt: where for prompt, where in splits.items() if len(where) > 1} == {}


@pytest.mark.parametrize("family", ASKED_IN_OTHER_WORDS)
def test_what_a_test_prompt_means_is_asked_in_no_other_split(tasks, answers, family):
    meanings = {}
    for name in answers:
        if name.startswith(f"{family}/") and name.endswith("_to_english"):
            for prompt, english in answers[name].items():
                assert meanings.setdefault(prompt, english) == english
    in_words = answers["number_words/english"] if family == "number_translations" else {}
    splits, asked = defaultdict(set), 0
    for task in tasks:
        for split in SPLITS:
            for prompt, _ in getattr(task, split):
                if task.family == family and prompt in meanings:
                    splits[meanings[prompt]].add(split)
                    asked += 1
                elif task.family in ASKED_IN_OTHER_WORDS[family]:
                    splits[in_words.get(prompt, prompt)].add(split)
    assert asked > 2000
    assert {meaning: where for meaning, where in splits.items() if len(where) > 1} == {}


@pytest.mark.parametrize("families", SHARED_POOLS, ids=lambda families: "+".join(sorted(families)))
def test_families_of_a_pool_share_their_inputs(tasks, families):
    tests = defaultdict(set)
    for task in tasks:
        if task.family in families:
            tests[task.family] |= {prompt for prompt, _ in task.test}
    assert len(set.intersection(*tests.values())) >= 40


def test_a_prompt_has_other_answers_in_other_tasks(tasks):
    found = defaultdict(lambda: defaultdict(set))
    for task in tasks:
        for split in SPLITS:
            for prompt, completion in getattr(task, split):
                found[task.family][prompt].add(completion)
    assert len(found["country_names"]["Spain"] | found["country_facts"]["Spain"]) >= 18
    for family, prompts in found.items():
        least = 2 if family in ASKED_IN_OTHER_WORDS else 3
        assert statistics.median(map(len, prompts.values())) >= least, family


def test_no_two_tasks_give_mostly_the_same_answers(answers):
    givers = defaultdict(list)
    for name, own in answers.items():
        for sample in own.items():
            givers[sample].append(name)
    alike = Counter(pair for names in givers.values() for pair in combinations(names, 2))
    shares = {pair: number / min(len(answers[name]) for name in pair) for pair, number in alike.items()}
    assert max(shares.values()) > 0.5  # yes and no, for one
    assert {pair: share for pair, share in shares.items() if share > 0.66} == {}


def test_no_task_has_mostly_one_answer(answers):
    for name, own in answers.items():
        (_, often), *_ = Counter(own.values()).most_common(1)
        assert often <= 0.6 * len(own) or name == "language_names/script", name


def test_translations_are_not_mostly_copies(tasks, answers):
    for task in tasks:
        if task.family in TRANSLATIONS:
            own = answers[task.name]
            assert sum(prompt == completion for prompt, completion in own.items()) <= len(own) / 2, task.name


def test_families_select_and_keep_the_order(tasks):
    some = built_in_tasks(["ordinals", "calendar"])
    assert some == [task for task in tasks if task.family in ("calendar", "ordinals")]
    assert built_in_tasks([]) == []


def test_unknown_family_names_the_known_ones():
    with pytest.raises(TaskError, match=r"'colours'.*country_names.*cities"):
        built_in_tasks(["clock", "colours"])


def test_the_sources_of_the_file_are_named_beside_it():
    licenses = (SUITE_FILE.parent / "LICENSES.md").read_text(encoding="utf-8")
    for source in ("CLDR", "UNICODE LICENSE V3", "GeoNames", "CC BY 4.0", "num2words", "inflect", "Babel"):
        assert source in licenses


SHIFT = {"prompts": ["ab"], "completions": ["bc"]}
HEADER = {"format": 1, "families": {"shift": 1}, "samples": 3}
ROW = {
    "name": "shift/1", "family": "shift", "description": "Shift each letter.",
    "train": SHIFT, "demo": {"prompts": ["cd"], "completions": ["de"]},
    "test": {"prompts": ["\u2028"], "completions": ["x"]},
}  # fmt: skip


def packed(*rows) -> bytes:
    return gzip.compress("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def test_reads_any_file_of_the_format(tmp_path):
    (tmp_path / "tasks.jsonl.gz").write_bytes(packed(HEADER, ROW))
    assert read_suite(tmp_path / "tasks.jsonl.gz") == [
        Task("shift/1", [("ab", "bc")], [("cd", "de")], [("\u2028", "x")], "Shift each letter.", "shift")
    ]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "No such file"),
        (b"", "not enough values to unpack"),
        (b"{}", "BadGzipFile"),
        (SUITE_FILE.read_bytes()[:-1000], "EOFError"),
        (flipped(SUITE_FILE.read_bytes()), "Error"),
        (packed(HEADER | {"format": 2, "families": None}, ROW), "expected format 1, found 2"),
        (packed({"families": {"shift": 1}, "samples": 3}, ROW), "KeyError: 'format'"),
        (packed([], ROW), "TypeError"),
        (packed(HEADER, ROW, ROW), r"expected .*'shift': 1.*, found .*'shift': 2"),
        (packed(HEADER), r"expected .*'samples': 3.*, found .*'samples': 0"),
        (packed(HEADER | {"samples": 4}, ROW), r"expected .*'samples': 4.*, found .*'samples': 3"),
        (packed(HEADER, ROW | {"test": SHIFT}), "'ab' stands in 'train' and in 'test'"),
        (packed(HEADER, ROW | {"test": {"prompts": ["ef"], "completions": []}}), "shorter than argument 1"),
        (packed(HEADER, {"family": "shift"}), "KeyError: 'train'"),
    ],
    ids=[
        "missing", "empty", "not gzip", "cut", "flipped", "newer", "no format", "no header", "too many tasks",
        "no tasks", "too few samples", "overlap", "no completion", "no samples",
    ],
)  # fmt: skip
def test_a_file_that_is_missing_damaged_or_newer_is_named(tmp_path, content, match):
    path = tmp_path / "tasks.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TaskError, match=f"(?s)tasks.jsonl.gz to be the suite.*{match}.*Install hf_icm_lora again"):
        read_suite(path)
