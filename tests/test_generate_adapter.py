"""The contract of `generate_adapter`: an ordinary PEFT model, from what a user has, and a base left as it was."""

import copy
import json
import pickle

import pytest
import torch
from conftest import LORA_TARGETS, SIZES, amplified, make_gpt2, make_llama, make_t5, make_tasks
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM

from hf_icm_lora import (
    AdapterSlot,
    ArgumentError,
    CollectionArguments,
    ExampleLoss,
    IncompatibleAdapterError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraLayout,
    TaskError,
    TaskVectorError,
    TaskVectorExtractor,
    TaskVectorSpec,
    UnfamiliarTaskError,
    attach_adapter,
    collect_zoo,
    in_context_adapter,
    load_adapter,
    save_adapter_card,
)
from hf_icm_lora.adapter import adapter_state_dict
from hf_icm_lora.base_model import base_model_fingerprint
from hf_icm_lora.completion import CompletionCollator, score_completions
from hf_icm_lora.layout import LoraModule
from hf_icm_lora.tasks import Sample

EXAMPLES = [("ab", "bc"), ("cd", "de"), ("ef", "fg"), ("gh", "hi")]
DESCRIPTION = "Shift each letter by 1."
IDS = torch.arange(2, 42).reshape(2, 20)


@pytest.fixture
def base_path(world):
    return world.folder / "base"


@pytest.fixture
def load_base(base_path):
    return lambda: LlamaForCausalLM.from_pretrained(base_path)


@pytest.fixture
def base(load_base):
    return load_base()


@pytest.fixture
def generator(world):
    """Its weights are large enough to be seen in the logits."""
    return copy.deepcopy(world.generator)


@pytest.fixture
def task_vector():
    return torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, **kwargs):
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    return model(**inputs, **kwargs).logits


def adapters(model, name="default"):
    return {key: tensor.clone() for key, tensor in adapter_state_dict(model, name).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def assert_untouched(base, before):
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    assert torch.equal(logits(base), before)


def test_returns_a_peft_model_in_eval_mode_with_a_frozen_active_adapter(base, generator, task_vector):
    model = generator.generate_adapter(base, task_vector=task_vector)
    assert type(model) is PeftModelForCausalLM
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_equals_generate_state_dict_attached(base, generator, task_vector, load_base):
    before = logits(base)
    weights = generator.generate_state_dict(task_vector)
    model = generator.generate_adapter(base, task_vector=task_vector)
    assert equal(adapters(model), weights)
    attached = attach_adapter(load_base(), generator.adapter_config(), weights)
    assert torch.equal(logits(model), logits(attached))
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_unload_gives_back_the_base(base, generator, task_vector):
    before = logits(base)
    model = generator.generate_adapter(base, task_vector=task_vector)
    assert model.get_base_model() is base
    assert not torch.equal(logits(model), before)
    assert_untouched(model.unload(), before)


def test_logits_are_those_of_base_plus_b_times_a(base, generator, task_vector, load_base):
    weights = generator.generate_state_dict(task_vector)
    by_hand = load_base()
    with torch.no_grad():
        for key in weights:
            if ".lora_A." in key:
                module = by_hand.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                module.weight += weights[key.replace("lora_A", "lora_B")] @ weights[key]
    model = generator.generate_adapter(base, task_vector=task_vector)
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-4, atol=1e-4)


