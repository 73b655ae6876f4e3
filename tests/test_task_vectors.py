"""Task vectors: what the plain base model's hidden states say, whatever batch, padding or adapter is around."""

import copy
import json
import os
import pickle
import re

import pytest
import torch
from conftest import make_gpt2, make_llama, make_t5, make_tasks
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hf_icm_lora import Sample, Task, TaskError, TaskVectorError, TaskVectorExtractor, TaskVectors, TaskVectorSpec
from hf_icm_lora.adapter import adapter_state_dict, attach_adapter
from hf_icm_lora.base_model import base_model_fingerprint
from hf_icm_lora.completion import DEFAULT_TEMPLATE, render

SPEC = TaskVectorSpec(num_demonstrations=5, min_demonstrations=2, num_draws=6, pooling=("prompts",))
EXAMPLES = [("a", "b"), ("c", "dd"), ("e", "fff"), ("g", "h")]


def assert_same(one: TaskVectors, other: TaskVectors, **tolerance):
    assert one.spec == other.spec
    assert one.base_model_fingerprint == other.base_model_fingerprint
    assert list(one.banks) == list(other.banks)
    for name, bank in one.banks.items():
        assert bank.keys() == other.banks[name].keys()
        for mode, vectors in bank.items():
            torch.testing.assert_close(other.banks[name][mode], vectors, **tolerance)


