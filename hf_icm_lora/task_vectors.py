"""Task vectors: what the frozen base model makes of a task's demonstrations, its description, or both.

The hidden state at the last prompt token, after reading demonstrations in context (Hendel et al., arXiv 2310.15916;
In-Context Meta LoRA Generation, arXiv 2501.17635, section 3.2). It is read from the base model without any adapter:
the paper's public code reads it from a model that was already fine-tuned on the task.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .base_model import base_model_fingerprint, frozen_base
from .completion import CHAT, DEFAULT_TEMPLATE, is_chat, render
from .errors import TaskError, TaskVectorError
from .files import commit_file, read_safetensors, sha256_of
from .processes import gathered, own_part
from .tasks import Sample, Task, check_unique_names, to_sample

logger = logging.get_logger(__name__)
POOLINGS = ("last", "prompts", "completions", "starts", "ends", "mean")
MODES = ("demonstrations", "both", "description")


@dataclass(frozen=True)
class TaskVectorSpec:
    """How task vectors are made: all that a generator must know to make one for a new task.

    Args:
        template (`str`, *optional*): Text with `{prompt}` and `{completion}`, one demonstration; or `"chat"`, the
            tokenizer's chat template, in which demonstrations are earlier turns.
        num_demonstrations (`int`, *optional*, defaults to 12): Most demonstrations in one prompt.
        min_demonstrations (`int`, *optional*, defaults to 3): Fewest. The draws of a task run evenly from most to
            fewest, so that a generator also knows prompts with few examples.
        num_draws (`int`, *optional*, defaults to 3): Vectors per task and mode, each from demonstrations drawn anew.
        layers (`tuple[int, ...]`, *optional*, defaults to `(-1,)`): Hidden states to take; 0 is the embedding, -1 the
            last layer.
        pooling (`tuple[str, ...]`, *optional*, defaults to `("prompts", "completions")`): Which tokens to average, out
            of those below. Each pooling of each layer is one row of the task vector.

                "last"         the last token alone, as in the paper
                "prompts"      the last tokens of the final prompt and of all demonstrations' prompts that follow
                               `min_demonstrations` others: as many answers about to be given, from one pass
                "completions"  the demonstrations' completions; of a description alone, its own tokens
                "starts"       the first token of each of them
                "ends"         the last token of each of them
                "mean"         all tokens
        max_length (`int`, *optional*, defaults to 512): Longest prompt in tokens, or the base model's
            `max_position_embeddings` if that is less; a longer one loses its beginning, which is warned of once.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.

    Raises:
        TaskVectorError: if a number is out of range or the pooling unknown.
    """

    template: str = DEFAULT_TEMPLATE
    num_demonstrations: int = 12
    min_demonstrations: int = 3
    num_draws: int = 3
    layers: tuple[int, ...] = (-1,)
    pooling: tuple[str, ...] = ("prompts", "completions")
    max_length: int = 512
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON gives a list
        object.__setattr__(self, "pooling", (self.pooling,) if isinstance(self.pooling, str) else tuple(self.pooling))
        if not 1 <= self.min_demonstrations <= self.num_demonstrations or self.num_draws < 1 or not self.layers:
            raise TaskVectorError(
                "Expected 1 <= min_demonstrations <= num_demonstrations, num_draws >= 1 and at least one layer; found "
                f"{self.min_demonstrations}, {self.num_demonstrations}, {self.num_draws}, {self.layers}."
            )
        if self.max_length < 1:
            raise TaskVectorError(f"Expected max_length >= 1, found {self.max_length}.")
        if not all(isinstance(layer, int) for layer in self.layers):
            raise TaskVectorError(f"Expected layers by their numbers, found {self.layers}.")
        if not self.pooling or not set(self.pooling) <= set(POOLINGS):
            raise TaskVectorError(f"Expected the pooling to be some of {POOLINGS}, found {self.pooling}.")
        if self.template != CHAT:  # which only a tokenizer knows
            render(Sample("x", "y"), self.template, None)

    @classmethod
    def for_base_model(cls, base_model: PreTrainedModel, **fields) -> "TaskVectorSpec":
        """Make the specification that was measured to be good, for a base model of any depth.

        Three layers, at 7/15, 11/15 and all of its depth: of the 30 layers of SmolLM2-135M they are 14, 22 and 30.

        Args:
            base_model (`PreTrainedModel`): The base.
            fields: Other values of other fields, such as the template.
        """
        depth = base_model.config.num_hidden_layers
        layers = tuple(sorted({max(1, round(part * depth / 15)) for part in (7, 11, 15)}))
        return cls(**{"layers": layers, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; `TaskVectorSpec(**values)` is the way back."""
        return dataclasses.asdict(self) | {"layers": list(self.layers), "pooling": list(self.pooling)}


