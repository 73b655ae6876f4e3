"""The built-in suite: real tasks that need no download, in a file of this package.

Every family of tasks draws its inputs from one pool, and a pool may serve several families. Inside a pool the same
prompt has another right answer in every task ("France" is "Frankreich", "Paris", "EUR", ...), so that an adapter has
to know its task. Each pool is split once: a test input of one task is never a train or a demo input of another. A
family of translations asks for the inputs of its pool in other words ("Frankreich"), which stay in the split of what
they mean.

    pool            inputs                                          families
    countries       English names of countries and territories      country_names, country_facts, country_translations
    languages       English names of languages                      language_names, language_translations
    currencies      English names of currencies, some historical    currency_names, currency_translations
    dates           "March 5", the months and the weekdays          calendar, calendar_translations
    days            "1987-03-05"                                    full_dates
    quantities      "12 kilometers"                                 quantities, quantity_translations
    periods         "in 3 weeks", "3 weeks ago"                     relative_times
    times           "14:35"                                         clock
    numbers         0 ... 999 in digits                             number_words, ordinals, number_transforms,
                                                                    number_steps, number_translations
    large_numbers   "4183207"                                       large_numbers
    number_lists    "12, 47, 5"                                     number_lists
    amounts         "48.25 USD"                                     amounts
    words           common English nouns, verbs and adjectives      word_forms, string_transforms, string_steps
    phrases         "red apple"                                     phrases
    word_lists      "cat, engine, lake"                             word_lists
    cities          large cities and capitals                       cities

The file is JSON Lines, compressed by gzip. Its first line tells the version of the format, the number of tasks of each
family and the number of all samples. Each other line is a task: what it is called, and of each split the prompts and,
in the same order, the completions. `benchmarks/suite/make_tasks.py` makes it; `suite_data/LICENSES.md` says of what.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CorruptFileError, TaskError
from .tasks import SPLITS, Sample, Task

FORMAT = 1  # of the file
SUITE_FILE = Path(__file__).parent / "suite_data" / "tasks.jsonl.gz"


def built_in_tasks(families: Iterable[str] | None = None) -> list[Task]:
    """Return the tasks of the built-in suite, always the same ones in the same order.

    Args:
        families (`Iterable[str]`, *optional*): Families to return; all of them by default. The order is that of the
            suite, whatever the order here.

    Returns:
        `list[Task]`: The tasks, each named `family/task`.

    Raises:
        TaskError: if a family is unknown, or the package's file of the suite is missing or damaged.

    Example:
        >>> built_in_tasks(["number_words"])[0]
        Task('number_words/english': 160 train, 32 demo, 60 test)
    """
    return read_suite(SUITE_FILE, families)


def read_suite(path: str | Path, families: Iterable[str] | None = None) -> list[Task]:
    """Return the tasks of a file that is built as the module says.

    Args:
        path (`str` or `Path`): The file.
        families (`Iterable[str]`, *optional*): Families to return; all of them by default.

    Returns:
        `list[Task]`: The tasks, in the order of the file.

    Raises:
        TaskError: if the file is missing, damaged or of another format, if it holds other numbers of tasks or samples
            than its first line tells, or if a family is unknown.
    """
    wanted = families if families is None else set(families)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            header, *rows = map(json.loads, file)
        if header["format"] != FORMAT:
            raise CorruptFileError(f"expected format {FORMAT}, found {header['format']!r}")
        found: dict[str, Any] = {
            "families": dict(Counter(row["family"] for row in rows)),
            "samples": sum(len(row[split]["prompts"]) for row in rows for split in SPLITS),
        }
        told = {name: header[name] for name in found}
        if told != found:
            raise CorruptFileError(f"expected {told}, found {found}")
        tasks = [_task(row) for row in rows if wanted is None or row["family"] in wanted]
    except (OSError, EOFError, zlib.error, LookupError, TypeError, ValueError) as error:
        raise TaskError(
            f"Expected {path} to be the suite of tasks that this version of hf_icm_lora reads: "
            f"{type(error).__name__}: {error}. Install hf_icm_lora again."
        ) from error
    if unknown := sorted((wanted or set()) - set(found["families"])):
        raise TaskError(f"Unknown families {unknown}; the suite has {', '.join(found['families'])}.")
    return tasks


def _task(row: dict) -> Task:
    train, demo, test = (
        tuple(Sample(*pair) for pair in zip(row[split]["prompts"], row[split]["completions"], strict=True))
        for split in SPLITS
    )
    return Task(row["name"], train, demo, test, row["description"], row["family"])