def test_is_deterministic_and_leaves_the_global_random_state_alone(generator, tokenizer, load_base):
    inputs = {"processing_class": tokenizer, "examples": EXAMPLES, "description": DESCRIPTION}
    bases = [load_base(), load_base()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generator.generate_adapter(bases[0], **inputs)
    assert torch.equal(before, torch.get_rng_state())
    generator.generate_adapter(first, adapter_name="drawn", generator=torch.Generator().manual_seed(0), **inputs)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert equal(adapters(first), adapters(generator.generate_adapter(bases[1], **inputs)))


def test_torch_generator_chooses_the_latent(generator, task_vector, load_base):
    def generate(seed=None):
        rng = None if seed is None else torch.Generator().manual_seed(seed)
        return adapters(generator.generate_adapter(load_base(), task_vector=task_vector, generator=rng))

    assert equal(generate(1), generate(1))
    assert not equal(generate(1), generate(2))
    assert not equal(generate(), generate(1))
    prior_mean = generator(task_vector=task_vector).lora_weights.mean(0)
    packed, _ = generator.layout.pack(generate(), generator.adapter_config())
    torch.testing.assert_close(packed, prior_mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given", [("examples",), ("description",), ("examples", "description")])
def test_examples_and_descriptions_become_task_vectors(base, generator, tokenizer, given):
    inputs = {name: value for name, value in (("examples", EXAMPLES), ("description", DESCRIPTION)) if name in given}
    extractor = TaskVectorExtractor(TaskVectorSpec(**generator.config.task_vector_spec))
    vector = extractor.vector(base, tokenizer, **inputs)
    expected = generator.generate_state_dict(vector)
    assert equal(adapters(generator.generate_adapter(base, processing_class=tokenizer, **inputs)), expected)


def test_what_is_given_matters(generator, tokenizer, load_base):
    inputs = [{"examples": EXAMPLES}, {"description": DESCRIPTION}, {"examples": EXAMPLES, "description": DESCRIPTION},
              {"examples": EXAMPLES[:2]}, {"description": "Say no."}]  # fmt: skip
    generated = [
        adapters(generator.generate_adapter(load_base(), processing_class=tokenizer, **each)) for each in inputs
    ]
    assert not any(equal(generated[i], generated[j]) for i in range(len(inputs)) for j in range(i))


def test_draws_of_the_task_vector_are_averaged(generator, task_vector):
    packed = generator.decode_task_vector(task_vector)
    alone = torch.stack([generator.decode_task_vector(draw) for draw in task_vector])
    assert alone.std(0).max() > 1e-4
    torch.testing.assert_close(packed, alone.mean(0), rtol=1e-4, atol=1e-6)


# Refusals: the base stays as it was


def test_for_another_base_model_examples_are_enough_and_a_warning_says_so(generator, tokenizer, caplog):
    other, examples = make_llama(seed=1), [("ab", "bc"), ("cd", "de"), ("fg", "gh")]
    with caplog.at_level("WARNING"):
        model = generator.generate_adapter(
            other, processing_class=tokenizer, examples=examples, fit_scale=False, refine_steps=1
        )
    assert "is written by in_context_adapter" in caplog.text
    record = model.lora_generation["default"]
    assert record.generator == {"function": "in_context_adapter"}
    assert set(model.peft_config["default"].target_modules) == {"down_proj"}
    model = generator.generate_adapter(
        make_llama(seed=1), processing_class=tokenizer, examples=examples, fit_scale=False
    )
    expected = in_context_adapter(make_llama(seed=1), tokenizer, examples, template=generator.config.template)
    for name, tensor in adapters(expected).items():
        torch.testing.assert_close(adapters(model)[name], tensor)
    for given in ({"description": "Next letters."}, {"examples": examples[:1]}):
        with pytest.raises(IncompatibleAdapterError, match="was made for"):
            generator.generate_adapter(make_llama(seed=1), processing_class=tokenizer, **given)


def test_wrong_base_model_is_refused_with_both_fingerprints(generator, task_vector):
    other = make_llama(seed=1)
    before = logits(other)
    expected, found = generator.config.base_model_fingerprint[:12], base_model_fingerprint(other)[:12]
    with pytest.raises(IncompatibleAdapterError, match=rf"(?s){expected}.*{found}.*check_base_model=False"):
        generator.generate_adapter(other, task_vector=task_vector)
    assert_untouched(other, before)


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_check_base_model_can_be_switched_off(generator, task_vector):
    model = generator.generate_adapter(make_llama(seed=1), task_vector=task_vector, check_base_model=False)
    assert equal(adapters(model), generator.generate_state_dict(task_vector))


def test_base_of_another_shape_is_refused_even_unchecked(generator, task_vector):
    for other in (make_gpt2(), make_t5()):
        before = logits(other)
        with pytest.raises(IncompatibleAdapterError, match="has no module"):
            generator.generate_adapter(other, task_vector=task_vector, check_base_model=False)
        assert_untouched(other, before)


def test_nothing_given_is_refused(base, generator, tokenizer):
    before = logits(base)
    for nothing in ({}, {"examples": []}, {"examples": (), "description": ""}):
        with pytest.raises(TaskError, match="task_vector, examples or a description"):
            generator.generate_adapter(base, processing_class=tokenizer, **nothing)
    assert_untouched(base, before)


@pytest.mark.parametrize("extra", [{"examples": EXAMPLES}, {"description": DESCRIPTION}])
def test_a_vector_and_examples_are_refused(base, generator, tokenizer, task_vector, extra):
    before = logits(base)
    with pytest.raises(TaskError, match="found both"):
        generator.generate_adapter(base, task_vector=task_vector, processing_class=tokenizer, **extra)
    assert_untouched(base, before)


@pytest.mark.parametrize("given", [{"examples": EXAMPLES}, {"description": DESCRIPTION}])
def test_missing_processing_class_is_refused(base, generator, given):
    before = logits(base)
    with pytest.raises(TaskError, match="processing_class"):
        generator.generate_adapter(base, **given)
    assert_untouched(base, before)


def test_malformed_examples_are_refused(base, generator, tokenizer):
    before = logits(base)
    with pytest.raises(TaskError, match=r"examples\[1\]"):
        generator.generate_adapter(base, processing_class=tokenizer, examples=[("a", "b"), ("a", "b", "c")])
    assert_untouched(base, before)


@pytest.mark.parametrize("vector", [torch.zeros(1, 1, 31), torch.full((1, 1, 32), float("nan"))])
def test_unusable_task_vector_is_refused(base, generator, vector):
    before = logits(base)
    with pytest.raises(TaskVectorError, match="Expected a task vector of shape|not finite"):
        generator.generate_adapter(base, task_vector=vector)
    assert_untouched(base, before)


# Between tasks


def test_several_descriptions_are_weighed(base, generator, tokenizer, load_base):
    first, second = DESCRIPTION, "Shift each letter by 2."
    extractor = TaskVectorExtractor(TaskVectorSpec(**generator.config.task_vector_spec))
    one, two = (extractor.vector(base, tokenizer, description=text) for text in (first, second))
    task = {"processing_class": tokenizer}
    model = generator.generate_adapter(load_base(), description={first: 3, second: 1}, **task)
    assert equal(adapters(model), generator.generate_state_dict(0.75 * one + 0.25 * two))
    assert model.lora_generation["default"].description == {first: 3, second: 1}
    alone = generator.generate_adapter(load_base(), description={first: 2.0}, **task)
    assert equal(adapters(alone), adapters(generator.generate_adapter(load_base(), description=first, **task)))
    both = generator.generate_adapter(load_base(), description={first: 1, second: 1}, examples=EXAMPLES, **task)
    assert not equal(adapters(both), adapters(model))
    for weights in ({first: 0.0}, {first: 1, second: -1}):
        with pytest.raises(ArgumentError, match="weights with a positive sum"):
            generator.generate_adapter(load_base(), description=weights, **task)


def test_the_card_is_of_the_adapters_in_the_folder(generator, tokenizer, tmp_path):
    public, private = [("ab", "bc"), ("cd", "de")], [("secret", "x"), ("fg", "gh")]
    model = generator.generate_adapter(
        make_llama(), processing_class=tokenizer, examples=public, adapter_name="public"
    )
    model = generator.generate_adapter(model, processing_class=tokenizer, examples=private, adapter_name="private")
    model.save_pretrained(tmp_path, selected_adapters=["public"], save_embedding_layers=False)
    save_adapter_card(model, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert '"prompt": "ab"' in card
    assert "secret" not in card


def test_the_card_names_all_descriptions(base, generator, tokenizer, tmp_path):
    weights = {"Shift by 1.": 0.75, "Shift by 2.": 0.25}
    model = generator.generate_adapter(base, processing_class=tokenizer, description=weights)
    save_adapter_card(model, tmp_path)
    assert "0.75 x Shift by 1.; 0.25 x Shift by 2." in (tmp_path / "README.md").read_text()


def test_a_mixed_task_vector_is_a_mixed_condition(generator, task_vector):
    """What makes the mean of two task vectors a point between two tasks."""
    other = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    mixed = generator.zoo_normalizer.condition(0.25 * task_vector + 0.75 * other)
    expected = [generator.zoo_normalizer.condition(vector) for vector in (task_vector, other)]
    torch.testing.assert_close(mixed, 0.25 * expected[0] + 0.75 * expected[1])


# Without the base model


def test_export_writes_a_plain_adapter(generator, task_vector, tmp_path, base):
    assert generator.export_adapter(tmp_path / "half", task_vector, dtype=torch.float16) == 0.0
    config, state_dict = load_adapter(tmp_path / "half")
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float16}
    for key, tensor in generator.generate_state_dict(task_vector).items():
        torch.testing.assert_close(state_dict[key].float(), tensor, atol=1e-2, rtol=1e-3)
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert 0 < generator.export_adapter(tmp_path / "small", task_vector, rank=1) < 1
    assert load_adapter(tmp_path / "small")[0]["r"] == 1
    with pytest.raises(FileExistsError):
        generator.export_adapter(tmp_path / "small", task_vector)


# Several adapters


def test_second_adapter_keeps_the_first(base, generator, task_vector):
    model = generator.generate_adapter(base, task_vector=task_vector, adapter_name="one")
    weights, before = adapters(model, "one"), logits(model)
    again = generator.generate_adapter(model, task_vector=-task_vector, adapter_name="two")
    assert again is model
    assert model.active_adapters == ["two"]
    assert equal(adapters(model, "one"), weights)
    assert equal(adapters(model, "two"), generator.generate_state_dict(-task_vector))
    assert not torch.equal(logits(model), before)
    model.set_adapter("one")
    assert torch.equal(logits(model), before)


def test_many_adapters_serve_one_batch(base, generator, task_vector):
    vectors = {f"task-{index}": (index - 4) * task_vector for index in range(9)}
    model, alone = base, {"__base__": logits(base)}
    for name, vector in vectors.items():
        model = generator.generate_adapter(model, task_vector=vector, adapter_name=name)
        alone[name] = logits(model)
    names = ["task-7", "__base__", "task-1", "task-7", "task-4"]
    with torch.no_grad():
        mixed = model(input_ids=IDS[:1].expand(5, -1), adapter_names=names).logits
    for row, name in zip(mixed, names, strict=True):
        torch.testing.assert_close(row, alone[name][0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mixed[0], mixed[2], atol=1e-2)
    model.set_adapter("task-1", inference_mode=True)
    assert torch.equal(logits(model), alone["task-1"])
    for name in vectors:
        if name != "task-1":
            model.delete_adapter(name)
    assert list(model.peft_config) == ["task-1"]
    assert torch.equal(logits(model), alone["task-1"])


def test_a_slot_is_written_into_in_place(base, generator, task_vector, load_base):
    slot = generator.adapter_slot(base, "slot")
    assert isinstance(slot.model, PeftModelForCausalLM)
    torch.testing.assert_close(logits(slot.model), logits(load_base()), atol=0, rtol=0)
    pointers = {name: parameter.data_ptr() for name, parameter in slot.model.named_parameters()}
    for vector in (task_vector, -task_vector):
        slot.write(generator.decode_task_vector(vector))
        expected = generator.generate_adapter(load_base(), task_vector=vector)
        assert equal(adapters(slot.model, "slot"), adapters(expected))
        assert torch.equal(logits(slot.model), logits(expected))
    assert {name: parameter.data_ptr() for name, parameter in slot.model.named_parameters()} == pointers
    assert not any(parameter.requires_grad for name, parameter in slot.model.named_parameters() if ".lora_" in name)
    for wrong in (torch.zeros(3), torch.zeros(1, generator.layout.num_weights)):
        with pytest.raises(IncompatibleAdapterError, match="Expected weights of shape"):
            slot.write(wrong)
    with pytest.raises(IncompatibleAdapterError, match="was made for"):
        generator.adapter_slot(make_llama(seed=1))


def test_a_slot_pads_smaller_ranks(base):
    config = {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
    modules = tuple(
        LoraModule(f"model.layers.0.self_attn.{name}", 32, out, rank)
        for name, out, rank in (("q_proj", 32, 3), ("v_proj", 16, 2))
    )
    layout = LoraLayout(modules, "shared_init")
    config["target_modules"] = [module.name for module in modules]
    slot = AdapterSlot(base, config, layout, torch.zeros(0))
    weights = torch.randn(layout.num_weights, generator=torch.Generator().manual_seed(0))
    slot.write(weights)
    assert equal(adapters(slot.model), layout.unpack(weights, torch.zeros(0)))


def test_adapter_that_a_user_trained_stays(base, generator, task_vector):
    """Another rank, other modules, PEFT's own initialization."""
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), "users")
    weights, before = adapters(model, "users"), logits(model)
    generator.generate_adapter(model, task_vector=task_vector, adapter_name="generated")
    model.set_adapter("users")
    assert equal(adapters(model, "users"), weights)
    assert torch.equal(logits(model), before)


def test_examples_are_read_without_the_adapters_that_are_there(base, generator, tokenizer, task_vector, load_base):
    expected = adapters(generator.generate_adapter(load_base(), processing_class=tokenizer, examples=EXAMPLES))
    model = generator.generate_adapter(base, task_vector=task_vector)
    generator.generate_adapter(model, processing_class=tokenizer, examples=EXAMPLES, adapter_name="two")
    assert equal(adapters(model, "two"), expected)


def test_same_name_is_overwritten_in_place(base, generator, task_vector, load_base):
    model = generator.generate_adapter(base, task_vector=task_vector)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    again = generator.generate_adapter(model, task_vector=-task_vector)
    assert again is model
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert equal(adapters(model), generator.generate_state_dict(-task_vector))
    fresh = generator.generate_adapter(load_base(), task_vector=-task_vector)
    assert torch.equal(logits(model), logits(fresh))
    assert list(model.peft_config) == ["default"]


# The model is PEFT's own


@pytest.fixture
def model(base, generator, tokenizer):
    return generator.generate_adapter(base, processing_class=tokenizer, examples=EXAMPLES, description=DESCRIPTION)


def test_nothing_is_bound_onto_the_model(model, load_base):
    plain = get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    assert vars(model).keys() - vars(plain).keys() == {"lora_generation"}
    for method in ("save_pretrained", "push_to_hub", "create_or_update_model_card"):
        assert getattr(model, method).__func__ is getattr(PeftModelForCausalLM, method)
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}  # a set, as PEFT has it


def test_the_model_is_copied_and_pickled_with_what_is_known_of_it(model, tmp_path):
    expected, known = logits(model), model.lora_generation["default"]
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in [*copies, torch.load(tmp_path / "model.pt", weights_only=False)]:
        assert torch.equal(logits(one), expected)
        assert one.lora_generation["default"] == known


def test_what_is_known_is_a_record_of_json_values(model, generator):
    record = model.lora_generation["default"]
    assert (record.made_from, record.seed, record.refine_steps) == ("both", None, 0)
    assert record.examples == tuple(Sample(*example) for example in EXAMPLES)
    told = record.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["examples"][0] == {"prompt": "ab", "completion": "bc"}
    assert told["description"] == DESCRIPTION
    assert not {"seed", "fallback"} & told.keys()
    assert told.keys() - record.to_dict(describe_task=False).keys() == {"examples", "description"}


def test_a_card_is_written_into_the_folder(model, tmp_path, load_base):
    model.save_pretrained(tmp_path)
    save_adapter_card(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert DESCRIPTION in card
    assert "| made from | both |" in card
    save_adapter_card(model, tmp_path, describe_task=False)
    assert DESCRIPTION not in (tmp_path / "README.md").read_text()
    users = get_peft_model(load_base(), LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(IncompatibleAdapterError, match=r"that generate_adapter made, found \['default'\]"):
        save_adapter_card(users, tmp_path)


# No work before the arguments are checked, and none that nobody asked for


@pytest.mark.parametrize(
    "given",
    [{}, {"examples": EXAMPLES}, {"examples": [("a", "b", "c")], "processing_class": "any"},
     {"examples": EXAMPLES, "processing_class": "any", "refine_steps": -1},
     {"description": DESCRIPTION, "processing_class": "any", "refine_steps": 1},
     {"description": {DESCRIPTION: 0.0}, "processing_class": "any"},
     {"examples": EXAMPLES, "processing_class": "any", "on_unfamiliar": "stop"},
     {"examples": EXAMPLES, "task_vector": torch.zeros(1, 2, 32)}],
)  # fmt: skip
def test_arguments_are_checked_before_the_base_model_is_looked_at(generator, given):
    with pytest.raises((TaskError, ArgumentError)):
        generator.generate_adapter(None, **given)


def test_a_base_that_carries_adapters_is_refused_before_any_work(base, generator, model, tokenizer, monkeypatch):
    monkeypatch.setattr(TaskVectorExtractor, "vector", lambda *_: pytest.fail("It was read."))
    with pytest.raises(IncompatibleAdapterError, match="without adapters"):
        generator.generate_adapter(base, processing_class=tokenizer, examples=EXAMPLES)


@pytest.mark.parametrize(
    ("options", "passes"),
    [({}, 1), ({"fit_scale": False}, 0), ({"fit_scale": False, "on_unfamiliar": "base"}, 1),
     ({"fit_scale": False, "refine_steps": 3}, 3), ({"refine_steps": 3}, 4)],
)  # fmt: skip
def test_the_base_reads_the_examples_as_often_as_was_asked(base, generator, tokenizer, options, passes):
    """Apart from the task vector, for which its head is not needed."""
    calls = []
    base.register_forward_pre_hook(lambda *_: calls.append(1))
    model = generator.generate_adapter(base, processing_class=tokenizer, examples=EXAMPLES, **options)
    assert len(calls) == passes
    known = model.lora_generation["default"].gain_on_examples
    assert (known is None) == (not options.get("fit_scale", True) and "on_unfamiliar" not in options)


# What is saved is an ordinary adapter


def test_saved_adapter_loads_in_peft(tmp_path, base, base_path, generator, task_vector):
    model = generator.generate_adapter(base, task_vector=task_vector)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["lora_alpha"] == stored["r"] == 4
    assert stored["use_rslora"] is False
    assert stored["rank_pattern"] == stored["alpha_pattern"] == {}
    assert sorted(stored["target_modules"]) == ["q_proj", "v_proj"]
    assert stored["base_model_name_or_path"] == str(base_path)
    assert stored["task_type"] == "CAUSAL_LM"
    assert stored["inference_mode"] is True
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_path), tmp_path)
    assert type(again) is PeftModelForCausalLM
    assert torch.equal(logits(again), logits(model))


def test_merging_gives_the_logits_of_the_adapter(base, generator, task_vector):
    model = generator.generate_adapter(base, task_vector=task_vector)
    before = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_generator_may_be_in_bfloat16(tmp_path, base, generator, task_vector):
    generator.save_pretrained(tmp_path)
    half = LoraGeneratorModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = half.generate_adapter(base, task_vector=task_vector)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in adapters(model).values())


