"""The closed form: what reading examples does to the base model, written into the weights of a LoRA without training.

The base reads the examples one after another, forwards and backwards, and then each alone. Layer by layer, a ridge
regression finds the update of the last linear map that carries the hidden states of the last reading to those of the
first two, at the positions that predict the answer. The layers above go on with the update in, so each corrects what
the ones below it left.

Closed-form edits of this map are known from ROME (arXiv 2202.05262) and MEMIT (arXiv 2210.07229), which store facts.
Here the target is a hidden state that the same model has with examples in its prompt.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .adapter import attach_adapter
from .base_model import frozen_base
from .completion import DEFAULT_TEMPLATE, IGNORED, CompletionCollator, encode_prompt, logits_only_at, render
from .errors import ArgumentError, IncompatibleAdapterError, TaskError
from .layout import PREFIX
from .lora_config import shortest_target_modules
from .reading import Reading, longest_reading, positions, read_examples
from .tasks import Sample, to_samples

NUM_ORDERS = 2  # in which the examples are read, one pass of the base each


class Block(NamedTuple):
    """One layer of the base model: its module, and the linear map whose output it adds to the residual stream."""

    module: nn.Module
    writer_name: str
    writer: nn.Module


def in_context_adapter(
    base_model: nn.Module,
    processing_class,
    examples: Sequence,
    *,
    description: str | None = None,
    template: str = DEFAULT_TEMPLATE,
    rank: int = 16,
    penalty: float = 0.3,
    adapter_name: str = "default",
) -> PeftModel:
    """Turn examples of a task into a LoRA for their base model, in closed form: no training, no gradient step.

    Args:
        base_model (`PreTrainedModel` or `PeftModel`): Decoder-only or encoder-decoder. Adapters that it has are off
            while it reads.
        processing_class: Its tokenizer.
        examples (`Sequence`): Two samples or more, in any form that [`Task`] takes. A dozen is a good number.
        description (`str`, *optional*): What the task is, read before the examples.
        template (`str`, *optional*): Text with `{prompt}` and `{completion}`, or `"chat"` for the tokenizer's chat
            template, whose earlier turns the examples are then. The adapter is for prompts in it.
        rank (`int`, *optional*, defaults to 16): Of the adapter.
        penalty (`float`, *optional*, defaults to 0.3): Of the ridge regression, in units of the mean square of its
            inputs. More of it changes the base less.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter, which becomes the active one.

    Returns:
        `PeftModel`: the base with an ordinary LoRA on the last linear map of each layer (`down_proj` of a Llama).

    Raises:
        ArgumentError: if rank or penalty is no positive number.
        TaskError: if there are fewer than two examples, one is no sample, or the template is none; or if one is too
            long to be read, for an encoder all of them together.
        IncompatibleAdapterError: if the layers of the base do not add a linear map to the residual stream, or an
            adapter of this name has another layout.

    Example:
        >>> examples = [("France", "Paris"), ("Japan", "Tokyo"), ("Kenya", "Nairobi")]
        >>> model = in_context_adapter(base, tokenizer, examples)  # doctest: +SKIP
        >>> model.save_pretrained("capitals")  # doctest: +SKIP
    """
    samples = to_samples(examples)
    lora_config, state_dict = closed_form(base_model, processing_class, samples, description, template, rank, penalty)
    return attach_adapter(base_model, lora_config, state_dict, adapter_name)


def closed_form(
    base_model: nn.Module,
    processing_class,
    samples: Sequence[Sample],
    description: str | None = None,
    template: str = DEFAULT_TEMPLATE,
    rank: int = 16,
    penalty: float = 0.3,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Write the adapter of [`in_context_adapter`] without attaching it.

    Returns:
        `tuple[dict, dict[str, torch.Tensor]]`: fields of `LoraConfig`, and a PEFT state dict.

    Raises:
        ArgumentError, TaskError, IncompatibleAdapterError: as [`in_context_adapter`].
    """
    if not (penalty > 0 and math.isfinite(penalty)) or rank < 1:
        raise ArgumentError(f"Expected a rank of 1 or more and a positive penalty, found {rank} and {penalty}.")
    if len(samples) < 2:
        raise TaskError(f"Expected two examples or more, since each is read after the others; found {len(samples)}.")
    with frozen_base(base_model) as base:
        blocks = residual_blocks(base)
        for block in unlike(blocks):
            check_additive(base, block, _batch(base, processing_class, samples[:1], template))
        if base.config.is_encoder_decoder:  # which answers one prompt at a time
            batch = _batch(base, processing_class, samples, template)
            targets, weights = states_in_context(base, processing_class, samples, description, template, blocks), None
        else:
            most = longest_reading(base, processing_class)
            reading = read_examples(processing_class, samples, template, description, NUM_ORDERS, most)
            device = next(base.parameters()).device
            batch = reading.batch(device) | {"labels": reading.labels(device)}
            targets, weights = mean_states(states_in_conversations(base, reading, blocks), len(samples))
        factors = fit(base, batch, blocks, targets, weights, rank, penalty)
        names = [block.writer_name for block in blocks]
        lora_config: dict[str, Any] = {
            "r": rank,
            "lora_alpha": rank,
            "target_modules": shortest_target_modules(names, base),
            "task_type": "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM",
            "fan_in_fan_out": isinstance(base_layer(blocks[0].writer), Conv1D),
        }
    state_dict = {}
    for name, (lora_a, lora_b) in zip(names, factors, strict=True):
        state_dict[f"{PREFIX}{name}.lora_A.weight"] = lora_a
        state_dict[f"{PREFIX}{name}.lora_B.weight"] = lora_b
    return lora_config, state_dict