class Prompt(NamedTuple):
    """A text that ends with an open query.

    Args:
        text (`str`): What the base model reads.
        ends (`tuple[int, ...]`): Where in the text an answer is about to be given, as numbers of characters; the last
            one is its end.
        answers (`tuple[tuple[int, int], ...]`): Where the demonstrations' completions begin and end.
        in_chat (`bool`): Whether it is a chat, whose text holds all special tokens.
    """

    text: str
    ends: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    in_chat: bool = False


@dataclass(frozen=True)
class TaskVectors:
    """Task vectors of many tasks, with all that says where they come from.

    Args:
        spec (`TaskVectorSpec`): How they were made.
        base_model_fingerprint (`str`): Of the base model that made them.
        banks (`dict[str, dict[str, torch.Tensor]]`): Task name -> mode -> `(num_draws, num_vectors, hidden_size)`
            fp32. Mode `"description"` has one draw, and tasks without a description lack it.
    """

    spec: TaskVectorSpec
    base_model_fingerprint: str
    banks: Mapping[str, Mapping[str, torch.Tensor]]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file whose header holds the specification."""
        names = list(self.banks)
        tensors = {f"{i}.{mode}": bank for i, name in enumerate(names) for mode, bank in self.banks[name].items()}
        metadata = {"tasks": json.dumps(names), "spec": json.dumps(self.spec.to_dict())}
        metadata["base_model_fingerprint"] = self.base_model_fingerprint
        with commit_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "TaskVectors":
        """Read a file that [`TaskVectors.save`] wrote.

        Raises:
            TaskVectorError: if the file is no such file.
        """
        try:
            tensors, metadata = read_safetensors(path)
            spec, fingerprint = TaskVectorSpec(**json.loads(metadata["spec"])), metadata["base_model_fingerprint"]
            banks: dict[str, dict[str, torch.Tensor]] = {name: {} for name in json.loads(metadata["tasks"])}
            names, size = list(banks), len(spec.pooling) * len(spec.layers)
            for key, bank in tensors.items():
                index, mode = key.split(".")
                if mode not in MODES or bank.ndim != 3 or not len(bank) or bank.shape[1] != size:
                    raise TaskVectorError(f"{key}: expected draws of {size} vectors, found {tuple(bank.shape)}")
                banks[names[int(index)]][mode] = bank.float()
            if len({bank.shape[2] for bank in tensors.values()}) > 1:
                raise TaskVectorError("its vectors differ in size")
        except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise TaskVectorError(f"{path}: not a file of task vectors: {error!r}") from error
        return cls(spec, fingerprint, banks)


def joined(bank: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the draws of several modes as one, a description's one vector repeated, so that every mode counts alike.

    Args:
        bank (`Sequence[torch.Tensor]`): Of each mode, `(num_draws, num_vectors, hidden_size)`.
    """
    most = max(map(len, bank))
    return torch.cat([draws.repeat(most // len(draws), 1, 1) for draws in bank])


class TaskVectorExtractor:
    """Make task vectors with a frozen base model.

    Args:
        spec (`TaskVectorSpec`, *optional*): How; by default as its own defaults say.
        batch_size (`int`, *optional*, defaults to 16): Prompts per forward pass; the vectors do not depend on it.

    Example:
        >>> extractor = TaskVectorExtractor(TaskVectorSpec(num_demonstrations=8))
        >>> vectors = extractor.extract(base_model, tokenizer, tasks)  # doctest: +SKIP
        >>> vectors.banks["capital"]["demonstrations"].shape  # doctest: +SKIP
        torch.Size([16, 1, 576])
    """

    def __init__(self, spec: TaskVectorSpec | None = None, batch_size: int = 16):
        self.spec = spec or TaskVectorSpec()
        self.batch_size = batch_size

    def extract(
        self, base_model: nn.Module, processing_class, tasks: Sequence[Task], modes: Sequence[str] = MODES
    ) -> TaskVectors:
        """Make a bank of vectors for every task, from its `demo` samples and its description.

        Under `accelerate launch` all processes must call it; they share the tasks, and all get the vectors.

        Args:
            base_model (`PreTrainedModel`): The base. Its adapters, if any, are off meanwhile; its mode is restored.
            processing_class: Its tokenizer.
            tasks (`Sequence[Task]`): Tasks with `demo` samples.
            modes (`Sequence[str]`, *optional*): What to make them from: `"demonstrations"`, which evaluation needs,
                and of a task with a description also `"both"` and the `"description"` alone.

        Raises:
            TaskError: if a task has fewer than two `demo` samples, or a name stands twice.
            TaskVectorError: if the base model lacks one of the layers.
        """
        prompts: list[tuple[str, str, Prompt]] = []  # task, mode, prompt
        for task in check_unique_names(tasks):
            task.require("demo", 2, "a task vector (demonstrations and a prompt to answer)")
        for task in own_part(tasks):
            for mode in modes if task.description else MODES[:1]:
                drawn = self.prompts(processing_class, task.demo, task.description, mode, task.name)
                prompts += [(task.name, mode, prompt) for prompt in drawn]
        vectors = self._hidden_states(base_model, processing_class, [prompt for *_, prompt in prompts])
        banks: dict[str, dict[str, list]] = {}
        for (name, mode, _), vector in zip(prompts, vectors, strict=True):
            banks.setdefault(name, {}).setdefault(mode, []).append(vector)
        stacked = gathered(
            {name: {mode: torch.stack(rows) for mode, rows in bank.items()} for name, bank in banks.items()}
        )
        in_order = {task.name: stacked[task.name] for task in tasks}
        return TaskVectors(self.spec, base_model_fingerprint(base_model), in_order)

    def vector(
        self, base_model: nn.Module, processing_class, examples: Sequence | None = None, description: str | None = None
    ) -> torch.Tensor:
        """Make the vectors of one new task from examples, a description, or both.

        From both there are draws of every mode, of which each counts alike: those of demonstrations first, then those
        of description and demonstrations, then the description's. The mean of adapters from all of them is better than
        that of one mode.

        Args:
            examples (`Sequence`, *optional*): Samples in any form that [`Task`] takes.
            description (`str`, *optional*): The task in a sentence.

        Returns:
            `torch.Tensor` of shape `(num_draws, num_vectors, hidden_size)`, fp32 on the CPU; one draw if there is
            nothing to draw from.

        Raises:
            TaskError: if there are neither examples nor a description.
        """
        samples = [to_sample(raw, f"examples[{index}]") for index, raw in enumerate(examples or ())]
        if not samples and not description:
            raise TaskError("A task vector needs examples, a description, or both; found neither.")
        modes = MODES if samples and description else ("demonstrations",) if samples else ("description",)
        prompts = [self.prompts(processing_class, samples, description, mode) for mode in modes]
        vectors = self._hidden_states(base_model, processing_class, list(chain(*prompts)))
        return joined(vectors.split([len(draws) for draws in prompts]))

    def prompts(
        self, processing_class, samples: Sequence[Sample], description: str | None, mode: str, name: str = ""
    ) -> list[Prompt]:
        """Write what the base model reads to make the task vector, one prompt per draw.

        Args:
            processing_class: The base model's tokenizer; only the template `"chat"` asks it for anything.
            samples (`Sequence[Sample]`): What demonstrations and queries are drawn from.
            description (`str`, *optional*): Put first in the modes `"both"` and `"description"`.
            mode (`str`): One of `MODES`.
            name (`str`, *optional*): The task's name, which together with the seed fixes the draws.

        Raises:
            TaskError: if the template is a chat's and cannot be used, see `completion.render`.
        """
        if mode == "demonstrations":
            description = None
        if mode == "description":
            text, _ = render(Sample("...", "x"), self.spec.template, processing_class, (), description)
            return [Prompt(text, (len(text),), (_span(text, description or "", 0),), self.spec.template == CHAT)]
        rng = torch.Generator().manual_seed(int(sha256_of(name, str(self.spec.seed))[:12], 16))
        prompts = []
        for count in self._counts(len(samples)):
            order = torch.randperm(len(samples), generator=rng)[: count + 1].tolist()
            *demonstrations, query = [samples[i] for i in order] if len(order) > 1 else [samples[0]] * 2
            prompts.append(self._prompt(processing_class, demonstrations, query, description))
        return list(dict.fromkeys(prompts))  # few samples give the same draw twice

    def _prompt(
        self, processing_class, demonstrations: Sequence[Sample], query: Sample, description: str | None
    ) -> Prompt:
        text, scored = render(query, self.spec.template, processing_class, demonstrations, description)
        if not query.prompt:  # plain text: what it is about to be continued from is all of it
            text += scored
        ends, answers = [], []
        for number, sample in enumerate(demonstrations):
            before, _ = render(sample, self.spec.template, processing_class, demonstrations[:number], description)
            if not text.startswith(before):
                raise TaskError(
                    "The tokenizer's chat template writes earlier turns otherwise once later ones follow, so the "
                    f"demonstrations' answers cannot be found: {before[-200:]!r} is not in {text[:1000]!r}. Use a "
                    "template with {prompt} and {completion}, or another chat_template."
                )
            answers.append(_span(text, sample.completion, len(before)))
            if number >= self.spec.min_demonstrations:
                ends.append(len(before) if sample.prompt else answers[-1][1])
        return Prompt(text, (*ends, len(text)), tuple(answers), is_chat(query, self.spec.template))

    def _counts(self, num_samples: int) -> list[int]:
        most = min(self.spec.num_demonstrations, max(1, num_samples - 1))
        fewest = min(self.spec.min_demonstrations, most)
        return torch.linspace(most, fewest, self.spec.num_draws).round().int().tolist()

    def _tokens(self, processing_class, prompt: Prompt, max_length: int) -> tuple[list[int], list[list[int]]]:
        """Return the ids of a prompt, and for each pooling at which of them to take hidden states."""
        encoding = processing_class(prompt.text, add_special_tokens=not prompt.in_chat, return_offsets_mapping=True)
        ids, last = encoding["input_ids"], len(encoding["input_ids"]) - 1
        spans = [(token, begin, end) for token, (begin, end) in enumerate(encoding["offset_mapping"]) if begin < end]
        answers = [
            [token for token, begin, end in spans if end > start and begin < stop] for start, stop in prompt.answers
        ]
        positions = {
            "last": [last],
            "prompts": [max(token for token, begin, _ in spans if begin < end) for end in prompt.ends[:-1]] + [last],
            "completions": [token for answer in answers for token in answer],
            "starts": [answer[0] for answer in answers if answer],
            "ends": [answer[-1] for answer in answers if answer],
            "mean": range(len(ids)),
        }
        cut = max(0, len(ids) - max_length)
        if cut:
            logger.warning_once(f"Prompts of more than {max_length} tokens lose their beginning.")
        kept = [[token - cut for token in positions[name] if token >= cut] for name in self.spec.pooling]
        return ids[cut:], [tokens or [last - cut] for tokens in kept]  # completions may all have been cut

    def _hidden_states(self, base_model: nn.Module, processing_class, prompts: Sequence[Prompt]) -> torch.Tensor:
        config = base_model.config
        max_length = min(self.spec.max_length, getattr(config, "max_position_embeddings", self.spec.max_length))
        if not prompts:  # of more processes than tasks
            return torch.empty(0)
        rows, positions = zip(*(self._tokens(processing_class, prompt, max_length) for prompt in prompts), strict=True)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding in a batch
        vectors: dict[int, torch.Tensor] = {}
        with frozen_base(base_model) as model, _no_hooks_left(model), tqdm(
            total=len(rows), desc="Task vectors", leave=False,
            disable=len(rows) < 64 or not logging.is_progress_bar_enabled(),
        ) as progress:  # fmt: skip
            body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model  # without the head
            device = next(model.parameters()).device
            for start in range(0, len(rows), self.batch_size):
                indices = by_length[start : start + self.batch_size]
                # Right padding, whatever the tokenizer's habit: no real token's hidden state can depend on it.
                lengths = torch.tensor([len(rows[i]) for i in indices], device=device)
                mask = (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).long()
                ids = torch.zeros_like(mask)
                ids[mask.bool()] = torch.tensor([token for i in indices for token in rows[i]], device=device)
                states = body(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
                if not all(-len(states) <= layer < len(states) for layer in self.spec.layers):
                    raise TaskVectorError(
                        f"Expected layers among the base model's {len(states)} hidden states, found "
                        f"{self.spec.layers}."
                    )
                chosen = torch.stack([states[layer] for layer in self.spec.layers], dim=2)
                for i, row in zip(indices, chosen, strict=True):  # (length, num_vectors, hidden_size)
                    vectors[i] = torch.cat([row[tokens].float().mean(0) for tokens in positions[i]]).cpu()
                progress.update(len(indices))
        return torch.stack([vectors[index] for index in range(len(rows))])


def _span(text: str, part: str, start: int) -> tuple[int, int]:
    """Return where a part of a text begins and ends, from some place on; chat templates may have stripped it."""
    part = part if part in text[start:] else part.strip()
    begin = text.index(part, start)
    return begin, begin + len(part)


@contextmanager
def _no_hooks_left(model: nn.Module) -> Iterator[None]:
    """After this context a model has the hooks that it had before.

    To hand out hidden states transformers registers local functions as hooks, for good: no model with them is pickled.
    """
    installed = "_output_capturing_hooks_installed"  # how transformers remembers them
    before = {module: (set(module._forward_hooks), installed in vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, (hooks, was_installed) in before.items():
            for added in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[added]
            if installed in vars(module) and not was_installed:
                delattr(module, installed)
