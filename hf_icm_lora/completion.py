"""Samples as the base model sees them: text from a template, batches of ids and labels, the loss on completions.

Decoder-only and encoder-decoder models differ here and nowhere else in the package.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .errors import TaskError
from .tasks import Sample

DEFAULT_TEMPLATE = "Input: {prompt}\nOutput: {completion}\n"
IGNORED = -100  # the label that no loss counts, as everywhere in transformers


def fill_template(sample: Sample, template: str) -> tuple[str, str]:
    """Return a sample as (text that is read, text that is scored).

    The template's text after `{completion}` is scored too: it is how the model says that it has finished. The space
    before the completion belongs to it, since that is how tokenizers cut words. A sample without a prompt is plain
    text, which no template changes.

    Raises:
        TaskError: if the template lacks `{prompt}` or `{completion}`, or has them in the wrong order.

    Example:
        >>> fill_template(Sample("France", "Paris"), "Input: {prompt}\\nOutput: {completion}\\n")
        ('Input: France\\nOutput:', ' Paris\\n')
    """
    head, found_prompt, rest = template.partition("{prompt}")
    middle, found_completion, end = rest.partition("{completion}")
    if not (found_prompt and found_completion):
        raise TaskError(f"Expected a template with {{prompt}} and, after it, {{completion}}; found {template!r}.")
    if not sample.prompt:
        return "", sample.completion
    stripped = middle.rstrip(" ")
    return head + sample.prompt + stripped, middle[len(stripped) :] + sample.completion + end


class CompletionCollator:
    """Turn samples into one batch for the base model.

    Args:
        processing_class: The base model's tokenizer. Neither its padding side nor its pad token matters.
        is_encoder_decoder (`bool`): Whether prompts go to an encoder and completions to a decoder.
        template (`str`, *optional*): Text with `{prompt}` and `{completion}`.
        context (`str`, *optional*, defaults to `""`): Text before every prompt, such as demonstrations.
        max_length (`int`, *optional*, defaults to 512): Longest row in tokens. The prompt loses its beginning first.

    Returns (of a call):
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels`, each `(batch, length)` int64.

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
        context: str = "",
        max_length: int = 512,
    ):
        self.processing_class = processing_class
        self.is_encoder_decoder = is_encoder_decoder
        self.template = template
        self.context = context
        self.max_length = max_length

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
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

    def _encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        read, scored = fill_template(sample, self.template)
        prompt = encode_prompt(self.processing_class, self.context + read)
        completion = self.processing_class(scored, add_special_tokens=False)["input_ids"][: self.max_length]
        kept = self.max_length - len(completion)
        return (prompt[-kept:] if kept else []), completion


class CompletionScores(NamedTuple):
    """What `score_completions` returns, one entry per sample.

    Args:
        loss (`torch.Tensor` of shape `(batch,)`, fp32): Negative log-likelihood in nats, summed over the completion.
        num_tokens (`torch.Tensor` of shape `(batch,)`, int64): Tokens of the completion.
        exact (`torch.Tensor` of shape `(batch,)`, bool): Whether greedy decoding writes exactly this completion.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    exact: torch.Tensor


def score_completions(model: nn.Module, batch: dict[str, torch.Tensor]) -> CompletionScores:
    """Score the labelled tokens of a batch, computing logits nowhere else.

    `exact` needs no generation: greedy decoding writes a completion exactly if each of its tokens is the most
    probable one after the tokens before it.

    Args:
        model: A language model with a head, causal or encoder-decoder, with or without adapters.
        batch (`dict`): As from [`CompletionCollator`].
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        targets = labels
    else:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
    mask = targets != IGNORED
    with logits_only_at(model, mask):
        logits = model(**batch, use_cache=False).logits[0].float()  # (labelled tokens, vocabulary)
    tokens, rows = targets[mask], mask.nonzero()[:, 0]
    zeros = logits.new_zeros(len(labels))
    loss = zeros.index_add(0, rows, F.cross_entropy(logits, tokens, reduction="none"))
    mistakes = zeros.index_add(0, rows, (logits.argmax(-1) != tokens).float())
    return CompletionScores(loss, mask.sum(1), mistakes == 0)


@contextmanager
def logits_only_at(model: nn.Module, mask: torch.Tensor):
    """Within this context the model's head sees only the positions of `mask` `(batch, length)`, as one row.

    The head is most of a small model's cost. `logits_to_keep` would cut positions but not rows, and its
    non-contiguous slice makes a CPU copy the whole vocabulary matrix for each row of the batch.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][mask][None], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def encode_prompt(processing_class, text: str) -> list[int]:
    """Tokenize text that the model reads, with the special tokens that the tokenizer puts around a prompt."""
    if text:
        return processing_class(text)["input_ids"]
    # Plain text: there is no prompt, but its first token can be scored if the tokenizer begins texts with one.
    bos = getattr(processing_class, "bos_token_id", None)
    return [] if bos is None else [bos]


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
