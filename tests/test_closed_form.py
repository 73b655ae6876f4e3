"""The closed form: examples become a LoRA without training, on every way to build a language model."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_icm_lora import ArgumentError, IncompatibleAdapterError, TaskError, in_context_adapter
from hf_icm_lora.closed_form import answer_positions, closed_form, low_rank_ridge, residual_blocks
from hf_icm_lora.completion import DEFAULT_TEMPLATE, CompletionCollator
from hf_icm_lora.tasks import to_sample
from tests.conftest import make_gpt2, make_llama, make_t5

SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SWAPPED = [("bc", "ab"), ("de", "cd"), ("gh", "fg"), ("yz", "xy"), ("no", "mn")]
EXAMPLES = [("ab", "bc"), ("cd", "de"), ("fg", "gh"), ("xy", "yz"), ("mn", "no")]


def make_qwen():
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()


def make_opt():
    torch.manual_seed(0)
    sizes = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2, "max_position_embeddings": 512}
    return OPTForCausalLM(OPTConfig(**sizes)).eval()


MODELS = {"llama": make_llama, "gpt2": make_gpt2, "qwen": make_qwen, "opt": make_opt, "t5": make_t5}


@pytest.fixture(params=MODELS)
def base(request):
    return MODELS[request.param]()


@torch.no_grad()
def logits_at_answers(model, tokenizer, sample, examples=(), template=DEFAULT_TEMPLATE) -> torch.Tensor:
    is_encoder_decoder, shown = model.config.is_encoder_decoder, [to_sample(example) for example in examples]
    collate = CompletionCollator(tokenizer, is_encoder_decoder, template, shown, max_length=2048)
    batch = collate([to_sample(sample)])
    mask, labels = answer_positions(model, batch), batch.pop("labels")
    if is_encoder_decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return model(**batch).logits[mask]


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, "chat"])
def test_without_penalty_an_encoder_decoder_says_what_it_says_after_the_other_examples(chat_tokenizer, template):
    reference, tokenizer = make_t5(), chat_tokenizer
    model = in_context_adapter(make_t5(), tokenizer, EXAMPLES, template=template, rank=32, penalty=1e-9)
    for index, sample in enumerate(EXAMPLES):
        others = EXAMPLES[:index] + EXAMPLES[index + 1 :]
        prompted = logits_at_answers(reference, tokenizer, sample, others, template)
        alone, without = (logits_at_answers(each, tokenizer, sample, (), template) for each in (model, reference))
        torch.testing.assert_close(alone, prompted, atol=0.02, rtol=0.02)
        assert (without - prompted).abs().max() > 0.1


@torch.no_grad()
def last_states(model, tokenizer, template, sample, examples=()) -> torch.Tensor:
    """What the last layer makes of an answer's tokens, before any norm."""
    found = []
    handle = residual_blocks(model)[-1].module.register_forward_hook(
        lambda _module, _inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    shown = [to_sample(one) for one in examples]
    batch = CompletionCollator(tokenizer, template=template, examples=shown)([to_sample(sample)])
    mask = answer_positions(model, batch)
    batch.pop("labels")
    model(**batch)
    handle.remove()
    return found[0][mask]


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, "chat"])
@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_qwen, make_opt])
def test_without_penalty_states_are_the_mean_of_those_after_what_is_before_and_behind(make, chat_tokenizer, template):
    reference, given = make(), (chat_tokenizer, template)
    model = in_context_adapter(make(), chat_tokenizer, EXAMPLES, template=template, rank=64, penalty=1e-9)
    model = model.get_base_model()
    for index, sample in enumerate(EXAMPLES):
        forwards = last_states(reference, *given, sample, EXAMPLES[:index])
        backwards = last_states(reference, *given, sample, EXAMPLES[:index:-1])
        before, behind = index, len(EXAMPLES) - 1 - index
        weights = [(count + 0.2) / (count + 2) for count in (before, behind)]
        expected = (weights[0] * forwards + weights[1] * backwards) / sum(weights)
        found = last_states(model, *given, sample)
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
        assert (last_states(reference, *given, sample) - expected).abs().max() > 0.1


def test_the_result_is_an_ordinary_adapter_and_the_base_is_as_it_was(base, tokenizer, tmp_path):
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    model = in_context_adapter(base, tokenizer, EXAMPLES, rank=4)
    assert type(model) is not PeftModel
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"].r == 4
    sample = EXAMPLES[0]
    expected = logits_at_answers(model, tokenizer, sample)
    model.save_pretrained(tmp_path / "adapter")
    plain = model.unload()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()) == hooks
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, before[name]), name
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits_at_answers(again, tokenizer, sample), expected)


def test_a_penalty_without_end_leaves_the_base_alone(tokenizer):
    reference = make_llama()
    model = in_context_adapter(make_llama(), tokenizer, EXAMPLES, penalty=1e9)
    expected = logits_at_answers(reference, tokenizer, EXAMPLES[0])
    torch.testing.assert_close(logits_at_answers(model, tokenizer, EXAMPLES[0]), expected, atol=1e-4, rtol=1e-4)


def test_a_description_is_read_before_the_examples(tokenizer):
    plain, described = (
        in_context_adapter(make_llama(), tokenizer, EXAMPLES, description=description)
        for description in (None, "Shift each letter.")
    )
    a, b = (logits_at_answers(model, tokenizer, ("ef", "fg")) for model in (plain, described))
    assert (a - b).abs().max() > 1e-3