def test_base_may_be_in_bfloat16(base_path, generator, tokenizer):
    base = LlamaForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16)
    before = logits(base)
    model = generator.generate_adapter(base, processing_class=tokenizer, examples=EXAMPLES)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()
    assert not torch.equal(logits(model), before)
    assert_untouched(model.unload(), before)


@pytest.mark.parametrize("architecture", ["transformer", "conv1d"])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_works_on_other_architectures(tmp_path, tokenizer, kind, architecture):
    make = {"gpt2": make_gpt2, "t5": make_t5}[kind]
    tasks, task_type = make_tasks(2), {"gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[kind]
    lora_config = LoraConfig(
        r=4, target_modules=LORA_TARGETS[kind], task_type=task_type, fan_in_fan_out=kind == "gpt2"
    )  # fmt: skip
    args = CollectionArguments(output_dir=tmp_path / "out", max_steps=2, eval_steps=2, use_cpu=True)
    zoo = collect_zoo(tmp_path / "zoo", make(), tokenizer, tasks, lora_config, args)
    extractor = TaskVectorExtractor(TaskVectorSpec(num_demonstrations=4, num_draws=2))
    zoo.add_task_vectors(extractor.extract(make(), tokenizer, tasks))
    config = LoraGeneratorConfig.from_zoo(zoo, architecture=architecture, **SIZES)
    generator = amplified(config, zoo.as_dataset())
    base = make()
    before = logits(base)
    model = generator.generate_adapter(base, processing_class=tokenizer, examples=EXAMPLES, description=DESCRIPTION)
    assert type(model) is {"gpt2": PeftModelForCausalLM, "t5": PeftModelForSeq2SeqLM}[kind]
    adapted = logits(model)
    assert not torch.equal(adapted, before)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path / "adapter")), adapted)
    assert_untouched(model.unload(), before)