def hidden_states(model, tokenizer, text):
    """The hidden states of one text by hand, (layers + 1, length, hidden_size)."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    body = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad():
        return torch.cat(body(input_ids=ids, output_hidden_states=True).hidden_states)


@pytest.fixture(scope="module")
def extracted(tokenizer):
    return TaskVectorExtractor(SPEC).extract(make_llama(), tokenizer, make_tasks(3))


def test_banks_have_one_vector_per_draw(extracted):
    assert list(extracted.banks) == ["shift/1", "shift/2", "shift/3"]
    for bank in extracted.banks.values():
        shapes = {mode: (tuple(vectors.shape), vectors.dtype) for mode, vectors in bank.items()}
        assert shapes == {
            "demonstrations": ((6, 1, 32), torch.float32),
            "both": ((6, 1, 32), torch.float32),
            "description": ((1, 1, 32), torch.float32),
        }
    assert extracted.base_model_fingerprint == base_model_fingerprint(make_llama())
    assert extracted.spec == SPEC


def test_vectors_of_tasks_modes_and_draws_differ(extracted):
    rows = torch.cat([vectors.flatten(1) for bank in extracted.banks.values() for vectors in bank.values()])
    assert len(rows.unique(dim=0)) == len(rows)


def test_extraction_is_deterministic_and_depends_on_the_seed(extracted, tokenizer):
    again = TaskVectorExtractor(SPEC).extract(make_llama(), tokenizer, make_tasks(3))
    assert_same(extracted, again, atol=0, rtol=0)
    other = TaskVectorExtractor(TaskVectorSpec(**SPEC.to_dict() | {"seed": 1})).extract(
        make_llama(), tokenizer, make_tasks(1)
    )
    drawn, others = (vectors.banks["shift/1"]["demonstrations"] for vectors in (extracted, other))
    assert not torch.allclose(drawn, others)


def test_global_random_state_is_neither_used_nor_changed(extracted, tokenizer):
    base, tasks = make_llama(), make_tasks(3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert_same(extracted, TaskVectorExtractor(SPEC).extract(base, tokenizer, tasks), atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_tasks_in_the_call_do_not_matter(extracted, tokenizer):
    alone = TaskVectorExtractor(SPEC).extract(make_llama(), tokenizer, make_tasks(3)[1:2])
    for mode, vectors in alone.banks["shift/2"].items():
        torch.testing.assert_close(vectors, extracted.banks["shift/2"][mode], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "prompts", "completions", "mean", ("prompts", "completions")])
def test_batch_size_and_padding_side_do_not_matter(any_model, tokenizer, pooling):
    model, _ = any_model
    spec = TaskVectorSpec(**SPEC.to_dict() | {"pooling": pooling, "layers": (0, -1)})
    expected = TaskVectorExtractor(spec, batch_size=8).extract(model, tokenizer, make_tasks(2))
    left = copy.deepcopy(tokenizer)
    left.padding_side, left.pad_token = "left", "a"
    for batch_size, processing_class in ((1, tokenizer), (3, left), (8, left)):
        found = TaskVectorExtractor(spec, batch_size).extract(model, processing_class, make_tasks(2))
        assert_same(expected, found, atol=1e-4, rtol=1e-4)


def test_vector_is_the_last_hidden_state_of_its_prompt(any_model, tokenizer):
    model, _ = any_model
    extractor = TaskVectorExtractor(TaskVectorSpec(**SPEC.to_dict() | {"layers": (0, 1, -1), "pooling": "last"}))
    task = make_tasks(1)[0]
    bank = extractor.extract(model, tokenizer, [task]).banks[task.name]
    for mode, vectors in bank.items():
        prompts = extractor.prompts(tokenizer, task.demo, task.description, mode, task.name)
        assert len(prompts) == len(vectors)
        for (text, *_), vector in zip(prompts, vectors, strict=True):
            expected = hidden_states(model, tokenizer, text)[[0, 1, -1], -1]
            torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-4)


def test_prompts_pooling_averages_what_stands_before_each_answer(any_model, tokenizer):
    model, _ = any_model
    extractor = TaskVectorExtractor(SPEC)
    task = make_tasks(1)[0]
    bank = extractor.extract(model, tokenizer, [task]).banks[task.name]["demonstrations"]
    prompts = extractor.prompts(tokenizer, task.demo, None, "demonstrations", task.name)
    assert len(prompts[0].ends) == 4  # after 2, 3, 4 and 5 demonstrations
    assert len(prompts[-1].ends) == 1  # after the fewest
    for (text, ends, _, _), vector in zip(prompts, bank, strict=True):
        states = hidden_states(model, tokenizer, text).reshape(-1, *hidden_states(model, tokenizer, text).shape[1:])[
            -1
        ]
        colons = [i for i, character in enumerate(text) if character == ":"][2:]  # one token per character
        assert [end - 1 for end in ends] == colons
        last = len(states) - 1  # an encoder ends with a special token
        torch.testing.assert_close(vector[0], states[[*colons[:-1], last]].mean(0), atol=1e-4, rtol=1e-4)


def test_plain_text_is_read_to_the_end_of_each_text(llama, tokenizer):
    spec = TaskVectorSpec(num_draws=1, min_demonstrations=1)
    (prompt,) = TaskVectorExtractor(spec).prompts(
        tokenizer, [Sample("", t) for t in ("one", "two", "three")], None, "demonstrations"
    )
    assert [prompt.text[:end] for end in prompt.ends][-1] == prompt.text
    assert len(prompt.ends) == 2


def test_cut_prompts_average_what_is_left(llama, tokenizer):
    spec = TaskVectorSpec(num_draws=1, min_demonstrations=1, max_length=12, pooling="prompts")
    extractor = TaskVectorExtractor(spec)
    ((text, *_),) = extractor.prompts(tokenizer, [Sample(*e) for e in EXAMPLES], None, "demonstrations")
    kept = text[-12:]
    colons = [i for i, character in enumerate(kept) if character == ":"]
    expected = hidden_states(llama, tokenizer, kept)[-1][colons].mean(0)
    torch.testing.assert_close(extractor.vector(llama, tokenizer, EXAMPLES)[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_completions_pooling_averages_the_answers_that_are_shown(any_model, tokenizer):
    model, _ = any_model
    spec = TaskVectorSpec(num_draws=2, min_demonstrations=2, layers=(0, -1), pooling=("completions", "last"))
    extractor = TaskVectorExtractor(spec)
    of_each_mode = extractor.vector(model, tokenizer, EXAMPLES, "Do it.").unflatten(0, (3, 2))
    bank = of_each_mode[1]  # (2, 4, 32): poolings, then layers
    prompts = extractor.prompts(tokenizer, [Sample(*e) for e in EXAMPLES], "Do it.", "both")
    for (text, _, answers, _), vector in zip(prompts, bank, strict=True):
        assert {text[start:end] for start, end in answers} <= {completion for _, completion in EXAMPLES}
        tokens = [i for start, end in answers for i in range(start, end)]  # one token per character
        states = hidden_states(model, tokenizer, text)
        expected = [states[layer, tokens].mean(0) for layer in (0, -1)] + [states[layer, -1] for layer in (0, -1)]
        torch.testing.assert_close(vector, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_starts_and_ends_pooling_take_one_token_of_each_answer(llama, tokenizer):
    spec = TaskVectorSpec(num_draws=1, min_demonstrations=2, pooling=("starts", "ends"))
    extractor = TaskVectorExtractor(spec)
    ((text, _, answers, _),) = extractor.prompts(tokenizer, [Sample(*e) for e in EXAMPLES], None, "demonstrations")
    states = hidden_states(llama, tokenizer, text)[-1]  # one token per character
    starts, ends = ([answer[0] for answer in answers], [answer[1] - 1 for answer in answers])
    assert starts != ends
    expected = torch.stack([states[starts].mean(0), states[ends].mean(0)])
    vector = extractor.vector(llama, tokenizer, EXAMPLES)[0]
    torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-4)


def test_completions_of_a_description_are_its_own_tokens(llama, tokenizer):
    spec = TaskVectorSpec(pooling="completions")
    vector = TaskVectorExtractor(spec).vector(llama, tokenizer, description="Do it.")
    expected = hidden_states(llama, tokenizer, "Do it.\n- ...:")[-1][:6].mean(0)
    torch.testing.assert_close(vector[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_mean_pooling_averages_the_prompt(llama, tokenizer):
    extractor = TaskVectorExtractor(TaskVectorSpec(num_draws=1, pooling="mean"))
    ((text, *_),) = extractor.prompts(tokenizer, [Sample(*e) for e in EXAMPLES], None, "demonstrations")
    expected = hidden_states(llama, tokenizer, text)[-1].mean(0)
    torch.testing.assert_close(extractor.vector(llama, tokenizer, EXAMPLES)[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_long_prompts_lose_their_beginning(llama, tokenizer):
    extractor = TaskVectorExtractor(TaskVectorSpec(num_draws=1, max_length=7, pooling="last"))
    ((text, *_),) = extractor.prompts(tokenizer, [Sample(*e) for e in EXAMPLES], None, "demonstrations")
    expected = hidden_states(llama, tokenizer, text[-7:])[-1, -1]
    torch.testing.assert_close(extractor.vector(llama, tokenizer, EXAMPLES)[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_only_the_modes_that_were_asked_for(llama, tokenizer):
    modes = ("demonstrations", "description")
    one, other = make_tasks(2)
    other = Task(other.name, other.train, demo=other.demo, test=other.test)  # no description
    banks = TaskVectorExtractor(SPEC).extract(llama, tokenizer, [one, other], modes).banks
    assert {name: tuple(bank) for name, bank in banks.items()} == {one.name: modes, other.name: modes[:1]}


# Prompts


def test_prompts_hold_demonstrations_and_one_open_query(tokenizer):
    demo = make_tasks(1)[0].demo
    prompts = TaskVectorExtractor(SPEC).prompts(tokenizer, demo, "Do it.", "both", "name")
    counts = []
    for text, *_ in prompts:
        heading, *blocks = text.split("- ")
        assert heading == "Do it.\n"
        pairs = [tuple(block.strip().split(":")) for block in blocks]
        answers = {sample.prompt: f" {sample.completion}" for sample in demo}
        assert [answer for _, answer in pairs] == [answers[prompt] for prompt, _ in pairs[:-1]] + [""]
        assert len({prompt for prompt, _ in pairs}) == len(pairs)  # the query is none of the demonstrations
        assert text.endswith(":")
        counts.append(len(pairs) - 1)
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (5, 2)


def test_draws_depend_on_the_name_of_the_task(tokenizer):
    demo = make_tasks(1)[0].demo
    one, same, other = (
        TaskVectorExtractor(SPEC).prompts(tokenizer, demo, None, "demonstrations", name) for name in "aab"
    )
    assert one == same
    assert one != other


def test_description_alone_is_one_prompt_without_samples(tokenizer):
    demo = make_tasks(1)[0].demo
    ((text, ends, answers, _),) = TaskVectorExtractor(SPEC).prompts(tokenizer, demo, "Do it.", "description", "name")
    assert ends == (len(text),)
    assert [text[start:end] for start, end in answers] == ["Do it."]
    assert text.startswith("Do it.\n")
    assert not any(sample.prompt in text.removeprefix("Do it.") for sample in demo)


CHAT = TaskVectorSpec(
    template="chat",
    num_demonstrations=4,
    min_demonstrations=2,
    num_draws=2,
    pooling=("last", "prompts", "completions"),
)


def chat_of(pairs, description=None):
    """The messages of a chat, written by hand: the last pair is asked and not answered."""
    messages = [{"role": "system", "content": description}] if description else []
    for prompt, completion in pairs:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return messages[:-1]


@pytest.mark.parametrize("description", [None, "Do it."])
def test_demonstrations_of_a_chat_are_earlier_turns(llama, chat_tokenizer, description):
    extractor, of = TaskVectorExtractor(CHAT), dict(EXAMPLES)
    samples = [Sample(*example) for example in EXAMPLES]
    mode = "both" if description else "demonstrations"
    prompts = extractor.prompts(chat_tokenizer, samples, description, mode)
    vectors = extractor.vector(llama, chat_tokenizer, EXAMPLES, description)
    vectors = vectors.unflatten(0, (3, 2))[1] if description else vectors
    header = chat_tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    for prompt, vector in zip(prompts, vectors, strict=True):
        asked = re.findall(r"<\|im_start\|>user\n(.*)<\|im_end\|>", prompt.text)
        messages = chat_of([(question, of[question]) for question in asked], description)
        options = {"tokenize": False, "add_generation_prompt": True}
        assert prompt.text == chat_tokenizer.apply_chat_template(messages, **options)
        assert [prompt.text[begin:end] for begin, end in prompt.answers] == [of[question] for question in asked[:-1]]
        assert all(prompt.text[:end].endswith("<|im_start|>assistant\n") for end in prompt.ends)

        ids = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        before = [i + len(header) - 1 for i in range(len(ids)) if ids[i : i + len(header)] == header]
        answers = [
            first + 1 + i
            for first, question in zip(before, asked[:-1], strict=False)
            for i in range(len(of[question]))
        ]  # one token per character
        with torch.no_grad():
            states = llama(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        expected = [states[-1], states[before[2:]].mean(0), states[answers].mean(0)]
        torch.testing.assert_close(vector, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_description_of_a_chat_is_its_system_prompt(chat_tokenizer):
    ((text, ends, answers, in_chat),) = TaskVectorExtractor(CHAT).prompts(chat_tokenizer, (), "Do it.", "description")
    messages = chat_of([("...", "")], "Do it.")
    assert text == chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ends == (len(text),)
    assert [text[begin:end] for begin, end in answers] == ["Do it."]
    assert in_chat


def test_plain_text_makes_the_same_vector_in_a_chat(llama, chat_tokenizer):
    texts = ["one", "two", "three"]
    plain = TaskVectorSpec(**CHAT.to_dict() | {"template": DEFAULT_TEMPLATE})
    one, other = (TaskVectorExtractor(spec).vector(llama, chat_tokenizer, texts) for spec in (CHAT, plain))
    assert torch.equal(one, other)


def test_answers_that_a_chat_template_strips_are_found(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = chat_tokenizer.chat_template.replace("message.content", "message.content | trim")
    samples = [Sample(prompt, f" {completion}\n") for prompt, completion in EXAMPLES]
    for prompt in TaskVectorExtractor(CHAT).prompts(tokenizer, samples, None, "demonstrations"):
        assert {prompt.text[begin:end] for begin, end in prompt.answers} <= {completion for _, completion in EXAMPLES}


def test_thoughts_before_the_last_answer_alone_do_no_harm(chat_tokenizer):
    """As Qwen 3 writes it: earlier turns lose what stood before their answers."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    thought = "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "{{ message.content }}", thought + "{{ message.content }}"
    )
    assert render(Sample("a", "b"), "chat", tokenizer)[1] == "<think>\n\n</think>\n\nb<|im_end|>"
    samples = [Sample(*example) for example in EXAMPLES]
    found, expected = (
        TaskVectorExtractor(CHAT).prompts(each, samples, "Do it.", "both") for each in (tokenizer, chat_tokenizer)
    )
    assert found == expected


