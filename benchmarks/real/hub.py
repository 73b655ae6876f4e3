"""Real tasks from the Hugging Face Hub, for who has a connection: `python -m benchmarks.real.hub`.

    python -m benchmarks.real.hub --output build/real/hub.jsonl.gz

`HUB_TASKS` is a table: the id of a data set, its configuration and split, and how a row becomes a sample. `to_task`
makes a `Task` of the rows by the rules of the real tasks: one line of text each way, bounded lengths, balanced
classes, no answer with 70 % of a split, and inputs that are split once per data set, by their hash. All data sets of
the table are stored on the Hub as Parquet or CSV, and no code of theirs is run.
"""

import hashlib
import html
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_icm_lora import Sample, Task, TaskError, save_tasks

Row = Mapping[str, Any]
Text = str | Callable[[Row], str | None]  # a format string over the columns, or a function of the row

LONGEST_PROMPT, LONGEST_ANSWER = 900, 120  # characters
SIZES = {"train": (32, 256), "demo": (16, 32), "test": (24, 64)}  # fewest and most samples of a split
TEST_SHARE, DEMO_SHARE = 0.2, 0.1  # of a data set's inputs
MOST_OF_ONE_ANSWER = 0.7


@dataclass(frozen=True)
class HubTask:
    """A task as a view of a data set on the Hub.

    Args:
        name (`str`): `dataset/task`.
        dataset (`str`), config (`str`, *optional*), split (`str`): What `datasets.load_dataset` loads.
        family (`str`): The kind of the task.
        description (`str`): The task in a sentence.
        license (`str`): Of the samples, as the data set's card has it.
        prompt, answer: A format string over the columns, or a function of the row. Rows without an answer are left
            out; of several answers to one prompt, one is kept.
        labels (`Mapping[str, str]`, *optional*): For a classification: answer -> label. Rows with others are left out.
            Columns of class labels have their names, not their numbers.
        key: What inputs are split by; by default the prompt. Tasks of one data set share it.
    """

    name: str
    dataset: str
    config: str | None
    split: str
    family: str
    description: str
    license: str
    prompt: Text
    answer: Text
    labels: Mapping[str, str] | None = None
    key: Text | None = None


def themselves(*labels: str) -> dict[str, str]:
    return {label: label for label in labels}


def only_emotion(row: Row) -> str | None:
    """Annotators of GoEmotions may name several."""
    return row["labels"][0] if len(row["labels"]) == 1 else None


def first_answer(row: Row) -> str | None:
    return next(iter(row["answers"]["text"]), None)


def passage_and_answer(row: Row) -> str | None:
    answer = first_answer(row)
    return answer and f"Passage: {row['context']} Answer: {answer}"


def options(row: Row) -> str:
    return "; ".join(row["choices"]["text"])


def right_option(row: Row) -> str | None:
    return dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True)).get(row["answerKey"])


def final_number(row: Row) -> str:
    return row["answer"].rpartition("####")[2].replace(",", "")


def hypothesis_if(label: str) -> Callable[[Row], str | None]:
    return lambda row: row["hypothesis"] if row["label"] == label else None


AMAZON = ("fancyzhx/amazon_polarity", None, "test", "sentiment")
APPS = ("sealuzh/app_reviews", None, "train", "rating")
SNLI = ("stanfordnlp/snli", None, "train")
PAWS = ("google-research-datasets/paws", "labeled_final", "train", "paraphrase")
EMOTIONS = ("google-research-datasets/go_emotions", "simplified", "train", "emotion")
TWEETS = ("tdavidson/hate_speech_offensive", None, "train", "toxicity")
HATECHECK = ("Paul/hatecheck", None, "test", "toxicity")
PASSAGES = ("UCLNLP/adversarial_qa", "adversarialQA", "train")
QUARTZ = ("allenai/quartz", None, "train", "qa_multiple_choice")
QASC = ("allenai/qasc", None, "train")
CONCEPTS = ("allenai/common_gen", None, "train")
GSM8K = ("openai/gsm8k", "main", "train", "math_word_problem")

