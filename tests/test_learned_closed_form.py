"""The learned closed form: examples become a LoRA by a regression whose parts were trained."""

import copy

import pytest
import torch

from benchmarks.real.episodes import Episodes
from benchmarks.real.generator import generator_of
from benchmarks.real.writer import Base, MetaClosedForm, Writer
from hf_icm_lora import IncompatibleAdapterError, LoraGeneratorModel, NotFittedError, TaskError
from hf_icm_lora.adapter import attach_adapter
from hf_icm_lora.base_model import frozen_base
from hf_icm_lora.behaviour import batched_lora
from hf_icm_lora.completion import DEFAULT_TEMPLATE, CompletionCollator
from hf_icm_lora.configuration_lora_generator import check_closed_form
from hf_icm_lora.generation import write_adapter
from hf_icm_lora.learned_closed_form import closed_form_config
from hf_icm_lora.model_card import generator_card
from hf_icm_lora.reading import read_description, read_examples
from hf_icm_lora.tasks import to_sample
from tests.conftest import make_gpt2, make_llama
from tests.test_real_benchmark import disturb, prepared, real_line, with_chat  # noqa: F401  # a fixture

EXAMPLES = [("ab", "bc"), ("cd", "de"), ("fg", "gh"), ("xy", "yz"), ("mn", "no")]
SAMPLES = [to_sample(example) for example in EXAMPLES]
SIZES = {"rank": 8, "reader_rank": 2, "state_rank": 2, "label_rank": 2}
MEMORY = {"num_memory": 3}
NETWORK = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "basis_size": 2, "latent_size": 2}


def make_generator(base, **fields) -> LoraGeneratorModel:
    """A generator with a closed form whose parameters all have values of their own, as after training."""
    generator = LoraGeneratorModel(closed_form_config(base, **SIZES | NETWORK | fields)).eval()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in generator.closed_form.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=drawn)
    return generator


@pytest.fixture(params=[make_llama, make_gpt2])
def base(request):
    return request.param()


def logits_alone(model, tokenizer, sample, examples=()) -> torch.Tensor:
    batch = CompletionCollator(tokenizer, examples=examples, max_length=2048)([sample])
    labels = batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits[0, :-1][labels[0, 1:] != -100]


def test_untrained_and_without_penalty_it_says_what_the_base_says_after_the_examples_before(base, tokenizer):
    """Before training the base itself reads. Every example then comes out as after those that were read before it."""
    generator = LoraGeneratorModel(closed_form_config(base, **SIZES | {"rank": 64} | NETWORK)).eval()
    generator.closed_form.log_penalty.data.fill_(-23.0)
    prompted = [logits_alone(base, tokenizer, sample, SAMPLES[:index]) for index, sample in enumerate(SAMPLES)]
    bare = [logits_alone(base, tokenizer, sample) for sample in SAMPLES]
    reading = read_examples(tokenizer, SAMPLES, DEFAULT_TEMPLATE)
    with frozen_base(base) as frozen:
        weights = generator.closed_form(frozen, reading)
    model = attach_adapter(
        base, generator.adapter_config(), generator.layout.unpack(weights, generator.shared_weights)
    )
    for sample, expected in zip(SAMPLES, prompted, strict=True):
        torch.testing.assert_close(logits_alone(model, tokenizer, sample), expected, atol=0.05, rtol=0.05)
    assert (prompted[-1] - bare[-1]).abs().max() > 0.1


@pytest.mark.parametrize(("num_memory", "num_demos"), [(0, 6), (3, 6), (3, 0)])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_it_writes_what_the_training_script_writes(
    prepared,  # noqa: F811
    tokenizer,
    template,
    num_memory,
    num_demos,
):
    """The script has a Llama of its own, which a GPU runs fast. Both must turn the same tokens into the same B."""
    torch.manual_seed(0)
    base = Base(prepared, "cpu", torch.float32)
    writer = Writer(base, num_memory=num_memory, **SIZES)
    torch.nn.init.normal_(writer.keys, std=0.2)
    disturb(writer)
    writer.save(prepared / "writer.safetensors")
    writer.load(prepared / "writer.safetensors")  # in 8 bits
    line, describe = real_line(4, labels=True), num_memory > 0
    batch = Episodes(prepared, {"validation": 1.0}).held_out([0], num_demos, 1, template, describe)
    with torch.no_grad():
        model = MetaClosedForm(base, writer)
        _, expected = model.write(batch, model.read(batch))

    llama = make_llama()
    generator = generator_of(prepared / "writer.safetensors", llama, **NETWORK)
    text = "chat" if template == "chat" else DEFAULT_TEMPLATE
    if num_demos:
        demo = [to_sample(raw) for raw in line["demo"][:num_demos]]
        reading = read_examples(with_chat(tokenizer), demo, text, line["description"] if describe else None)
    else:
        reading = read_description(with_chat(tokenizer), line["description"], text)
    with frozen_base(llama) as frozen:
        written = generator.closed_form(frozen, reading)
    expected = torch.stack([b[0] for b in expected])
    torch.testing.assert_close(written.view_as(expected), expected, atol=2e-3, rtol=2e-3)


