"""Right answers on real tasks: the arms, what each makes of a task's examples, and how that is scored.

An arm is a function of what is given of a task. It returns what stands before each prompt, or a PEFT model. To add
one, write the function and name it in `ARMS`; its docstring is what the report says of it.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_icm_lora import LoraGeneratorModel, Sample, Task, in_context_adapter
from hf_icm_lora.base_model import frozen_base
from hf_icm_lora.completion import (
    CHAT,
    DEFAULT_TEMPLATE,
    MOST_LABELS,
    CompletionCollator,
    label_accuracy,
    score_completions,
)

MULTI_TASK = "build/real/multi_task"  # where multi_task.py leaves its adapter
BATCH = 16
MOST_TOKENS = 2048  # of a prompt with the examples before it


class Prompt(NamedTuple):
    """What the base model reads before each prompt.

    Args:
        examples (`Sequence[Sample]`), description (`str`, *optional*): As in [`CompletionCollator`].
    """

    examples: Sequence[Sample] = ()
    description: str | None = None


@dataclass(frozen=True)
class Given:
    """What an arm is given of a task: its examples, for some arms all of its training samples, and no test sample."""

    task: Task
    wrong: Task
    base: PreTrainedModel
    tokenizer: Any
    generator: LoraGeneratorModel | None
    template: str = DEFAULT_TEMPLATE
    num_examples: int = 12
    device: str = "cpu"

    @property
    def examples(self) -> Sequence[Sample]:
        return self.task.demo[: self.num_examples]


@dataclass(frozen=True)
class Arm:
    """A row of the tables.

    Args:
        make: What the arm does.
        template (`str`): Which it is made for, and scored in.
        scored_in (`str`, *optional*): Another template that it is scored in.
        options (`dict`): Arguments of `make`.
    """

    make: Callable[..., Prompt | PeftModel]
    template: str = DEFAULT_TEMPLATE
    scored_in: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """What the arm is, in a sentence or two."""
        about = [" ".join((inspect.getdoc(self.make) or "").split())]
        about += [TOLD[name].format(value) for name, value in self.options.items() if name in TOLD]
        if self.scored_in:
            about.append(f"Made in the {named(self.template)} template, scored in the {named(self.scored_in)} one.")
        elif self.template == CHAT:
            about.append("Chat template.")
        return " ".join(about)


TOLD = {
    "described": "With the description, too.",
    "wrong": "They are those of another task.",
    "steps": "{} steps, of four examples each.",
    "refine_steps": "Then {} gradient steps on them.",
}


def named(template: str) -> str:
    return "chat" if template == CHAT else "plain"


def base(given: Given, described: bool = False) -> Prompt:
    """The base model alone."""
    return Prompt((), given.task.description if described else None)


def few_shot_prompt(given: Given, described: bool = False) -> Prompt:
    """The base model with the examples before every prompt."""
    return Prompt(given.examples, given.task.description if described else None)


def task_lora(given: Given, epochs: int = 3, rate: float = 1e-3) -> PeftModel:
    """An ordinary LoRA, trained on all training samples: what the task can give."""
    samples = given.task.train
    return peft_lora(given, samples, steps=epochs * -(-len(samples) // 8), batch_size=8, rate=rate)


def peft_lora_examples(given: Given, steps: int, rate: float = 1e-3) -> PeftModel:
    """An ordinary LoRA, trained on the examples: what a user would do instead."""
    return peft_lora(given, given.examples, steps, batch_size=4, rate=rate)


def closed_form(given: Given, **options) -> PeftModel:
    """`in_context_adapter` with the examples: no training, no gradient step."""
    return in_context_adapter(given.base, given.tokenizer, given.examples, template=given.template, **options)


def generated(given: Given, described: bool = False, refine_steps: int = 0, wrong: bool = False) -> PeftModel:
    """The generator's adapter for the examples."""
    task = given.wrong if wrong else given.task
    return given.generator.generate_adapter(
        given.base,
        processing_class=given.tokenizer,
        examples=task.demo[: given.num_examples],
        description=task.description if described else None,
        template=given.template,
        refine_steps=refine_steps,
    )


def from_description(given: Given) -> PeftModel:
    """The generator's adapter for the description, without an example."""
    return given.generator.generate_adapter(
        given.base, processing_class=given.tokenizer, description=given.task.description, template=given.template
    )


def multi_task_lora(given: Given, folder: str = MULTI_TASK) -> PeftModel:
    """One LoRA of all training tasks together, made by `multi_task.py`, which knows nothing of this task."""
    return PeftModel.from_pretrained(given.base, folder)