REVIEW, PAIR = "Title: {title} Review: {content}", "{premise} / {hypothesis}"
FACTS = "Facts: {fact1} {fact2} Question: {question}"
SNLI_LICENSE, FREE = "CC BY-SA 4.0", "free for any purpose (Google)"

HUB_TASKS: tuple[HubTask, ...] = (
    HubTask(
        "amazon_polarity/sentiment", *AMAZON, "Decide whether the product review is positive or negative.",
        "Apache-2.0", REVIEW, "{label}", themselves("negative", "positive"),
    ),
    HubTask(
        "amazon_polarity/recommend", *AMAZON,
        "Would the author of this review recommend the product? Answer yes or no.",
        "Apache-2.0", REVIEW, "{label}", {"negative": "no", "positive": "yes"},
    ),
    HubTask(
        "app_reviews/stars", *APPS, "Guess the star rating from 1 to 5 that came with this app review.",
        "unknown", "{review}", "{star}", themselves(*"12345"),
    ),
    HubTask(
        "app_reviews/would_recommend", *APPS,
        "Would the user recommend this app? Answer not at all, no, maybe, yes or definitely.",
        "unknown", "{review}", "{star}", {"1": "not at all", "2": "no", "3": "maybe", "4": "yes", "5": "definitely"},
    ),
    HubTask(
        "snli/three_way", *SNLI, "nli",
        "Does the first sentence entail the second, contradict it, or is it neutral? "
        "Answer entailment, contradiction or neutral.",
        SNLI_LICENSE, PAIR, "{label}", themselves("entailment", "neutral", "contradiction"), "{premise}",
    ),
    HubTask(
        "snli/contradiction", *SNLI, "nli", "Do the two sentences contradict each other? Yes or no.",
        SNLI_LICENSE, PAIR, "{label}", {"entailment": "no", "neutral": "no", "contradiction": "yes"}, "{premise}",
    ),
    HubTask(
        "snli/write_entailed", *SNLI, "entailment_generation",
        "Write a simpler sentence that must be true given the caption.",
        SNLI_LICENSE, "{premise}", hypothesis_if("entailment"), None, "{premise}",
    ),
    HubTask(
        "snli/write_contradiction", *SNLI, "contradiction_generation",
        "Write a sentence that contradicts the caption.",
        SNLI_LICENSE, "{premise}", hypothesis_if("contradiction"), None, "{premise}",
    ),
    HubTask(
        "paws/paraphrase", *PAWS, "Do the two sentences, divided by a slash, mean the same? Answer yes or no.",
        FREE, "{sentence1} / {sentence2}", "{label}", {"0": "no", "1": "yes"},
    ),
    HubTask(
        "paws/same_or_different", *PAWS,
        "Compare two sentences split by a slash: is their meaning the same or different?",
        FREE, "{sentence1} / {sentence2}", "{label}", {"0": "different", "1": "same"},
    ),
    HubTask(
        "go_emotions/curiosity_or_approval", *EMOTIONS, "Does the comment show curiosity or approval?",
        "Apache-2.0", "{text}", only_emotion, themselves("curiosity", "approval"),
    ),
    HubTask(
        "go_emotions/gratitude_or_anger", *EMOTIONS, "Does the comment show gratitude or anger?",
        "Apache-2.0", "{text}", only_emotion, themselves("gratitude", "anger"),
    ),
    HubTask(
        "go_emotions/love_admiration_caring", *EMOTIONS,
        "Does the comment express love, admiration, caring or optimism?",
        "Apache-2.0", "{text}", only_emotion, themselves("love", "admiration", "caring", "optimism"),
    ),
    HubTask(
        "davidson_hate/offensive", *TWEETS, "Is the tweet offensive or fine?",
        "unknown on the Hub, MIT at its source", "{tweet}", "{class}",
        {"offensive language": "offensive", "neither": "fine"},
    ),
    HubTask(
        "hatecheck/hateful", *HATECHECK, "Is the statement hateful or acceptable?",
        "CC BY 4.0", "{test_case}", "{label_gold}", {"hateful": "hateful", "non-hateful": "acceptable"},
    ),
    HubTask(
        "hatecheck/target", *HATECHECK,
        "Which group is the statement about: women, trans people, gay people, black people, disabled people, Muslims "
        "or immigrants?",
        "CC BY 4.0", "{test_case}", "{target_ident}",
        themselves("women", "trans people", "gay people", "black people", "disabled people", "Muslims", "immigrants"),
    ),
    HubTask(
        "adversarial_qa/answer", *PASSAGES, "qa_extractive", "Answer the question with words taken from the passage.",
        "CC BY-SA 4.0", "Passage: {context} Question: {question}", first_answer, None, "{context}",
    ),
    HubTask(
        "adversarial_qa/question_from_answer", *PASSAGES, "question_generation",
        "Write a question about the passage that has the given answer.",
        "CC BY-SA 4.0", passage_and_answer, "{question}", None, "{context}",
    ),
    HubTask(
        "quartz/answer_with_fact", *QUARTZ,
        "Answer the question with the help of the fact, choosing one of the words it offers.",
        "CC BY 4.0", lambda row: f"Fact: {row['para']} Question: {row['question']} Options: {options(row)}",
        right_option, None, "{para}",
    ),
    HubTask(
        "qasc/answer_from_facts", *QASC, "qa_open", "Answer the science question from the two facts in a few words.",
        "CC BY 4.0", FACTS, right_option, None, "{question}",
    ),
    HubTask(
        "common_gen/concepts", *CONCEPTS, "keyword_extraction",
        "List the key concepts of the sentence in their base form, separated by commas.",
        "MIT", "{target}", lambda row: ", ".join(row["concepts"]),
    ),
    HubTask(
        "math/gsm8k", *GSM8K, "Solve the word problem and give only the final number.",
        "MIT", "{question}", final_number,
    ),
)  # fmt: skip