def test_chat_template_that_rewrites_earlier_turns_is_refused(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = (
        "{{ messages | selectattr('role', 'eq', 'user') | list | length }} questions\n"
        "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    )
    with pytest.raises(TaskError, match="writes earlier turns otherwise once later ones follow"):
        TaskVectorExtractor(CHAT).vector(make_llama(), tokenizer, EXAMPLES)


def test_chat_needs_a_chat_template(llama, tokenizer):
    with pytest.raises(TaskError, match="needs a tokenizer with a chat template"):
        TaskVectorExtractor(CHAT).vector(llama, tokenizer, EXAMPLES)


def test_test_and_train_samples_are_never_read(extracted, tokenizer):
    task = make_tasks(1)[0]
    other = Task(task.name, train=[("1", "2")], demo=task.demo, test=[("3", "4")], description=task.description)
    vectors = TaskVectorExtractor(SPEC).extract(make_llama(), tokenizer, [other]).banks[task.name]
    torch.testing.assert_close(vectors["both"], extracted.banks[task.name]["both"], atol=1e-5, rtol=1e-5)


def test_task_without_description_has_demonstrations_only(llama, tokenizer):
    vectors = TaskVectorExtractor(SPEC).extract(llama, tokenizer, [Task("t", demo=EXAMPLES)])
    assert list(vectors.banks["t"]) == ["demonstrations"]


@pytest.mark.parametrize(
    ("demo", "message"), [([], "has 0 'demo' samples"), ([("a", "b")], "'t' has 1 'demo' samples, .* at least 2")]
)
def test_extraction_needs_two_demonstrations(llama, tokenizer, demo, message):
    with pytest.raises(TaskError, match=message):
        TaskVectorExtractor(SPEC).extract(llama, tokenizer, [Task("t", train=[("x", "y")], demo=demo)])


# One new task


@pytest.mark.parametrize(
    ("examples", "description", "draws"),
    [
        (EXAMPLES, None, range(2, 7)),
        (EXAMPLES, "Do it.", range(6, 19)),
        (None, "Do it.", [1]),
        (EXAMPLES[:1], None, [1]),
        (["some plain text", "more of it", "and more"], None, range(2, 7)),
        ([{"prompt": "a", "completion": "b"}, {"text": "c"}], None, [1, 2]),
    ],
    ids=["examples", "both", "description", "one_example", "plain_text", "mappings"],
)
def test_vector_of_a_new_task(llama, tokenizer, examples, description, draws):
    vector = TaskVectorExtractor(SPEC).vector(llama, tokenizer, examples, description)
    assert vector.shape[1:] == (1, 32)
    assert len(vector) in draws
    assert vector.dtype == torch.float32
    assert vector.isfinite().all()
    assert not vector.requires_grad


def test_from_examples_and_a_description_there_are_draws_of_every_mode(llama, tokenizer):
    extractor = TaskVectorExtractor(SPEC)
    demonstrations = extractor.vector(llama, tokenizer, EXAMPLES)
    description = extractor.vector(llama, tokenizer, description="Do it.")
    found = extractor.vector(llama, tokenizer, EXAMPLES, "Do it.").unflatten(0, (3, len(demonstrations)))
    assert len(demonstrations) > len(description) == 1
    torch.testing.assert_close(found[0], demonstrations, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], description.expand_as(found[2]), atol=1e-5, rtol=1e-5)
    assert not any(torch.allclose(found[1], found[i], atol=1e-2) for i in (0, 2))


def test_one_example_is_demonstration_and_query(llama, tokenizer):
    vector = TaskVectorExtractor(SPEC).vector(llama, tokenizer, [("a", "b")])
    text = "".join(render(Sample("a", "b"), DEFAULT_TEMPLATE, tokenizer)) + "- a:"
    torch.testing.assert_close(vector[0, 0], hidden_states(llama, tokenizer, text)[-1, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("examples", [None, []])
@pytest.mark.parametrize("description", [None, ""])
def test_vector_needs_something(llama, tokenizer, examples, description):
    with pytest.raises(TaskError, match="examples, a description, or both; found neither"):
        TaskVectorExtractor(SPEC).vector(llama, tokenizer, examples, description)


def test_bad_example_is_named(llama, tokenizer):
    with pytest.raises(TaskError, match=r"examples\[1\] .*found 3"):
        TaskVectorExtractor(SPEC).vector(llama, tokenizer, [("a", "b"), 3])


# The base model


@pytest.mark.parametrize("inner", [False, True], ids=["peft_model", "its_base"])
def test_adapters_do_not_change_the_vector_and_stay_on(any_model, tokenizer, inner):
    base, targets = any_model
    expected = TaskVectorExtractor(SPEC).vector(base, tokenizer, EXAMPLES, "Do it.")
    config = LoraConfig(target_modules=targets, fan_in_fan_out=type(base).__name__ == "GPT2LMHeadModel")
    template = adapter_state_dict(get_peft_model(copy.deepcopy(base), config))
    weights = {key: torch.randn_like(tensor) for key, tensor in template.items()}
    model = attach_adapter(base, config.to_dict(), weights)
    given = base if inner else model
    ids = torch.tensor([[3, 4, 5]])
    extra = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    adapted = model(input_ids=ids, **extra).logits
    found = TaskVectorExtractor(SPEC).vector(given, tokenizer, EXAMPLES, "Do it.")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(input_ids=ids, **extra).logits, adapted)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids, **extra).logits, adapted, atol=1e-2)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_gradients_are_restored(llama, tokenizer, fails):
    llama.train()
    llama.model.norm.eval()
    llama.lm_head.weight.requires_grad_(False)
    before = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in llama.modules()]
    extractor = TaskVectorExtractor(TaskVectorSpec(layers=(99,)) if fails else SPEC)
    try:
        extractor.vector(llama, tokenizer, EXAMPLES)
    except TaskVectorError:
        assert fails
    else:
        assert not fails
    after = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in llama.modules()]
    assert after == before
    assert torch.is_grad_enabled()