# Chosen and refined by the examples


def weights_of(model, name="default"):
    return torch.cat([tensor.flatten() for _, tensor in sorted(adapter_state_dict(model, name).items())])


def example_loss(model, tokenizer):
    with torch.no_grad():
        scores = score_completions(model, CompletionCollator(tokenizer)([Sample(*e) for e in EXAMPLES]))
    return (scores.loss.sum() / scores.num_tokens.sum()).item()


def test_refinement_lowers_the_loss_on_the_examples_and_changes_b_alone(generator, load_base, tokenizer):
    given = {"processing_class": tokenizer, "examples": EXAMPLES}
    base = load_base()
    before = copy.deepcopy(base.state_dict())
    generated = generator.generate_adapter(load_base(), **given)
    refined = generator.generate_adapter(base, **given, refine_steps=5)
    assert example_loss(refined, tokenizer) < example_loss(generated, tokenizer)
    for key, tensor in adapter_state_dict(refined).items():
        assert torch.equal(tensor, adapter_state_dict(generated)[key]) == ("lora_A" in key)
    again = generator.generate_adapter(load_base(), **given, refine_steps=5)
    assert torch.equal(weights_of(again), weights_of(refined))
    refined.unload()
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())


def test_refinement_on_a_peft_model_starts_from_the_base(generator, load_base, tokenizer):
    given = {"processing_class": tokenizer, "examples": EXAMPLES, "refine_steps": 2}
    model = generator.generate_adapter(load_base(), **given)
    model = generator.generate_adapter(model, **given, adapter_name="second")
    torch.testing.assert_close(weights_of(model, "second"), weights_of(model))