def test_the_adapter_in_peft_computes_what_it_was_written_for(base, tokenizer):
    generator = make_generator(base)
    weights = write_adapter(generator, base, tokenizer, SAMPLES)
    with batched_lora(base, generator.layout, weights[None], generator.shared_weights.detach()):
        expected = logits_alone(base, tokenizer, SAMPLES[0])
    model = generator.generate_adapter(base, processing_class=tokenizer, examples=EXAMPLES, fit_scale=False)
    torch.testing.assert_close(logits_alone(model, tokenizer, SAMPLES[0]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [{}, MEMORY])
def test_everything_in_it_can_be_trained_through_the_base(base, tokenizer, sizes):
    generator = make_generator(base, **sizes)
    with frozen_base(base) as frozen, torch.enable_grad():
        weights = generator.closed_form(frozen, read_examples(tokenizer, SAMPLES, DEFAULT_TEMPLATE))
    weights.square().sum().backward()
    for name, parameter in generator.closed_form.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_description_alone_trains_all_that_it_goes_through(base, tokenizer):
    generator = make_generator(base, **MEMORY)
    with frozen_base(base) as frozen, torch.enable_grad():
        weights = generator.closed_form(frozen, read_description(tokenizer, "Next letters.", DEFAULT_TEMPLATE))
    weights.square().sum().backward()
    moved = {name for name, p in generator.closed_form.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"memory", "memory_keys.weight", "memory_in.weight", "memory_out.weight", "log_memory"} <= moved
    assert {f"reader.{index}.weight" for index in range(len(generator.closed_form.reader))} <= moved


@pytest.mark.parametrize("sizes", [{}, MEMORY])
def test_eight_bits_and_a_saved_copy_write_the_same(base, tokenizer, tmp_path, sizes):
    generator = make_generator(base, **sizes)
    whole = write_adapter(generator, base, tokenizer, SAMPLES)
    small = generator.without_encoder().to_int8()
    rounded = write_adapter(small, base, tokenizer, SAMPLES)
    assert (rounded - whole).norm() < 0.05 * whole.norm()
    small.save_pretrained(tmp_path / "generator")
    again = LoraGeneratorModel.from_pretrained(tmp_path / "generator")
    assert torch.equal(write_adapter(again, base, tokenizer, SAMPLES), rounded)


def test_with_examples_the_closed_form_writes_and_without_the_network(base, tokenizer):
    generator = make_generator(base, num_task_vectors=2, task_vector_size=base.config.hidden_size)
    from_examples = write_adapter(generator, base, tokenizer, SAMPLES)
    generator.zoo_normalizer.is_fitted.fill_(1)
    generator.zoo_normalizer.vector_directions.normal_(generator=torch.Generator().manual_seed(0))
    assert not write_adapter(generator, base, tokenizer, [], "Next letters.").any()  # before it was trained
    with torch.no_grad():
        for basis in generator.network.tokens.bases:
            basis.weight.fill_(0.1)
    assert write_adapter(generator, base, tokenizer, [], "Next letters.").any()
    assert torch.equal(write_adapter(generator, base, tokenizer, SAMPLES), from_examples)


def test_with_memory_tokens_the_closed_form_writes_from_a_description_too(base, tokenizer):
    """And says in PEFT what a LoRA of these weights says."""
    generator = make_generator(base, **MEMORY)
    assert "It writes in closed form" in str(generator_card(generator))
    weights = write_adapter(generator, base, tokenizer, [], "Next letters.")
    other = write_adapter(generator, base, tokenizer, [], "Letters.")
    assert (weights - other).norm() > 1e-3 * weights.norm()
    mixed = write_adapter(generator, base, tokenizer, [], {"Next letters.": 3.0, "Letters.": 1.0})
    torch.testing.assert_close(mixed, 0.75 * weights + 0.25 * other)
    with batched_lora(base, generator.layout, weights[None], generator.shared_weights.detach()):
        expected = logits_alone(base, tokenizer, SAMPLES[0])
    model = generator.generate_adapter(base, processing_class=tokenizer, description="Next letters.")
    torch.testing.assert_close(logits_alone(model, tokenizer, SAMPLES[0]), expected, atol=1e-4, rtol=1e-4)


def test_memory_tokens_change_little_before_training(base, tokenizer):
    plain, with_memory = (
        LoraGeneratorModel(closed_form_config(base, **SIZES | NETWORK | sizes)).eval() for sizes in ({}, MEMORY)
    )
    with_memory.closed_form.load_state_dict(plain.closed_form.state_dict(), strict=False)
    before, after = (write_adapter(generator, base, tokenizer, SAMPLES) for generator in (plain, with_memory))
    assert 0 < (after - before).norm() < 0.25 * before.norm()
    assert not write_adapter(with_memory, base, tokenizer, [], "Next letters.").any()


def test_a_description_that_is_too_long_is_refused(tokenizer):
    with pytest.raises(TaskError, match="The description has 201 tokens, and 30 at most"):
        read_description(tokenizer, "word " * 40, DEFAULT_TEMPLATE, max_length=30)


def test_a_description_is_read_before_the_examples_and_alone_needs_a_trained_network(base, tokenizer):
    generator = make_generator(base)
    without, described = (write_adapter(generator, base, tokenizer, SAMPLES, text) for text in (None, "Next letters."))
    assert (without - described).norm() > 0.01 * without.norm()
    mixed = write_adapter(generator, base, tokenizer, SAMPLES, {"Next letters.": 3.0, "Letters.": 1.0})
    other = write_adapter(generator, base, tokenizer, SAMPLES, "Letters.")
    torch.testing.assert_close(mixed, 0.75 * described + 0.25 * other)
    with pytest.raises(NotFittedError):
        generator.generate_adapter(base, processing_class=tokenizer, description="Next letters.")


def test_examples_are_read_in_several_orders_and_in_parts(tokenizer):
    reading = read_examples(tokenizer, SAMPLES, DEFAULT_TEMPLATE, "Next letters.", num_orders=3)
    assert [conversation.order for conversation in reading.conversations] == [
        [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 3, 4, 0, 1],
    ]  # fmt: skip
    for conversation in reading.conversations:
        text = "Next letters.\n" + "".join(f"- {EXAMPLES[i][0]}: {EXAMPLES[i][1]}\n" for i in conversation.order)
        assert tokenizer.decode(conversation.ids, skip_special_tokens=True) == text
        for index, start in zip(conversation.order, conversation.starts, strict=True):
            answer = reading.answers[index]
            assert conversation.ids[start + 1 : start + 1 + len(answer)] == answer
    for row, start, answer in zip(reading.rows, reading.starts, reading.answers, strict=True):
        assert row[start + 1 :] == answer
    longest = max(map(len, reading.rows)) * 2
    parts = read_examples(tokenizer, SAMPLES, DEFAULT_TEMPLATE, max_length=longest).conversations
    assert [index for part in parts for index in part.order] == [0, 1, 2, 3, 4]
    assert len(parts) > 1
    assert all(len(part.ids) <= longest for part in parts)


def test_plain_texts_are_read_from_the_token_that_something_predicts(tokenizer):
    """This tokenizer has no token that begins a text: the first one of each is read, the others are its answer."""
    samples = [to_sample(text) for text in ("abcd", "efg")]
    assert tokenizer.bos_token_id is None
    reading = read_examples(tokenizer, samples, DEFAULT_TEMPLATE)
    assert [tokenizer.decode(answer) for answer in reading.answers] == ["bcd", "fg"]
    assert reading.starts == [0, 0]
    (conversation,) = reading.conversations
    assert tokenizer.decode(conversation.ids) == "abcdefg"
    assert conversation.starts == [0, 4]


def test_a_chat_template_that_rewrites_answers_is_refused(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    last = "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ message.content }}", last + "{{ message.content }}")
    with pytest.raises(TaskError, match="rewrites an answer once it is followed by another turn"):
        read_examples(tokenizer, SAMPLES, "chat")


def test_more_examples_than_are_read_at_once_are_all_used(base, tokenizer):
    generator = make_generator(base)
    many = [to_sample((f"{i}", f"{i + 1}")) for i in range(40)]
    weights = write_adapter(generator, base, tokenizer, many)
    assert weights.isfinite().all()
    assert (weights - write_adapter(generator, base, tokenizer, many[:32])).norm() > 1e-3 * weights.norm()


def test_what_cannot_be_read_is_refused(base, tokenizer):
    with pytest.raises(TaskError, match="at least one example"):
        read_examples(tokenizer, [], DEFAULT_TEMPLATE)
    with pytest.raises(TaskError, match=r"examples\[1\] has 206 tokens with what is read before it, and 30 at most"):
        read_examples(tokenizer, [SAMPLES[0], to_sample(("word " * 40, "x"))], DEFAULT_TEMPLATE, max_length=30)
    generator = make_generator(make_gpt2() if "Llama" in type(base).__name__ else make_llama())
    with pytest.raises(IncompatibleAdapterError, match="made for"):
        generator.generate_adapter(base, processing_class=tokenizer, description="Next letters.")
    with pytest.raises(IncompatibleAdapterError, match="layers end with"):
        write_adapter(generator, base, tokenizer, SAMPLES)


def test_sizes_are_checked_and_a_configuration_from_before_memory_tokens_is_one():
    sizes = closed_form_config(make_llama(), **SIZES, **NETWORK).closed_form
    assert sizes.pop("num_memory") == 0
    check_closed_form(sizes)
    with pytest.raises(IncompatibleAdapterError, match="num_memory: expected 0 to 65536, found -1"):
        check_closed_form(sizes | {"num_memory": -1})
    with pytest.raises(IncompatibleAdapterError, match=r"found \['memory', 'reader', 'state_rank'\]"):
        check_closed_form({"reader": sizes["reader"], "state_rank": 2, "memory": 2})