def one_line(text: str) -> str:
    """Return a text without tags, entities, control characters and runs of blanks."""
    text = re.sub(r"</?[a-zA-Z][^<>]*>", " ", html.unescape(text))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def to_task(spec: HubTask, dataset: Dataset | IterableDataset | Iterable[Row]) -> Task:
    """Make a task of the rows of a data set.

    Args:
        spec (`HubTask`): A line of the table.
        dataset (`datasets.Dataset`): The rows, with the columns that the line names. All are read.

    Returns:
        `Task`: With 32 to 256 train, 16 to 32 demo and 24 to 64 test samples. The same rows give the same task in any
        order.

    Raises:
        TaskError: if the rows do not give that many samples, or lack a column.
    """
    features = getattr(dataset, "features", None) or {}  # of plain rows there are none
    answers: dict[str, set[str]] = defaultdict(set)
    keys: dict[str, str] = {}
    for row in dataset:
        if (found := _sample(spec, {name: _named(value, features.get(name)) for name, value in row.items()})) is None:
            continue
        sample, key = found
        answers[sample.prompt].add(sample.completion)
        keys[sample.prompt] = key
    splits: dict[str, list[Sample]] = {split: [] for split in SIZES}
    for prompt in sorted(answers, key=_fraction):  # by chance, and the same chance always
        if spec.labels is None or len(answers[prompt]) == 1:  # two labels contradict each other
            splits[_split_of(spec.dataset, keys[prompt])].append(Sample(prompt, min(answers[prompt])))
    chosen = {split: _balanced(samples, spec.labels is not None, SIZES[split][1]) for split, samples in splits.items()}
    labels = sorted({sample.completion for sample in chosen["train"]}) if spec.labels else None
    for split, samples in chosen.items():
        if labels is not None:
            samples[:] = [sample for sample in samples if sample.completion in labels]
        if len(samples) < SIZES[split][0]:
            raise TaskError(
                f"{spec.name}: {spec.dataset} gives {len(samples)} {split!r} samples of at least {SIZES[split][0]}. "
                "Read more rows."
            )
    return Task(
        spec.name,
        **chosen,
        description=spec.description,
        family=spec.family,
        labels=labels,
        dataset=spec.dataset,
        license=spec.license,
        metadata={"source": f"https://huggingface.co/datasets/{spec.dataset}"},
    )