def residual_blocks(base_model: PreTrainedModel) -> list[Block]:
    """Return the layers of a language model, of the decoder if it has an encoder, in order.

    Raises:
        IncompatibleAdapterError: if there is no list of layers, or a layer has no linear map to the hidden size.
    """
    decoder = base_model.get_decoder() if base_model.config.is_encoder_decoder else base_model.base_model
    paths = {module: name for name, module in base_model.named_modules()}
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise IncompatibleAdapterError(f"{type(base_model).__name__} has no list of layers to write an adapter into.")
    blocks = []
    for block in lists[0]:
        whole = (module for module in block.modules() if not _is_part(paths[module]))
        linear = [module for module in whole if isinstance(base_layer(module), (nn.Linear, Conv1D))]
        if not linear:
            raise IncompatibleAdapterError(f"{paths[block]} has no linear map that an adapter could change.")
        blocks.append(Block(block, paths[linear[-1]], linear[-1]))
    return blocks


def unlike(blocks: Sequence[Block]) -> list[Block]:
    """Return one block of each sort: hybrid models have layers of several."""
    sorts = {(type(block.module), re.sub(r"\d+", "*", block.writer_name)): block for block in reversed(blocks)}
    return list(sorts.values())


def base_layer(module: nn.Module) -> nn.Module:
    """Return a module, or the one of the base model that PEFT put a LoRA around."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_part(path: str) -> bool:
    """Whether a module is part of one that PEFT put in the place of a linear map."""
    return ".base_layer" in path or ".lora_" in path


def check_additive(base_model: PreTrainedModel, block: Block, batch: dict[str, torch.Tensor]) -> None:
    """Refuse a base whose layers do something else to the output of their last linear map than adding it.

    A small random vector is added to that output, and must come out of the layer as it went in.

    Raises:
        IncompatibleAdapterError: if it does not.
    """
    outputs: list[torch.Tensor] = []
    moved: list[torch.Tensor] = []

    def move(_module, _inputs, output):
        noise = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(0))
        moved.append((noise * output.float().std().cpu()).to(output))
        return output + moved[0]

    for shifted in (False, True):
        with (
            hook(block.writer.register_forward_hook(move)) if shifted else nullcontext(),
            hook(block.module.register_forward_hook(lambda _m, _i, output: outputs.append(hidden_of(output)))),
        ):
            run(base_model, batch)
    change = (outputs[1] - outputs[0]).float()
    if change.shape[-1] != moved[0].shape[-1] or (change - moved[0]).norm() > 0.05 * change.norm():
        raise IncompatibleAdapterError(
            f"{type(base_model).__name__}: expected each layer to add the output of {block.writer_name} to its hidden "
            "states. This one changes it on the way, for example by a norm, and the closed form cannot be written."
        )


@dataclass(frozen=True)
class States:
    """Hidden states at the answers of a conversation, and at the memory tokens after it.

    Args:
        layers (`list[torch.Tensor]`): Per layer `(examples, a, hidden_size)`, fp32, where `a` is the longest answer.
        memory (`list[torch.Tensor]`): Per layer `(num_memory, hidden_size)`, fp32.
        mask (`torch.Tensor` of shape `(examples, a)`): Where answers have tokens.
        order (`torch.Tensor` of shape `(examples,)`): Which examples these are.
    """

    layers: list[torch.Tensor]
    memory: list[torch.Tensor]
    mask: torch.Tensor
    order: torch.Tensor


def states_in_conversations(
    base_model: PreTrainedModel, reading: Reading, blocks: Sequence[Block], memory: torch.Tensor | None = None
) -> list[States]:
    """Return the hidden states after each layer at the answers of each conversation.

    Args:
        base_model, reading, blocks: As everywhere here.
        memory (`torch.Tensor` of shape `(num_memory, hidden_size)`, *optional*): Input embeddings of tokens that are
            read after each conversation, and whose states are returned too.
    """
    device = next(base_model.parameters()).device
    embed = base_model.get_input_embeddings()
    found = []
    for conversation in reading.conversations:
        at, mask = positions(conversation.starts, [reading.answers[index] for index in conversation.order], device)
        ids = torch.tensor([conversation.ids], dtype=torch.long, device=device)
        inputs = {"input_ids": ids}
        if memory is not None:
            embedded = embed(ids)
            inputs = {"inputs_embeds": torch.cat([embedded, memory[None].to(embedded)], 1)}
        layers: list[torch.Tensor] = []
        of_memory: list[torch.Tensor] = []
        with ExitStack() as stack:
            for block in blocks:

                def keep(_module, _inputs, output, at=at, end=ids.shape[1], layers=layers, of_memory=of_memory):
                    hidden = hidden_of(output)[0]
                    layers.append(hidden[at].float())
                    of_memory.append(hidden[end:].float())

                stack.enter_context(hook(block.module.register_forward_hook(keep)))
            base_model.base_model(**inputs, use_cache=False)
        order = torch.tensor(conversation.order, dtype=torch.long, device=device)
        found.append(States(layers, of_memory, mask, order))
    return found


def weight_of_place(place: torch.Tensor) -> torch.Tensor:
    """Return how much the reading of an example counts after so many others: little after none, near 1 after many."""
    return (place + 0.2) / (place + 2)


def mean_states(states: Sequence[States], num_examples: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return each example's hidden states, averaged over the conversations that it stands in.

    Returns:
        `tuple`: per layer `(num_answer_tokens, hidden_size)`, examples in order, and how much each token counts,
        `(num_answer_tokens,)`, 1 on average.
    """
    device = states[0].mask.device
    longest = max(one.mask.shape[1] for one in states)
    mask = torch.zeros(num_examples, longest, dtype=torch.bool, device=device)
    weights = torch.zeros(num_examples, device=device)
    sums = [torch.zeros(num_examples, longest, layer.shape[-1], device=device) for layer in states[0].layers]
    for one in states:
        weight = weight_of_place(torch.arange(len(one.order), device=device))
        weights[one.order] += weight
        mask[one.order, : one.mask.shape[1]] |= one.mask
        for total, layer in zip(sums, one.layers, strict=True):
            total[one.order, : layer.shape[1]] += weight[:, None, None] * layer
    means = [(total / weights[:, None, None])[mask] for total in sums]
    of_tokens = weights[:, None].expand(mask.shape)[mask]
    return means, of_tokens / of_tokens.mean()