def test_no_hooks_are_left_behind(any_model, tokenizer):
    """transformers leaves some, with which a model cannot be pickled."""
    model, _ = any_model
    extractor = TaskVectorExtractor(TaskVectorSpec(num_draws=2))
    first = extractor.vector(model, tokenizer, [("ab", "bc"), ("cd", "de")])
    assert not any(module._forward_hooks for module in model.modules())
    again = extractor.vector(pickle.loads(pickle.dumps(model)), tokenizer, [("ab", "bc"), ("cd", "de")])
    assert torch.equal(first, again)
    assert torch.equal(first, extractor.vector(model, tokenizer, [("ab", "bc"), ("cd", "de")]))


def test_layers_that_the_model_lacks_are_named(llama, tokenizer):
    with pytest.raises(TaskVectorError, match=r"base model's 3 hidden states, found \(-1, 99\)"):
        TaskVectorExtractor(TaskVectorSpec(layers=(-1, 99))).vector(llama, tokenizer, EXAMPLES)


@pytest.mark.parametrize("make", [make_gpt2, make_t5, lambda: make_llama(dtype=torch.bfloat16)])
def test_any_base_makes_finite_fp32_vectors(make, tokenizer):
    vector = TaskVectorExtractor(SPEC).vector(make(), tokenizer, EXAMPLES)
    assert vector.dtype == torch.float32
    assert vector.isfinite().all()


