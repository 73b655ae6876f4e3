"""The generator that ships with the package: small, complete, honest about what it has seen, and useful."""

import json
from pathlib import Path

import pytest
import torch

from hf_icm_lora import LoraGeneratorModel, TaskVectorSpec, smollm2_generator_path

SPLITS = Path(__file__).parent.parent / "benchmarks" / "suite" / "splits.json"


@pytest.fixture(scope="module")
def shipped():
    return LoraGeneratorModel.from_pretrained(smollm2_generator_path())


def test_it_has_a_card_and_weighs_at_most_12_megabytes():
    files = {path.name: path.stat().st_size for path in smollm2_generator_path().iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert sum(files.values()) <= 12_000_000


def test_it_has_seen_the_training_splits_of_the_suite_and_nothing_else(shipped):
    splits = json.loads(SPLITS.read_text(encoding="utf-8"))
    assert set(shipped.config.training_tasks) == {*splits["seen"], *splits["samples"]}


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
    assert len(weights) == 2 * 2 * 30  # A and B of two modules in each of 30 layers


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