def states_in_context(
    base_model: PreTrainedModel,
    processing_class,
    samples: Sequence[Sample],
    description: str | None,
    template: str,
    blocks: Sequence[Block],
) -> list[torch.Tensor]:
    """Return the hidden states after each layer of a decoder at the answers, each example read after all the others.

    Returns:
        `list[torch.Tensor]`: one of shape `(num_answer_tokens, hidden_size)` per layer, fp32, examples in order.
    """
    found: list[list[torch.Tensor]] = [[] for _ in blocks]
    steps = tqdm(range(len(samples)), desc="Reading", leave=False, disable=not logging.is_progress_bar_enabled())
    for index in steps:
        others = [other for place, other in enumerate(samples) if place != index]
        read, _ = render(samples[index], template, processing_class, others, description)
        length, most = len(encode_prompt(processing_class, read)), longest_reading(base_model, processing_class)
        if length > most:
            raise TaskError(
                f"The examples have {length} tokens together, and the encoder reads {most} at most. Give fewer or "
                "shorter ones."
            )
        batch = _batch(base_model, processing_class, [samples[index]], template, others, description)
        mask = answer_positions(base_model, batch)
        with ExitStack() as stack:
            for states, block in zip(found, blocks, strict=True):

                def keep(_module, _inputs, output, states=states, mask=mask):
                    states.append(hidden_of(output)[mask].float())

                stack.enter_context(hook(block.module.register_forward_hook(keep)))
            run(base_model, batch)
    return [torch.cat(states) for states in found]