def test_refinement_of_an_encoder_decoder(tmp_path, tokenizer):
    tasks, base = make_tasks(2), make_t5()
    lora_config = LoraConfig(r=2, lora_alpha=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    args = CollectionArguments(output_dir=tmp_path / "out", max_steps=2, eval_steps=1, use_cpu=True)
    zoo = collect_zoo(tmp_path / "zoo", base, tokenizer, tasks, lora_config, args)
    zoo.add_task_vectors(TaskVectorExtractor(TaskVectorSpec(num_draws=2)).extract(base, tokenizer, tasks))
    generator = amplified(LoraGeneratorConfig.from_zoo(zoo, **SIZES), zoo.as_dataset())
    given = {"processing_class": tokenizer, "examples": EXAMPLES}
    generated = generator.generate_adapter(make_t5(), **given)
    refined = generator.generate_adapter(make_t5(), **given, refine_steps=3)
    losses = []
    for model in (generated, refined):
        with torch.no_grad():
            scores = score_completions(model, CompletionCollator(tokenizer, True)([Sample(*e) for e in EXAMPLES]))
        losses.append(scores.loss.sum().item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("factor", [0.3, 20.0, -50.0])  # too weak, too strong, harmful
def test_fitted_scale_is_the_one_with_the_least_loss(generator, load_base, tokenizer, monkeypatch, factor):
    given = {"processing_class": tokenizer, "examples": EXAMPLES}
    trained = generator.generate_adapter(load_base(), **given, refine_steps=20)
    good, _ = generator.layout.pack(adapter_state_dict(trained), generator.adapter_config())
    monkeypatch.setattr(generator, "decode_task_vector", lambda *_: factor * good)
    base, losses = load_base(), {}
    for scale in (0.0, 0.25, 0.5, 0.75, 1.0):
        weights = generator.layout.unpack(scale * factor * good, generator.zoo_normalizer.shared_weights)
        model = attach_adapter(load_base(), generator.adapter_config(), weights)
        losses[scale] = example_loss(model, tokenizer)
    model = generator.generate_adapter(base, **given)
    told = model.lora_generation["default"]
    assert told.scale == min(losses, key=losses.get)
    assert {0.3: told.scale == 1, 20.0: 0 < told.scale < 1, -50.0: told.scale == 0}[factor]
    packed, _ = generator.layout.pack(adapter_state_dict(model), generator.adapter_config())
    torch.testing.assert_close(packed, told.scale * factor * good)
    gain = (losses[0.0] - losses[told.scale]) / losses[0.0]
    assert told.gain_on_examples == pytest.approx(gain, rel=1e-3, abs=1e-5)
    full = generator.generate_adapter(load_base(), **given, fit_scale=False)
    assert full.lora_generation["default"].scale == 1
    packed, _ = generator.layout.pack(adapter_state_dict(full), generator.adapter_config())
    torch.testing.assert_close(packed, factor * good)
    described = generator.generate_adapter(load_base(), processing_class=tokenizer, description=DESCRIPTION)
    assert described.lora_generation["default"].scale == 1  # there is nothing to fit it to


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refine_steps": 1}, "pass examples too"),
        ({"refine_steps": -1}, "refine_steps >= 0, found -1"),
        ({"on_unfamiliar": "base"}, "pass examples too"),
        ({"on_unfamiliar": "stop"}, "on_unfamiliar: expected one of .* found 'stop'"),
    ],
)
def test_what_cannot_be_done_without_examples_is_said(generator, base, tokenizer, arguments, message):
    error = ArgumentError if "found" in message else TaskError
    with pytest.raises(error, match=message):
        generator.generate_adapter(base, processing_class=tokenizer, description=DESCRIPTION, **arguments)
    assert not hasattr(base, "peft_config")


