"""A task as a closed form reads it: examples one after another in a conversation, and each alone; or a description."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .completion import CHAT, IGNORED, encode_prompt, is_chat, render, render_description
from .errors import TaskError
from .tasks import Sample

MAX_EXAMPLES = 32  # that are read one after another; more are read in turns
MAX_LENGTH = 2048  # tokens that are read in one go


class Conversation(NamedTuple):
    """Examples one after another, in one sequence.

    Args:
        ids (`list[int]`): All tokens.
        order (`list[int]`): Which example comes when.
        starts (`list[int]`): Where the token stands that predicts the first one of each answer.
    """

    ids: list[int]
    order: list[int]
    starts: list[int]


@dataclass(frozen=True)
class Reading:
    """What is read of a task.

    Args:
        conversations (`list[Conversation]`): The examples in their context, each in one of them or in more; of a
            description alone, one without examples.
        rows (`list[list[int]]`): Each example alone: prompt and answer.
        starts (`list[int]`): As in [`Conversation`], of the rows.
        answers (`list[list[int]]`): The tokens of each answer, with what ends it.
    """

    conversations: list[Conversation]
    rows: list[list[int]]
    starts: list[int]
    answers: list[list[int]]

    def batch(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the rows as `input_ids` `(n, length)`. What pads one on its right changes nothing before it."""
        length = max(map(len, self.rows))
        return {"input_ids": torch.tensor([row + [0] * (length - len(row)) for row in self.rows], device=device)}

    def labels(self, device: torch.device) -> torch.Tensor:
        """Return the answers where they stand in the rows `(n, length)`, and `IGNORED` elsewhere."""
        length = max(map(len, self.rows))
        rows = [[IGNORED] * (start + 1) + answer for start, answer in zip(self.starts, self.answers, strict=True)]
        return torch.tensor([row + [IGNORED] * (length - len(row)) for row in rows], device=device)


def read_examples(
    processing_class,
    samples: Sequence[Sample],
    template: str,
    description: str | None = None,
    num_orders: int = 1,
    max_length: int = MAX_LENGTH,
) -> Reading:
    """Tokenize the examples of a task: one after another, and each alone.

    Args:
        processing_class: The base model's tokenizer.
        samples (`Sequence[Sample]`): At least one.
        template (`str`): As in [`CompletionCollator`].
        description (`str`, *optional*): Read before the examples.
        num_orders (`int`, *optional*, defaults to 1): In how many orders the examples are read: as they are given,
            backwards, and then rotated.
        max_length (`int`, *optional*, defaults to 2048): Tokens of a conversation. What is longer becomes several.

    Raises:
        TaskError: if there is no example, or one is longer than that alone.
    """
    if not samples:
        raise TaskError("Expected at least one example to read, found none.")
    alone = [_encode(processing_class, [sample], template)[0] for sample in samples]
    conversations = []
    for order in _orders(len(samples), num_orders):
        count = -(-len(samples) // MAX_EXAMPLES)
        parts = _conversations(processing_class, samples, template, description, order, count)
        while max(len(part.ids) for part in parts) > max_length:
            if len(parts) == len(samples):
                longest = max(parts, key=lambda part: len(part.ids))
                raise TaskError(
                    f"examples[{longest.order[0]}] has {len(longest.ids)} tokens with what is read before it, and "
                    f"{max_length} at most can be read. Shorten it."
                )
            count = min(len(samples), count + 1)
            parts = _conversations(processing_class, samples, template, description, order, count)
        conversations += parts
    return Reading(
        conversations,
        rows=[prompt + answer for prompt, answer in alone],
        starts=[len(prompt) - 1 for prompt, _ in alone],
        answers=[answer for _, answer in alone],
    )


def read_description(processing_class, description: str, template: str, max_length: int = MAX_LENGTH) -> Reading:
    """Tokenize the description of a task, without examples.

    Args:
        processing_class, template, max_length: As in [`read_examples`].
        description (`str`): What the task is.

    Raises:
        TaskError: if it is longer than that.
    """
    text = render_description(description, template, processing_class)
    ids = encode_prompt(processing_class, text, in_chat=template == CHAT)
    if len(ids) > max_length:
        raise TaskError(f"The description has {len(ids)} tokens, and {max_length} at most can be read. Shorten it.")
    return Reading([Conversation(ids, [], [])], rows=[], starts=[], answers=[])


def longest_reading(base_model: PreTrainedModel, processing_class) -> int:
    """Return how many tokens a base model can be given in one go, at most `MAX_LENGTH`."""
    of_base = getattr(base_model.config, "max_position_embeddings", None) or MAX_LENGTH
    return min(MAX_LENGTH, of_base, getattr(processing_class, "model_max_length", MAX_LENGTH))


def _orders(count: int, num_orders: int) -> list[list[int]]:
    forwards = list(range(count))
    orders = [forwards, forwards[::-1]]
    for turn in range(2, num_orders):
        shift = count * (turn - 1) // (num_orders - 1)
        orders.append(forwards[shift:] + forwards[:shift])
    return orders[:num_orders]


def _conversations(
    processing_class, samples: Sequence[Sample], template: str, description: str | None, order: list[int], count: int
) -> list[Conversation]:
    """Cut an order into a number of conversations of about as many examples each."""
    edges = [len(order) * part // count for part in range(count + 1)]
    conversations = []
    for start, stop in pairwise(edges):
        part = order[start:stop]
        ids: list[int] = []
        starts = []
        for prompt, answer in _encode(processing_class, [samples[index] for index in part], template, description):
            starts.append(len(ids) + len(prompt) - 1)
            ids += prompt + answer
        conversations.append(Conversation(ids, part, starts))
    return conversations


def _encode(
    processing_class, samples: Sequence[Sample], template: str, description: str | None = None
) -> list[tuple[list[int], list[int]]]:
    """Return, per sample, the tokens up to its answer, from the end of the answer before, and those of the answer."""
    pieces, done = [], ""
    for index, sample in enumerate(samples):
        read, scored = render(sample, template, processing_class, samples[:index], description)
        if not read.startswith(done):
            raise TaskError(
                "The tokenizer's chat template rewrites an answer once it is followed by another turn, so examples "
                f"cannot be read one after another: {done[-100:]!r} became {read[: len(done)][-100:]!r}. Use a "
                "template with {prompt} and {completion}."
            )
        prompt, done = read[len(done) :], read + scored
        if index or is_chat(sample, template):
            prompt_ids = processing_class(prompt, add_special_tokens=False)["input_ids"]
        else:
            prompt_ids = encode_prompt(processing_class, prompt)
        answer_ids = processing_class(scored, add_special_tokens=False)["input_ids"]
        if not sample.prompt and processing_class.bos_token_id is None:  # nothing could predict its first token
            prompt_ids, answer_ids = prompt_ids + answer_ids[:1], answer_ids[1:]
        pieces.append((prompt_ids, answer_ids))
    return pieces


def positions(starts: Sequence[int], answers: Sequence[Sequence[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the tokens of answers are predicted `(n, a)`, and which of these there are."""
    lengths = [len(answer) for answer in answers]
    steps = torch.arange(max(lengths, default=0), device=device)
    mask = steps < torch.tensor(lengths, dtype=torch.long, device=device)[:, None]
    return (torch.tensor(list(starts), dtype=torch.long, device=device)[:, None] + steps) * mask, mask