def _named(value: Any, feature: Any) -> Any:
    """Return the names of class labels in place of their numbers; none for -1, which says that there is no label."""
    if isinstance(feature, ClassLabel):
        return feature.names[value] if value is not None and value >= 0 else None
    inner = getattr(feature, "feature", None)  # of a list
    return [_named(one, inner) for one in value] if isinstance(inner, ClassLabel) and value else value


def _sample(spec: HubTask, row: Row) -> tuple[Sample, str] | None:
    """Return the sample of a row, and what it is split by; none if the rules leave it out."""
    prompt, answer = _text(spec, spec.prompt, row), _text(spec, spec.answer, row)
    if spec.labels is not None:
        answer = spec.labels.get(answer or "")
    if not prompt or not answer or len(prompt) > LONGEST_PROMPT or len(answer) > LONGEST_ANSWER:
        return None
    return Sample(prompt, answer), _text(spec, spec.key or spec.prompt, row) or ""


def _text(spec: HubTask, part: Text, row: Row) -> str | None:
    try:
        text = part.format(**row) if isinstance(part, str) else part(row)
    except KeyError as error:
        raise TaskError(f"{spec.name}: {spec.dataset} has no column {error}, only {sorted(row)}.") from error
    return None if text is None else one_line(text)


def _fraction(text: str) -> float:
    """Return a number from 0 to 1 that follows from the text's words, whatever their case and punctuation."""
    words = re.sub(r"\W+", " ", text.lower()).strip() or text
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64


def _split_of(dataset: str, key: str) -> str:
    place = _fraction(f"{dataset}: {key}")
    return "test" if place < TEST_SHARE else "demo" if place < TEST_SHARE + DEMO_SHARE else "train"


def _balanced(samples: Sequence[Sample], by_class: bool, most: int) -> list[Sample]:
    """Return at most so many samples, the classes in turn, and none of the answers with 70 % of them."""
    classes: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        classes[sample.completion if by_class else ""].append(sample)
    turns = (sample for turn in zip_longest(*classes.values()) for sample in turn if sample is not None)
    kept = list(islice(turns, most))
    while kept:
        answer, count = Counter(sample.completion for sample in kept).most_common(1)[0]
        if count < MOST_OF_ONE_ANSWER * len(kept):
            break
        kept.pop(max(place for place, sample in enumerate(kept) if sample.completion == answer))
    return kept


def rows_of(spec: HubTask, num_rows: int) -> Dataset:
    """Load the first rows of a task's data set from the Hub, without the rest of it."""
    stream = load_dataset(spec.dataset, spec.config, split=spec.split, streaming=True)
    return Dataset.from_list(list(stream.take(num_rows)), features=stream.features)


@dataclass
class HubOptions:
    output: str = field(default="build/real/hub.jsonl.gz", metadata={"help": "Where the tasks go."})
    names: list[str] | None = field(default=None, metadata={"help": "Some of the table's tasks; all by default."})
    num_rows: int = field(default=8000, metadata={"help": "Rows to read of each data set."})


def main() -> None:
    (options,) = HfArgumentParser(HubOptions).parse_args_into_dataclasses()
    chosen = [spec for spec in HUB_TASKS if options.names is None or spec.name in options.names]
    loaded: dict[str, Dataset] = {}
    tasks = []
    for spec in tqdm(chosen):
        if spec.dataset not in loaded:  # its tasks read the same rows
            loaded[spec.dataset] = rows_of(spec, options.num_rows)
        tasks.append(to_task(spec, loaded[spec.dataset]))
    save_tasks(tasks, options.output)
    print(f"{len(tasks)} tasks in {options.output}")


if __name__ == "__main__":
    main()