def test_gain_on_examples_is_the_part_of_the_loss_that_is_gone(generator, base, tokenizer):
    batch = CompletionCollator(tokenizer)([Sample(*example) for example in EXAMPLES])
    losses = [score_completions(base, batch).loss.sum().item()]
    model = generator.generate_adapter(base, processing_class=tokenizer, examples=EXAMPLES)
    losses.append(score_completions(model, batch).loss.sum().item())
    gain = model.lora_generation["default"].gain_on_examples
    assert gain == pytest.approx((losses[0] - losses[1]) / losses[0], rel=1e-3, abs=1e-5)


# Adapters that do harm


def do_harm(generator, base, tokenizer, monkeypatch):
    """Let a generator write the opposite of what helps with the examples."""
    vector = torch.zeros(1, 2, 32)
    start = generator.layout.scaled(generator.decode_task_vector(vector), 0.0)
    shared_weights = generator.zoo_normalizer.shared_weights
    good = ExampleLoss(base, tokenizer, generator.layout, shared_weights, EXAMPLES).refine(start, 20)
    monkeypatch.setattr(generator, "decode_task_vector", lambda *_: generator.layout.scaled(good, -20.0))


@pytest.fixture
def doing_harm(generator, base, tokenizer, monkeypatch):
    do_harm(generator, base, tokenizer, monkeypatch)
    return generator