# Files and specifications


def test_saved_vectors_are_read_back(extracted, tmp_path):
    extracted.save(tmp_path / "vectors.safetensors")
    loaded = TaskVectors.load(tmp_path / "vectors.safetensors")
    assert_same(extracted, loaded, atol=0, rtol=0)


def test_any_task_name_survives(tmp_path):
    names = ["a.b", "größe/日本", "0", "", " "]
    banks = {name: {"both": torch.full((2, 1, 3), float(i))} for i, name in enumerate(names)}
    TaskVectors(SPEC, "f", banks).save(tmp_path / "v")
    assert_same(TaskVectors(SPEC, "f", banks), TaskVectors.load(tmp_path / "v"), atol=0, rtol=0)


def _missing(path):
    pass


def _html(path):
    path.write_text("<html></html>")


def _other_safetensors(path):
    save_file({"a": torch.ones(1)}, path)


def _truncated(path):
    TaskVectors(SPEC, "f", {"a": {"both": torch.zeros(2, 1, 3)}}).save(path)
    path.write_bytes(path.read_bytes()[:-5])


def _bad_spec(path):
    metadata = {"tasks": "[]", "spec": json.dumps(SPEC.to_dict() | {"num_draws": 0}), "base_model_fingerprint": "f"}
    save_file({}, path, metadata=metadata)


