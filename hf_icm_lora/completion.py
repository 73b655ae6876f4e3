"""Samples as the base model sees them: text from a template, batches of ids and labels, the loss on completions.

Decoder-only and encoder-decoder models differ here and nowhere else in the package.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import logging

from .errors import ArgumentError, TaskError
from .tasks import Sample

logger = logging.get_logger(__name__)

DEFAULT_TEMPLATE = "- {prompt}: {completion}\n"  # few tokens: every pass pays for them
CHAT = "chat"  # in the place of a template: the tokenizer's own chat template
MOST_LABELS = 16  # of a classification whose labels are all scored: each costs a pass over its prompt
IGNORED = -100  # the label that no loss counts, as everywhere in transformers


def render(
    sample: Sample,
    template: str,
    processing_class,
    examples: Sequence[Sample] = (),
    description: str | None = None,
) -> tuple[str, str]:
    """Return a sample as (text that is read, text that is scored).

    The text after the completion is scored too: it is how the model says that it has finished.

    In a template with `{prompt}` and `{completion}`, the description is a line of its own before everything, and each
    example stands before the prompt in the same template. The space before a completion belongs to it, since that is
    how tokenizers cut words.

    In the template `"chat"`, the text is that of the tokenizer's own chat template: the description is the system
    prompt, the examples are earlier turns, and what is read ends where the assistant is about to answer. Without a
    description there is the system prompt that the chat template has by default, if any.

    A sample without a prompt is plain text, which no template changes.

    Args:
        sample (`Sample`): The sample.
        template (`str`): Text with `{prompt}` and `{completion}`, or `"chat"`.
        processing_class: The tokenizer; only the template `"chat"` asks it for anything.
        examples (`Sequence[Sample]`, *optional*): What is read before the sample.
        description (`str`, *optional*): What the task is, read before that.

    Raises:
        TaskError: if the template lacks `{prompt}` or `{completion}`, or has them in the wrong order; or if the
            tokenizer has no chat template, or one in which this conversation cannot be written.

    Example:
        >>> render(Sample("France", "Paris"), "- {prompt}: {completion}\\n", None)
        ('- France:', ' Paris\\n')
        >>> render(Sample("France", "Paris"), "chat", tokenizer)  # doctest: +SKIP
        ('<|im_start|>user\\nFrance<|im_end|>\\n<|im_start|>assistant\\n', 'Paris<|im_end|>')
    """
    if template == CHAT and any(one.prompt for one in (*examples, sample)):
        return _render_chat(sample, processing_class, examples, description)
    heading = f"{description}\n" if description else ""
    shown = "".join("".join(_fill(example, template)) for example in examples)
    read, scored = _fill(sample, template)
    return heading + shown + read, scored


def render_description(description: str, template: str, processing_class) -> str:
    """Return what stands before the prompt of the first sample after a description, as in [`render`].

    Raises:
        TaskError: as [`render`].

    Example:
        >>> render_description("Give the capital.", "- {prompt}: {completion}\\n", None)
        'Give the capital.\\n'
    """
    if template != CHAT:
        return f"{description}\n"
    mark = "\x00"  # stands in for the prompt
    return _render_chat(Sample(mark, mark), processing_class, (), description)[0].partition(mark)[0]


def is_chat(sample: Sample, template: str) -> bool:
    """Return whether a sample becomes turns of a chat. Their text holds all special tokens, so none may be added."""
    return template == CHAT and bool(sample.prompt)


def _fill(sample: Sample, template: str) -> tuple[str, str]:
    head, found_prompt, rest = template.partition("{prompt}")
    middle, found_completion, end = rest.partition("{completion}")
    if template != CHAT and not (found_prompt and found_completion):
        raise TaskError(
            f"Expected a template with {{prompt}} and, after it, {{completion}}, or {CHAT!r}; found {template!r}."
        )
    if not sample.prompt:
        return "", sample.completion
    stripped = middle.rstrip(" ")
    return head + sample.prompt + stripped, middle[len(stripped) :] + sample.completion + end


def _render_chat(
    sample: Sample, processing_class, examples: Sequence[Sample], description: str | None
) -> tuple[str, str]:
    if not all(one.prompt for one in (*examples, sample)):
        raise TaskError(
            "Expected a prompt in every sample of a chat, found plain text among them. Give either plain text alone, "
            "which no template changes, or prompts to all."
        )
    messages = [{"role": "system", "content": description}] if description else []
    for user, assistant in (*examples, sample):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    read = _chat_text(processing_class, messages[:-1], add_generation_prompt=True)
    whole = _chat_text(processing_class, messages, add_generation_prompt=False)
    if not whole.startswith(read):
        raise TaskError(
            "The tokenizer's chat template changes the text before an answer once the answer is there, so what is "
            f"read cannot be told from what is scored: {read[-100:]!r} became {whole[-200:]!r}. Use a template with "
            "{prompt} and {completion}, or another chat_template."
        )
    scored = whole[len(read) :]
    for message in messages:  # templates may strip what they are given, but not leave it out
        if message["content"].strip() not in (scored if message is messages[-1] else read):
            raise TaskError(
                f"The tokenizer's chat template leaves out or changes what the {message['role']} says: "
                f"{message['content']!r:.200} is not in {whole!r:.500}. Use a template with {{prompt}} and "
                "{completion}, or another chat_template."
            )
    # Some templates go on with blanks after the token that ends a turn, which no model writes any more.
    ended = scored.rstrip()
    return read, ended if ended.endswith(tuple(processing_class.all_special_tokens)) else scored


def _chat_text(processing_class, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    if not getattr(processing_class, "chat_template", None):
        raise TaskError(
            f"The template {CHAT!r} needs a tokenizer with a chat template, and {type(processing_class).__name__} has "
            "none. Use the tokenizer of an instruct model, set its chat_template, or choose a template with {prompt} "
            "and {completion}."
        )
    try:
        return processing_class.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError) as error:  # some know no system prompt, and say so
        roles = ", ".join(message["role"] for message in messages)
        raise TaskError(f"The tokenizer's chat template refuses a chat of {roles}: {error}") from error


class CompletionCollator:
    """Turn samples into one batch for the base model.

    Args:
        processing_class: The base model's tokenizer. Neither its padding side nor its pad token matters.
        is_encoder_decoder (`bool`): Whether prompts go to an encoder and completions to a decoder.
        template (`str`, *optional*): Text with `{prompt}` and `{completion}`; or `"chat"`, the tokenizer's own.
        examples (`Sequence[Sample]`, *optional*): Samples that are read before every prompt, as demonstrations.
        description (`str`, *optional*): What the task is, read before them.
        max_length (`int`, *optional*, defaults to 512): Longest sample in tokens, or what the tokenizer says its model
            can read if that is less: a prompt loses its beginning first, which is warned of once.
        row_length (`int`, *optional*): If given, a row of a decoder-only model's batch holds as many samples as fit
            into this many tokens, each a sequence of its own: samples of unequal lengths then need little padding.

    Returns (of a call):
        `dict[str, torch.Tensor]`: `input_ids`, `labels`, and either `attention_mask` or, for rows with several
        samples, `position_ids`, each `(rows, length)` int64.

    Raises:
        TaskError: if the template is none, see `completion.render`.

    Example:
        >>> collate = CompletionCollator(tokenizer, is_encoder_decoder=False)  # doctest: +SKIP
        >>> collate([Sample("France", "Paris")])["labels"].shape  # doctest: +SKIP
        torch.Size([1, 9])
    """

    def __init__(
        self,
        processing_class,
        is_encoder_decoder: bool = False,
        template: str = DEFAULT_TEMPLATE,
        examples: Sequence[Sample] = (),
        description: str | None = None,
        max_length: int = 512,
        row_length: int | None = None,
    ):
        self.processing_class = processing_class
        self.is_encoder_decoder = is_encoder_decoder
        self.template = template
        self.examples = examples
        self.description = description
        self.max_length = min(max_length, getattr(processing_class, "model_max_length", max_length))
        self.row_length = None if is_encoder_decoder else row_length  # encoders know no packed rows
        render(Sample("x", "y"), template, processing_class)  # or TaskError now, and not in the midst of training

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        if self.row_length is not None:
            return self.collate_rows(list(self.fill_rows(samples)))
        rows = [self._encode(sample) for sample in samples]
        if self.is_encoder_decoder:
            end = [self.processing_class.eos_token_id]
            # An encoder must read something: plain text has no prompt, so it reads the end of one.
            inputs, labels = [prompt or end for prompt, _ in rows], [completion + end for _, completion in rows]
        else:
            inputs = [prompt + completion for prompt, completion in rows]
            labels = [[IGNORED] * len(prompt) + completion for prompt, completion in rows]
        return {
            "input_ids": _pad(inputs, 0),  # masked, so any id will do
            "attention_mask": _pad([[1] * len(row) for row in inputs], 0),
            "labels": _pad(labels, IGNORED),
        }

    def fill_rows(self, samples: Sequence[Sample]) -> Iterator[list[tuple[list[int], list[int]]]]:
        """Encode samples and yield rows of at most `row_length` tokens, in their order, with one sample at least."""
        row: list[tuple[list[int], list[int]]] = []
        room = length = self.row_length or self.max_length
        for prompt, completion in map(self._encode, samples):
            size = len(prompt) + len(completion)
            if row and size > room:
                yield row
                row, room = [], length
            row.append((prompt, completion))
            room -= size
        if row:
            yield row

    def collate_rows(self, rows: Sequence[Sequence[tuple[list[int], list[int]]]]) -> dict[str, torch.Tensor]:
        """Make a batch of rows as from `fill_rows`. Positions start anew at each sample, which keeps them apart."""
        ids = [[token for sample in row for part in sample for token in part] for row in rows]
        # The first token of a sample has none before it that could predict it.
        labels = [
            [label for read, scored in row for label in (IGNORED, *([IGNORED] * len(read) + scored)[1:])]
            for row in rows
        ]
        positions = [[i for read, scored in row for i in range(len(read) + len(scored))] for row in rows]
        length = max(map(len, ids))
        return {
            "input_ids": _pad(ids, 0),
            "position_ids": torch.tensor([row + list(range(length - len(row))) for row in positions]),
            "labels": _pad(labels, IGNORED),
        }

    def _encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        read, scored = render(sample, self.template, self.processing_class, self.examples, self.description)
        in_chat = is_chat(sample, self.template)
        prompt = encode_prompt(self.processing_class, read, in_chat)
        completion = self.processing_class(scored, add_special_tokens=False)["input_ids"]
        if in_chat and not self.is_encoder_decoder:
            # The same tokens as in the whole chat: some tokenizers begin each text with a space.
            whole = encode_prompt(self.processing_class, read + scored, in_chat)
            completion = whole[len(prompt) :] if whole[: len(prompt)] == prompt else completion
        if len(prompt) + len(completion) > self.max_length:
            logger.warning_once(
                f"Samples of more than {self.max_length} tokens are cut: of a prompt its beginning, of a longer "
                "completion its end."
            )
        completion = completion[: self.max_length]
        kept = self.max_length - len(completion)
        return (prompt[-kept:] if kept else []), completion


class CompletionScores(NamedTuple):
    """What `score_completions` returns, one entry per row, which is one sample unless rows are packed.

    Args:
        loss (`torch.Tensor` of shape `(batch,)`, fp32): Negative log-likelihood in nats, summed over the completion.
        num_tokens (`torch.Tensor` of shape `(batch,)`, int64): Tokens of the completion.
        exact (`torch.Tensor` of shape `(batch,)`, bool): Whether greedy decoding writes exactly this completion.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    exact: torch.Tensor