def test_the_card_forgets_deleted_adapters(generator, load_base, tokenizer, tmp_path):
    task = {"processing_class": tokenizer, "examples": EXAMPLES}
    model = generator.generate_adapter(load_base(), **task, description="The first task.")
    model = generator.generate_adapter(model, **task, description="The second task.", adapter_name="second")
    model.delete_adapter("default")
    model.set_adapter("second")
    save_adapter_card(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "The second task." in card
    assert "The first task." not in card


def test_an_adapter_that_does_harm_on_its_examples_is_treated_as_asked(doing_harm, load_base, tokenizer):
    task = {"processing_class": tokenizer, "examples": EXAMPLES}
    told = doing_harm.generate_adapter(load_base(), **task).lora_generation["default"]
    assert (told.gain_on_examples, told.scale, told.fallback) == (0.0, 0.0, None)
    for fit_scale in (True, False):
        model = doing_harm.generate_adapter(load_base(), **task, fit_scale=fit_scale, on_unfamiliar="base")
        assert torch.equal(logits(model), logits(load_base()))
        told = model.lora_generation["default"]
        assert (told.gain_on_examples, told.scale, told.fallback) == (0.0, 0.0, "base")
    base = load_base()
    with pytest.raises(UnfamiliarTaskError, match="makes the loss on its own examples larger, by"):
        doing_harm.generate_adapter(base, **task, on_unfamiliar="raise")
    assert not hasattr(base, "peft_config")
    refined = doing_harm.generate_adapter(load_base(), **task, on_unfamiliar="base", refine_steps=5)
    assert example_loss(refined, tokenizer) < example_loss(load_base(), tokenizer)  # fine-tuned, from nothing


def test_an_adapter_that_helps_is_generated_whatever_was_asked(generator, load_base, tokenizer):
    task = {"processing_class": tokenizer, "examples": EXAMPLES}
    expected = generator.generate_adapter(load_base(), **task, fit_scale=False)
    for choice in ("base", "raise"):
        model = generator.generate_adapter(load_base(), **task, fit_scale=False, on_unfamiliar=choice)
        told = model.lora_generation["default"]
        assert (told.gain_on_examples > 0, told.scale, told.fallback) == (True, 1.0, None)
        assert torch.equal(weights_of(model), weights_of(expected))


def test_a_fallback_to_the_base_is_refined_where_a_varies_too(tmp_path, load_base, tokenizer, monkeypatch):
    """With both factors 0 there would be no gradient, ever."""
    tasks, base = make_tasks(2), load_base()
    lora_config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = CollectionArguments(output_dir=tmp_path / "out", max_steps=2, eval_steps=1, freeze_a=False, use_cpu=True)
    zoo = collect_zoo(tmp_path / "zoo", base, tokenizer, tasks, lora_config, args)
    zoo.add_task_vectors(TaskVectorExtractor(TaskVectorSpec(num_draws=2)).extract(base, tokenizer, tasks))
    assert zoo.layout.gauge == "shared_init"
    generator = amplified(LoraGeneratorConfig.from_zoo(zoo, **SIZES), zoo.as_dataset())
    do_harm(generator, load_base(), tokenizer, monkeypatch)
    task = {"processing_class": tokenizer, "examples": EXAMPLES, "on_unfamiliar": "base"}
    model = generator.generate_adapter(load_base(), **task)
    assert torch.equal(logits(model), logits(load_base()))
    refined = generator.generate_adapter(load_base(), **task, refine_steps=5)
    assert example_loss(refined, tokenizer) < example_loss(load_base(), tokenizer)
