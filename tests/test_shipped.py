"""The generator that ships with the package: small, complete, honest about what it has seen, and useful."""

import json
from pathlib import Path

import pytest
import torch

from hf_icm_lora import LoraGeneratorModel, TaskVectorSpec, smollm2_generator_path

SPLITS = Path(__file__).parent.parent / "benchmarks" / "suite" / "splits.json"

# The tokens of a task's first test sample, in the template that the shipped generator was trained in.
EXPECTED_IDS = {
    "country_names/german": "29 7235 37440 42 7235 37440 198",
    "language_names/basque": "29 3432 42 275 6169 266 81 198",
    "calendar/swahili": "29 4451 216 40 42 216 40 16765 100 20545 198",
    "clock/vietnamese_twelve_hour": "29 216 32 32 42 37 36 42 216 33 34 42 37 36 24488 235 22069 93 198",
    "number_transforms/plus_99": "29 216 41 36 38 42 216 33 32 36 37 198",
    "string_transforms/starred_vowels": "29 26975 42 278 26 91 26 198",
    "country_translations/turkish_to_english": "29 7235 37440 42 7235 37440 198",
    "calendar_translations/spanish_to_english": "29 216 40 367 14530 611 257 42 4451 216 40 198",
    "relative_times/turkish": "29 216 34 35 929 3156 42 216 34 35 329 20335 92 5549 131 1118 198",
    "number_lists/joined": "29 216 37 41 28 216 40 36 28 216 39 34 28 216 38 36 42 216 37 41 40 36 39 34 38 36 198",
    "number_steps/double_german": (
        "29 216 41 36 38 42 297 591 15763 486 554 373 5941 14499 42205 1145 662 419 30183 198"
    ),
    "phrases/sentence": "29 12913 11637 42 378 11637 314 12913 30 198",
}


@pytest.fixture(scope="module")
def shipped():
    return LoraGeneratorModel.from_pretrained(smollm2_generator_path())


def test_it_has_a_card_and_weighs_at_most_20_megabytes():
    files = {path.name: path.stat().st_size for path in smollm2_generator_path().iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert sum(files.values()) <= 20_000_000


def test_it_has_seen_the_training_splits_of_the_suite_and_none_of_the_others(shipped):
    splits, known = json.loads(SPLITS.read_text(encoding="utf-8")), set(shipped.config.training_tasks)
    assert {*splits["seen"], *splits["samples"]} <= known
    assert not known & {name for split, names in splits.items() if split not in ("seen", "samples") for name in names}


def test_it_names_no_place_of_the_machine_that_made_it():
    text = (smollm2_generator_path() / "config.json").read_text(encoding="utf-8")
    assert json.loads(text)["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not any(place in text for place in ("/root", "/home", "/tmp", ".cache"))


def test_it_writes_adapters(shipped):
    assert (shipped.config.has_encoder, shipped.config.weight_format) == (False, "int8")
    spec = TaskVectorSpec(**shipped.config.task_vector_spec)
    shape = (shipped.config.num_task_vectors, shipped.config.task_vector_size)
    assert shape == (len(spec.layers) * len(spec.pooling), 576)
    vector = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights = shipped.generate_state_dict(vector)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert len(weights) == 2 * 30  # A and B of one module in each of 30 layers


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_real_tokenizer_cuts_samples_as_in_training_and_chats_as_its_template(shipped):
    from transformers import AutoTokenizer

    from hf_icm_lora import built_in_tasks, smollm2_path
    from hf_icm_lora.completion import CompletionCollator

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    plain, chat = (CompletionCollator(tokenizer, template=name) for name in (shipped.config.template, "chat"))
    suite = {task.name: task for task in built_in_tasks()}
    found = {}
    for name in EXPECTED_IDS:
        (sample, *_) = suite[name].test
        found[name] = " ".join(map(str, plain([sample])["input_ids"][0].tolist()))
        messages = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.completion}]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)[:-1]  # without the line break at its end
        assert chat([sample])["input_ids"].tolist() == [whole]
    assert found == EXPECTED_IDS


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_on_the_real_model_its_adapters_lower_the_loss_of_unseen_tasks(shipped):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_icm_lora import built_in_tasks, smollm2_path
    from hf_icm_lora.completion import CompletionCollator, score_completions

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32)
    suite = {task.name: task for task in built_in_tasks()}
    for name in json.loads(SPLITS.read_text(encoding="utf-8"))["validation"][:4]:
        assert name not in shipped.config.training_tasks
        batch = CompletionCollator(tokenizer, template=shipped.config.template)(suite[name].test)
        losses = []
        with torch.no_grad():
            losses.append(score_completions(base, batch).loss.sum().item())
            model = shipped.generate_adapter(base, processing_class=tokenizer, examples=suite[name].demo[:12])
            losses.append(score_completions(model, batch).loss.sum().item())
        base = model.unload()
        assert losses[1] < 0.8 * losses[0]