def score_completions(model: nn.Module, batch: dict[str, torch.Tensor]) -> CompletionScores:
    """Score the labelled tokens of a batch.

    `exact` needs no generation: greedy decoding writes a completion exactly if each of its tokens is the most
    probable one after the tokens before it. So it tells what generating, cutting at the template's end and stripping
    would tell, and is never kinder: the same text in other tokens, or with other blanks at its ends, counts as wrong.

    Args:
        model: A language model with a head, causal or encoder-decoder, with or without adapters.
        batch (`dict`): As from [`CompletionCollator`].
    """
    logits, tokens, rows = _labelled_logits(model, batch)
    zeros = logits.new_zeros(len(batch["labels"]))
    loss = zeros.index_add(0, rows, F.cross_entropy(logits, tokens, reduction="none"))
    mistakes = zeros.index_add(0, rows, (logits.argmax(-1) != tokens).float())
    return CompletionScores(loss, rows.bincount(minlength=len(zeros)), mistakes == 0)


@torch.no_grad()
def label_accuracy(
    model: nn.Module,
    collate: CompletionCollator,
    samples: Sequence[Sample],
    labels: Sequence[str],
    batch_size: int = 32,
) -> float:
    """Return the share of samples whose completion is the most probable of all labels after their prompt.

    The probability of a label is that of all its tokens, and of the template's end, which says that it ends there.

    Args:
        model: A language model with a head, causal or encoder-decoder, with or without adapters.
        collate (`CompletionCollator`): Makes the batches, without `row_length`: one sample is one row.
        samples (`Sequence[Sample]`): The samples; each completion is one of the labels.
        labels (`Sequence[str]`): The classes, 2 to 16.
        batch_size (`int`, *optional*, defaults to 32): Rows per forward pass, of which a prompt has one for each
            label; a prompt with more labels than that, or a long one, makes a batch of its own.

    Raises:
        ArgumentError: if there are fewer labels or more, or no sample.
        TaskError: if a completion is none of them.

    Example:
        >>> label_accuracy(model, CompletionCollator(tokenizer), task.test, task.labels)  # doctest: +SKIP
        0.875
    """
    if not 2 <= len(labels) <= MOST_LABELS or not samples:
        raise ArgumentError(
            f"Expected samples and 2 to {MOST_LABELS} labels, found {len(samples)} samples and {len(labels)} labels."
        )
    if unknown := next((sample for sample in samples if sample.completion not in labels), None):
        raise TaskError(f"Expected every completion to be one of the labels {tuple(labels)}, found {unknown}.")
    right, step = 0, max(1, batch_size // len(labels))
    samples = sorted(samples, key=lambda sample: len(sample.prompt))  # little padding
    for start in range(0, len(samples), step):
        own = samples[start : start + step]
        rows = [[Sample(sample.prompt, label) for label in labels] for sample in own]
        together, apart = [collate(list(chain(*rows)))], [collate(group) for group in rows]
        once = not collate.is_encoder_decoder and sum(map(_cost, apart)) < _cost(*together)
        batches = apart if once else together
        losses = torch.cat([score_completions(model, batch).loss for batch in batches])
        best = losses.view(len(own), len(labels)).argmin(1).tolist()
        right += sum(labels[place] == sample.completion for place, sample in zip(best, own, strict=True))
    return right / len(samples)


def _cost(batch: dict[str, torch.Tensor]) -> int:
    """Return how many tokens a model computes for a batch of a decoder-only one, and some for calling it at all.

    Labels of one long prompt are cheaper by themselves, since it is read once; those of short ones, or of prompts
    after the same examples, together.
    """
    rows, length = batch["input_ids"].shape
    shared = _shared_prefix(batch["input_ids"], F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED)
    return shared + rows * (length - shared) + 64


def _labelled_logits(
    model: nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict the labelled tokens of a batch, row after row, computing logits nowhere else.

    Returns:
        `tuple`: their logits `(num_labelled, vocabulary)` in fp32, and, `(num_labelled,)` each, the tokens and
        the rows of the batch that they stand in.
    """
    device, config = next(model.parameters()).device, cast(PreTrainedModel, model).config
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = cast(Any, model).prepare_decoder_input_ids_from_labels(labels=labels)
        targets = labels
    else:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
    mask = targets != IGNORED
    shared = 0 if config.is_encoder_decoder or "position_ids" in batch else _shared_prefix(batch["input_ids"], mask)
    if shared:
        with logits_only_at(model, mask[:1, :shared]):  # nowhere
            cache = model(input_ids=batch["input_ids"][:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(labels))
        batch |= {"input_ids": batch["input_ids"][:, shared:], "past_key_values": cache}
        targets, mask = targets[:, shared:], mask[:, shared:]
    # Flash attention on a CPU takes several times as long as plain products to run short bf16 rows backward. What is
    # computed once more during the backward pass, outside of this context, must be the same.
    plain = device.type == "cpu" and torch.is_grad_enabled() and not _recomputes(model)
    with logits_only_at(model, mask), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        logits = model(**batch, use_cache=False).logits[0].float()  # (labelled tokens, vocabulary)
    return logits, targets[mask], mask.nonzero()[:, 0]


def _recomputes(model: nn.Module) -> bool:
    """Return whether activation checkpointing is on, in any layer."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _shared_prefix(input_ids: torch.Tensor, mask: torch.Tensor) -> int:
    """Return how many tokens all rows begin with, up to the first scored one, where reading them once saves much."""
    differs = (input_ids != input_ids[0]).any(0) | mask.any(0)
    shared = int(differs.float().argmax())
    return shared if shared >= 32 and len(input_ids) > 1 and not torch.is_grad_enabled() else 0


@contextmanager
def logits_only_at(model: nn.Module, mask: torch.Tensor):
    """Within this context the model's head sees only the positions of `mask` `(batch, length)`, as one row.

    The head is most of a small model's cost. `logits_to_keep` would cut positions but not rows, and its
    non-contiguous slice makes a CPU copy the whole vocabulary matrix for each row of the batch.
    """
    head = cast(PreTrainedModel, model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][mask][None], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def encode_prompt(processing_class, text: str, in_chat: bool = False) -> list[int]:
    """Tokenize text that the model reads, with the special tokens that the tokenizer puts around a prompt.

    The text of a chat has them already.
    """
    if text:
        return processing_class(text, add_special_tokens=not in_chat)["input_ids"]
    # Plain text: there is no prompt, but its first token can be scored if the tokenizer begins texts with one.
    bos = getattr(processing_class, "bos_token_id", None)
    return [] if bos is None else [bos]


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