ARMS = {
    "base": Arm(base),
    "base_described": Arm(base, options={"described": True}),
    "base_chat": Arm(base, CHAT),
    "base_chat_described": Arm(base, CHAT, options={"described": True}),
    "few_shot_prompt": Arm(few_shot_prompt),
    "few_shot_prompt_described": Arm(few_shot_prompt, options={"described": True}),
    "few_shot_prompt_chat": Arm(few_shot_prompt, CHAT),
    "few_shot_prompt_chat_described": Arm(few_shot_prompt, CHAT, options={"described": True}),
    "closed_form": Arm(closed_form),
    "closed_form_chat": Arm(closed_form, CHAT),
    "closed_form_in_chat": Arm(closed_form, scored_in=CHAT),
    "generated": Arm(generated),
    "generated_described": Arm(generated, options={"described": True}),
    "generated_chat": Arm(generated, CHAT),
    "generated_in_chat": Arm(generated, scored_in=CHAT),
    "generated_chat_in_plain": Arm(generated, CHAT, DEFAULT_TEMPLATE),
    "from_description": Arm(from_description),
    "wrong_condition": Arm(generated, options={"wrong": True}),
    "refined": Arm(generated, options={"refine_steps": 20}),
    "multi_task_lora": Arm(multi_task_lora),
    "peft_lora_examples_20": Arm(peft_lora_examples, options={"steps": 20}),
    "peft_lora_examples_100": Arm(peft_lora_examples, options={"steps": 100}),
    "task_lora": Arm(task_lora),
}


def peft_lora(given: Given, samples: Sequence[Sample], steps: int, batch_size: int, rate: float) -> PeftModel:
    """Train a LoRA on some samples."""
    return train_lora(given.base, given.tokenizer, given.template, _batches(samples, batch_size), steps, rate)


def train_lora(
    base, tokenizer, template: str, batches: Iterator[Sequence[Sample]], steps: int, rate: float
) -> PeftModel:
    """Train a LoRA of rank 16 on all linear layers, with AdamW and a rate that falls to zero."""
    torch.manual_seed(0)  # of PEFT's A
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    collate = CompletionCollator(tokenizer, False, template)
    model.train()
    for step in tqdm(range(steps), desc="Training", leave=False, disable=steps < 200):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 5) * (1 - step / steps)
        scores = score_completions(model, collate(next(batches)))
        (scores.loss.sum() / scores.num_tokens.sum()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield batches without end, epoch by epoch, each in another order."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [samples[index] for index in order[start : start + size]]


def score(given: Given, arm: Arm, test: Sequence[Sample], by_label: bool = True) -> dict[str, float]:
    """Return an arm's right answers and loss on test samples, its seconds, and the bytes that it leaves behind.

    With `by_label`, classifications also get the share of samples whose label is the most probable one.
    """
    given = replace(given, template=arm.template)
    start = time.perf_counter()
    made = arm.make(given, **arm.options)
    seconds = time.perf_counter() - start
    template = arm.scored_in or arm.template
    labels = given.task.labels if by_label else None
    if isinstance(made, PeftModel):
        try:
            scores = _scores(made, given.tokenizer, template, Prompt(), test, labels)
            size = sum(t.numel() * 2 for name, t in made.state_dict().items() if ".lora_" in name)  # in 16 bits
        finally:
            made.unload()
        return scores | {"seconds": round(seconds, 3), "bytes": size}
    with frozen_base(given.base) as model:
        return _scores(model, given.tokenizer, template, made, test, labels) | {
            "seconds": round(seconds, 3),
            "bytes": 0,
        }


@torch.no_grad()
def _scores(
    model, tokenizer, template: str, prompt: Prompt, test: Sequence[Sample], labels: Sequence[str] | None
) -> dict[str, float]:
    collate = CompletionCollator(tokenizer, False, template, prompt.examples, prompt.description, MOST_TOKENS)
    loss, tokens, exact = 0.0, 0, 0
    samples = sorted(test, key=lambda sample: len(sample.prompt + sample.completion))  # little padding
    for start in range(0, len(samples), BATCH):
        scores = score_completions(model, collate(samples[start : start + BATCH]))
        loss += scores.loss.sum().item()
        tokens += int(scores.num_tokens.sum())
        exact += int(scores.exact.sum())
    found = {"loss": round(loss / tokens, 4), "exact_match": round(exact / len(test), 4)}
    if labels and 2 <= len(labels) <= MOST_LABELS and not prompt.examples:  # or each label would cost a long prompt
        found["label_accuracy"] = round(label_accuracy(model, collate, test, labels, BATCH), 4)
    return found