def _pipe(path):
    os.mkfifo(path)


def _deep(path):
    save_file({}, path, metadata={"tasks": "[" * 100_000, "spec": "{}", "base_model_fingerprint": "f"})


STORED = {
    "as it should be": ({"0.both": torch.ones(2, 1, 3).double(), "0.description": torch.ones(1, 1, 3)}, {}),
    "whole numbers": ({"0.both": torch.ones(2, 1, 3, dtype=torch.int32)}, {}),
    "not finite": ({"0.both": torch.full((2, 1, 3), torch.nan)}, {}),
    "unknown mode": ({"0.evil": torch.ones(2, 1, 3)}, {}),
    "task that is not named": ({"7.both": torch.ones(2, 1, 3)}, {}),
    "another name": ({"both": torch.ones(2, 1, 3)}, {}),
    "two dimensions": ({"0.both": torch.ones(2, 3)}, {}),
    "no draws": ({"0.both": torch.ones(0, 1, 3)}, {}),
    "more vectors than layers": ({"0.both": torch.ones(2, 3, 3)}, {}),
    "sizes that differ": ({"0.both": torch.ones(2, 1, 3), "0.description": torch.ones(1, 1, 4)}, {}),
    "names that are none": ({}, {"tasks": "[[]]"}),
    "no specification": ({}, {"spec": "[]"}),
    "no fingerprint": ({}, {"base_model_fingerprint": None}),
}