def test_active_adapters_are_not_read_and_stay(tokenizer):
    model = in_context_adapter(make_llama(), tokenizer, EXAMPLES, adapter_name="first")
    fresh = in_context_adapter(make_llama(), tokenizer, EXAMPLES[::-1], adapter_name="second")
    model = in_context_adapter(model, tokenizer, EXAMPLES[::-1], adapter_name="second")
    assert set(model.peft_config) == {"first", "second"}
    expected = logits_at_answers(fresh, tokenizer, ("ef", "fg"))
    torch.testing.assert_close(logits_at_answers(model, tokenizer, ("ef", "fg")), expected)


def test_the_last_linear_map_of_each_layer_is_written():
    written = {name: [block.writer_name for block in residual_blocks(make())] for name, make in MODELS.items()}
    assert written == {
        "llama": [f"model.layers.{i}.mlp.down_proj" for i in range(2)],
        "gpt2": [f"transformer.h.{i}.mlp.c_proj" for i in range(2)],
        "qwen": [f"model.layers.{i}.mlp.down_proj" for i in range(2)],
        "opt": [f"model.decoder.layers.{i}.fc2" for i in range(2)],
        "t5": [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(2)],
    }


def test_a_base_that_changes_the_output_on_the_way_is_refused(tokenizer):
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()
    with pytest.raises(IncompatibleAdapterError, match=r"Gemma2ForCausalLM: expected each layer to add the output of"):
        in_context_adapter(gemma, tokenizer, EXAMPLES)


@pytest.mark.parametrize("examples", [[], EXAMPLES[:1]])
def test_one_example_has_no_others(tokenizer, examples):
    with pytest.raises(TaskError, match=rf"two examples or more.*found {len(examples)}"):
        in_context_adapter(make_llama(), tokenizer, examples)


def test_low_rank_ridge_is_the_ridge_regression_and_its_best_cut():
    generator = torch.Generator().manual_seed(0)
    inputs, changes = torch.randn(7, 20, generator=generator), torch.randn(7, 12, generator=generator)
    strength = 0.3 * inputs.square().sum(1).mean()
    exact = torch.linalg.solve(inputs.T @ inputs + strength * torch.eye(20), inputs.T @ changes).T
    lora_a, lora_b = low_rank_ridge(inputs, changes, rank=9, penalty=0.3)
    torch.testing.assert_close(lora_b @ lora_a, exact, atol=1e-4, rtol=1e-4)
    assert not lora_a[7:].any()
    assert not lora_b[:, 7:].any()
    lora_a, lora_b = low_rank_ridge(inputs, changes, rank=3, penalty=0.3)
    values = torch.linalg.svdvals(exact)
    torch.testing.assert_close((exact - lora_b @ lora_a).norm(), values[3:].norm(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lora_a @ lora_a.T, torch.eye(3), atol=1e-5, rtol=1e-5)


def test_low_rank_ridge_of_nothing_is_nothing():
    lora_a, lora_b = low_rank_ridge(torch.zeros(3, 8), torch.ones(3, 4), rank=2, penalty=0.3)
    assert torch.isfinite(lora_a).all()
    assert not (lora_b @ lora_a).any()


def test_every_sort_of_layer_is_checked(tokenizer):
    """Jamba's layers end with a linear map that is added, or with experts, before which there is an attention's."""
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=2, num_experts_per_tok=1, initializer_range=0.2,
    )  # fmt: skip
    with pytest.raises(IncompatibleAdapterError, match="expected each layer to add the output of"):
        in_context_adapter(JambaForCausalLM(config).eval(), tokenizer, EXAMPLES)


@pytest.mark.parametrize("options", [{"penalty": 0.0}, {"penalty": -1.0}, {"penalty": float("nan")}, {"rank": 0}])
def test_rank_and_penalty_are_positive(tokenizer, options):
    with pytest.raises(ArgumentError, match="positive penalty"):
        in_context_adapter(make_llama(), tokenizer, EXAMPLES, **options)


@pytest.mark.parametrize("examples", [{"walk": "walked", "go": "went"}, "ab", 7])
def test_one_text_or_mapping_is_no_list_of_examples(tokenizer, examples):
    with pytest.raises(TaskError, match="to be a sequence of samples"):
        in_context_adapter(make_llama(), tokenizer, examples)


def test_examples_that_an_encoder_cannot_read_together_are_refused(tokenizer):
    with pytest.raises(TaskError, match=r"The examples have \d+ tokens together, and the encoder reads 2048 at most"):
        in_context_adapter(make_t5(), tokenizer, [("word " * 500, "x"), ("a", "b")])


def test_equal_examples_are_no_singular_regression(tokenizer):
    model = in_context_adapter(make_llama(), tokenizer, [EXAMPLES[0]] * 4, penalty=1e-9)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_threads_read_a_base_one_after_another(tokenizer):
    base = make_llama()
    expected = [closed_form(base, tokenizer, [to_sample(one) for one in given])[1] for given in (EXAMPLES, SWAPPED)]
    found = [[], []]

    def work(place: int) -> None:
        samples = [to_sample(one) for one in (EXAMPLES, SWAPPED)[place]]
        for _ in range(4):
            found[place].append(closed_form(base, tokenizer, samples)[1])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for own, right in zip(found, expected, strict=True):
        assert len(own) == 4
        assert all(torch.equal(each[key], right[key]) for each in own for key in right)
