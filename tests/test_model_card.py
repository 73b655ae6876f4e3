"""Cards: each says what a reader must know, in metadata that the Hub reads, and nothing that is nobody's business."""

import re

import pytest
import yaml
from conftest import SIZES, make_llama, training_arguments
from huggingface_hub import ModelCard

from hf_icm_lora import (
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    PublishingError,
    add_evaluation,
    evaluate_generator,
    generator_card,
)
from hf_icm_lora.model_card import NOT_EVALUATED, adapter_card, zoo_card

GENERATOR_PATTERN = r"""---
base_model: user/base
.*library_name: hf_icm_lora
.*---

# (?P<title>.+)

Writes a LoRA adapter \(rank 4, `q_proj`, `v_proj`\) for \[user/base\]\(https://huggingface.co/user/base\) from .+

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
.+
```

The adapters expect prompts of the form `- \{prompt\}: \{completion\}\\n`.

## What it is

\| \| \|
\| --- \| --- \|
\| base model \| .+, fingerprint `[0-9a-f]{12}` \|
\| adapters \| [\d,]+ generated numbers each, as plain LoRA of rank 4 \|
\| generator \| .+ parameters, [\d.]+ MB.* \|
\| storage \| smaller than \d+ fp16 adapters or more \|
\| condition \| hidden states of layers -1, averaged over prompts, completions, of the frozen base model: .+ \|

## Tasks seen in training \(2\)

- shift: 1, 2

## Evaluation
.+
## Limits
.+
## Training

`.+`

\| \| \|
\| --- \| --- \|
\| trained on \| adapters \|
\| items \| \d+ \|
\| steps \| 2 \|
\| batch size \| 8 \|
.+\| seed \| 42 \|
\| machine \| .+threads \d+ \|
\| versions \| python .+ \|

## Citation

```bibtex
.+
```"""


@pytest.fixture(scope="module")
def made(world, tokenizer, tmp_path_factory):
    """A zoo, a trained generator and its evaluation."""
    seen = world.zoo.subset(["shift/1", "shift/2"])
    generator = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(seen, **SIZES))
    generator.config.base_model_name_or_path = "user/base"
    args = training_arguments(tmp_path_factory.mktemp("cards"), max_steps=2)
    LoraGeneratorTrainer(generator, args, train_dataset=seen.as_dataset()).train()
    report = evaluate_generator(generator, make_llama(), tokenizer, world.zoo, world.tasks[:3], num_examples=4)
    return world.zoo, generator, report


def test_generator_card_follows_its_pattern(made):
    _, generator, report = made
    for card in (generator_card(generator), generator_card(generator, report=report)):
        assert re.fullmatch(GENERATOR_PATTERN, card.content, re.DOTALL), card.content
    assert "{{" not in card.content
    assert "None" not in card.content
    card = generator_card(generator, repo_id="me/mine", license="mit", tags=["more"])
    assert re.search("^# mine$", card.text, re.MULTILINE)
    assert 'LoraGeneratorModel.from_pretrained("me/mine")' in card.text
    data = yaml.safe_load(card.content.split("---")[1])
    assert data == {
        "base_model": "user/base",
        "base_model_relation": "adapter",
        "library_name": "hf_icm_lora",
        "license": "mit",
        "tags": ["hf_icm_lora", "lora", "peft", "text-generation", "more"],
    }


def test_evaluation_in_text_and_metadata_and_in_place_of_an_older_one(made):
    _, generator, report = made
    plain = generator_card(generator)
    assert NOT_EVALUATED in plain.text
    card = add_evaluation(plain, report, ["evaluation/gain_per_task.png"])
    assert NOT_EVALUATED not in card.text
    assert "![gain per task](evaluation/gain_per_task.png)" in card.text
    rows = {row for split in report["splits"].values() for row in split}
    for row in rows:
        assert f"| {row} |" in card.text
    again = ModelCard(card.content)  # as it comes back from a file
    told = {(r.dataset_split, r.metric_name): r.metric_value for r in again.data.eval_results}
    expected = {}
    for split, rows_of_split in report["splits"].items():
        for row, summary in rows_of_split.items():
            expected[split, f"right answers, {row}"] = summary["exact_match"]
            if row not in ("base", "task_lora"):
                expected[split, f"mean recovered accuracy, {row}"] = summary["mean_recovered_accuracy"]
        for kind in ("mean", "median", "min"):
            for what in ("accuracy", "gain"):
                value = rows_of_split["generated"][f"{kind}_recovered_{what}"]
                expected[split, f"{kind} recovered {what}, generated"] = value
    expected = {name: value for name, value in expected.items() if value is not None}
    assert told == {name: pytest.approx(value, abs=1e-4) for name, value in expected.items()}
    metrics = [result.metric_type for result in again.data.eval_results]
    assert set(metrics) >= {"exact_match", "recovered_gain"}
    assert metrics[0] == "exact_match"
    twice = add_evaluation(card, report)
    assert twice.text.count("| wrong_condition |") == card.text.count("| wrong_condition |")
    assert ".png" not in twice.text
    for text in ("# Another card", "<!-- evaluation --> <!-- end evaluation -->", "# A\n<!-- evaluation -->"):
        with pytest.raises(PublishingError, match="no place for an evaluation"):
            add_evaluation(ModelCard(text), report)


def test_a_thousand_tasks_are_told_by_family(made):
    _, generator, _ = made
    names = generator.config.training_tasks
    try:
        generator.config.training_tasks = [f"numbers/{n}" for n in range(300)] + ["alone"]
        text = generator_card(generator).text
    finally:
        generator.config.training_tasks = names
    assert "By family: numbers (300), others (1)." in text
    assert "numbers/17" not in text


def test_adapter_card(made):
    _, generator, _ = made
    about = {"generator": {"folder": "mine"}, "template": generator.config.template, "seed": None, "refine_steps": 3}
    about |= {
        "gain_on_examples": 0.123456,
        "description": "Shift.",
        "examples": [{"prompt": "a|b", "completion": "ü"}] * 40,
    }
    card = adapter_card(generator.adapter_config(), {"default": about})
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert "It was written by a generator of LoRAs (`mine`)" in card.text
    assert "then refined by gradient steps" in card.text
    assert "| gain on examples | 0.1235 |" in card.text
    assert "| seed | - |" in card.text
    assert card.text.count('{"prompt": "a|b", "completion": "ü"}') == 32
    assert "AutoPeftModelForCausalLM" in card.text


def test_zoo_card(made):
    zoo, _, _ = made
    card = zoo_card(zoo, repo_id="me/zoo", base_model_name_or_path="user/base")
    assert card.data.configs == [{"config_name": "default", "data_files": "tasks.jsonl"}]
    assert "A zoo of 4 LoRA adapters of [user/base]" in card.text
    assert 'LoraZoo.from_hub("me/zoo")' in card.text
    for row in zoo.task_table():
        assert f"| {row['name']} | {row['best_step']} | {row['validation_loss']} |" in card.text