def fit(
    base_model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    blocks: Sequence[Block],
    targets: Sequence[torch.Tensor],
    weights: torch.Tensor | None,
    rank: int,
    penalty: float,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return A `(rank, in_features)` and B `(out_features, rank)` per layer, fp32, found in one pass of the base.

    Args:
        base_model (`PreTrainedModel`): Without adapters; it is the same afterwards.
        batch (`dict[str, torch.Tensor]`): The examples alone, as from [`CompletionCollator`], one a row.
        blocks (`Sequence[Block]`): As from [`residual_blocks`].
        targets (`Sequence[torch.Tensor]`), weights (`torch.Tensor`, *optional*): As from [`mean_states`].
        rank, penalty: As in [`in_context_adapter`].
    """
    mask = answer_positions(base_model, batch)
    factors: list[tuple[torch.Tensor, torch.Tensor]] = []
    with ExitStack() as stack:
        for block, target in zip(blocks, targets, strict=True):
            inputs: list[torch.Tensor] = []

            def keep(_module, args, inputs=inputs):
                inputs.append(args[0].reshape(*mask.shape, -1))  # OPT passes all tokens as one row

            def update(_module, _args, output, inputs=inputs, target=target):
                hidden, u = hidden_of(output), inputs.pop()
                read, change = u[mask].float(), target - hidden[mask].float()
                if weights is not None:
                    read, change = read * weights.sqrt()[:, None], change * weights.sqrt()[:, None]
                lora_a, lora_b = low_rank_ridge(read, change, rank, penalty)
                factors.append((lora_a, lora_b))
                hidden = hidden + (u @ lora_a.to(u.dtype).T) @ lora_b.to(u.dtype).T
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            stack.enter_context(hook(block.writer.register_forward_pre_hook(keep)))
            stack.enter_context(hook(block.module.register_forward_hook(update)))
        run(base_model, batch)
    return factors


def low_rank_ridge(
    inputs: torch.Tensor, changes: torch.Tensor, rank: int, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ridge regression of changes on inputs, cut to a rank: `changes ~ inputs @ A.T @ B.T`.

    There are fewer tokens than features, so it is solved in its dual form, and the singular value decomposition is
    that of a small matrix of tokens.

    Args:
        inputs (`torch.Tensor` of shape `(num_tokens, in_features)`), changes (`(num_tokens, out_features)`): fp32.
        rank (`int`): If there are fewer tokens than this, the rest of A and B is 0.
        penalty (`float`): In units of the mean square of a token's inputs.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: A `(rank, in_features)` with rows of unit length, and B
        `(out_features, rank)`.
    """
    inputs, changes = inputs.double(), changes.double()  # tokens may be alike, and the kernel nearly singular
    kernel = inputs @ inputs.T
    kernel.diagonal().add_(penalty * kernel.diagonal().mean().clamp_min(torch.finfo(kernel.dtype).tiny))
    right, small_right = torch.linalg.qr(inputs.T)
    left, small_left = torch.linalg.qr(changes.T)
    core = torch.linalg.svd(small_left @ torch.linalg.solve(kernel, small_right.T), full_matrices=False)
    kept = min(rank, len(core.S))
    lora_a = core.Vh[:kept] @ right.T
    lora_b = left @ (core.U[:, :kept] * core.S[:kept])
    return F.pad(lora_a, (0, 0, 0, rank - kept)).float(), F.pad(lora_b, (0, rank - kept)).float()


def answer_positions(base_model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return where the tokens of completions are predicted: `(rows, length)`, bool, on the base's device."""
    labels = batch["labels"]
    if not base_model.config.is_encoder_decoder:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
    return labels != IGNORED


def _batch(
    base_model: PreTrainedModel,
    processing_class,
    samples: Sequence[Sample],
    template: str,
    examples: Sequence[Sample] = (),
    description: str | None = None,
) -> dict[str, torch.Tensor]:
    is_encoder_decoder = base_model.config.is_encoder_decoder
    most = longest_reading(base_model, processing_class)
    collate = CompletionCollator(processing_class, is_encoder_decoder, template, examples, description, most)
    device = next(base_model.parameters()).device
    return {name: tensor.to(device) for name, tensor in collate(samples).items()}


def run(base_model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Pass a batch through the layers, and nothing through the head."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if base_model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = cast(Any, base_model).prepare_decoder_input_ids_from_labels(
            labels=batch["labels"]
        )
    with logits_only_at(base_model, torch.zeros_like(batch["labels"], dtype=torch.bool)):
        base_model(**inputs, use_cache=False)


def hidden_of(output) -> torch.Tensor:
    """Return the hidden states among what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hook(handle) -> Iterator[None]:
    """Remove a hook after this context."""
    try:
        yield
    finally:
        handle.remove()