def _stored(what):
    def write(path):
        tensors, changes = STORED[what]
        about = {"tasks": '["a"]', "spec": json.dumps(SPEC.to_dict()), "base_model_fingerprint": "f"} | changes
        save_file(tensors, path, metadata={name: text for name, text in about.items() if text is not None})

    write.__name__ = what
    return write


def test_file_as_it_should_be(tmp_path):
    _stored("as it should be")(tmp_path / "vectors")
    banks = TaskVectors.load(tmp_path / "vectors").banks
    assert torch.equal(banks["a"]["both"], torch.ones(2, 1, 3))  # in fp32, whatever is stored
    assert torch.equal(banks["a"]["description"], torch.ones(1, 1, 3))


WRONG = [_missing, _html, _other_safetensors, _truncated, _bad_spec, _pipe, _deep, *map(_stored, list(STORED)[1:])]


@pytest.mark.parametrize("write", WRONG)
def test_wrong_files_are_refused_with_their_path(tmp_path, write):
    path = tmp_path / "vectors.safetensors"
    write(path)
    with pytest.raises(TaskVectorError, match=r"vectors\.safetensors: not a file of task vectors"):
        TaskVectors.load(path)


def test_spec_survives_json():
    spec = TaskVectorSpec(template="{prompt}>{completion}", layers=(0, -1), pooling="mean", seed=3, max_length=9)
    again = TaskVectorSpec(**json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"min_demonstrations": 0}, TaskVectorError, "1 <= min_demonstrations"),
        ({"num_demonstrations": 2}, TaskVectorError, "min_demonstrations <= num_demonstrations.* found 3, 2"),
        ({"num_draws": 0}, TaskVectorError, "num_draws >= 1"),
        ({"layers": ()}, TaskVectorError, "at least one layer"),
        ({"layers": ("last",)}, TaskVectorError, r"by their numbers, found \('last',\)"),
        ({"max_length": 0}, TaskVectorError, "max_length"),
        ({"max_length": -1}, TaskVectorError, "max_length"),
        ({"pooling": "max"}, TaskVectorError, r"some of \('last', .*\), found \('max',\)"),
        ({"template": "{prompt}"}, TaskError, r"\{completion\}"),
    ],
)
def test_bad_specs_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        TaskVectorSpec(**fields)
