"""Completions: the loss is transformers' own, computed where it counts and nowhere else."""

import copy
from itertools import product

import pytest
import torch
from conftest import make_gpt2, make_llama, make_t5, make_tasks
from tokenizers import normalizers

from hf_icm_lora import ArgumentError, Sample, TaskError, built_in_tasks, label_accuracy
from hf_icm_lora.completion import (
    DEFAULT_TEMPLATE,
    IGNORED,
    CompletionCollator,
    logits_only_at,
    render,
    score_completions,
)

SAMPLES = [
    Sample("ab", "cd"),
    Sample("a longer prompt", "x"),
    Sample("q", "an answer longer than its prompt"),
    Sample("", "plain text without a prompt"),
    Sample("z", "y z"),
]


def collator(tokenizer, model, **kwargs):
    return CompletionCollator(tokenizer, model.config.is_encoder_decoder, **kwargs)


def score(model, batch):
    with torch.no_grad():
        return score_completions(model, batch)


# Text


@pytest.mark.parametrize(
    ("sample", "template", "expected"),
    [
        (("France", "Paris"), DEFAULT_TEMPLATE, ("- France:", " Paris\n")),
        (("a", "b"), "{prompt}{completion}", ("a", "b")),
        (("a", "b"), "{prompt}   {completion}", ("a", "   b")),
        (("a", "b"), "Q {prompt}\n{completion}", ("Q a\n", "b")),
        (("", "text"), "Q {prompt} A {completion}.", ("", "text")),
        (("{completion}", "{prompt}"), "{prompt}: {completion}", ("{completion}:", " {prompt}")),  # braces are text
        (("a{0}", "b{x}"), "{{}} {prompt} {completion} {}", ("{{}} a{0}", " b{x} {}")),
    ],
)
def test_template_is_cut_before_the_space(tokenizer, sample, template, expected):
    assert render(Sample(*sample), template, tokenizer) == expected


@pytest.mark.parametrize(
    "template", ["", "{prompt}", "{completion}", "{completion} {prompt}", "{Prompt} {completion}"]
)
def test_template_needs_both_in_order(tokenizer, template):
    with pytest.raises(TaskError, match=r"\{prompt\} and, after it, \{completion\}"):
        render(Sample("a", "b"), template, tokenizer)


# Batches


def test_causal_batch_reads_all_and_scores_the_completion(tokenizer):
    batch = CompletionCollator(tokenizer)(SAMPLES)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "labels"], (torch.int64, batch["labels"].shape)
    )
    for row, sample in enumerate(SAMPLES):
        read, scored = render(sample, DEFAULT_TEMPLATE, tokenizer)
        length = int(batch["attention_mask"][row].sum())
        assert tokenizer.decode(batch["input_ids"][row, :length]).replace(" ", "") == (read + scored).replace(" ", "")
        labels = batch["labels"][row]
        assert labels.tolist() == [
            *[IGNORED] * len(read), *tokenizer(scored)["input_ids"], *[IGNORED] * (len(labels) - length)
        ]  # fmt: skip
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (len(labels) - length)


def test_encoder_decoder_batch_reads_the_prompt_and_scores_the_completion_and_its_end(tokenizer):
    batch = CompletionCollator(tokenizer, is_encoder_decoder=True)([Sample("ab", "c"), Sample("a", "cde")])
    ids = tokenizer(["- ab:", "- a:", " c\n", " cde\n"])["input_ids"]
    end = [tokenizer.eos_token_id]
    assert batch["input_ids"].tolist() == [ids[0], ids[1] + [0]]
    assert batch["attention_mask"].tolist() == [[1] * len(ids[0]), [1] * len(ids[1]) + [0]]
    assert batch["labels"].tolist() == [ids[2] + end + [IGNORED] * 2, ids[3] + end]


@pytest.mark.parametrize(
    ("before", "text"),
    [
        ({"examples": [Sample("x", "y"), Sample("", "z")]}, "- x: y\nz"),
        ({"description": "Do it."}, "Do it.\n"),
        ({"examples": [Sample("x", "y")], "description": "Do it."}, "Do it.\n- x: y\n"),
    ],
)
@pytest.mark.parametrize("sample", [Sample("a", "b"), Sample("", "b")])
def test_description_and_examples_stand_before_the_prompt_and_are_not_scored(tokenizer, sample, before, text):
    plain, after = (CompletionCollator(tokenizer, **given)([sample]) for given in ({}, before))
    added = tokenizer(text)["input_ids"]
    assert after["input_ids"].tolist() == [added + plain["input_ids"][0].tolist()]
    assert after["labels"].tolist() == [[IGNORED] * len(added) + plain["labels"][0].tolist()]


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("max_length", [5, 8, 12, 40])
def test_truncation_takes_the_beginning_of_the_prompt_and_keeps_the_completion(
    tokenizer, is_encoder_decoder, max_length
):
    sample = Sample("a long prompt", "abc")  # the completion is 5 tokens: " abc\n"
    full, cut = (CompletionCollator(tokenizer, is_encoder_decoder, max_length=n)([sample]) for n in (512, max_length))
    assert [t for t in cut["labels"][0].tolist() if t != IGNORED] == [
        t for t in full["labels"][0].tolist() if t != IGNORED
    ]
    assert cut["input_ids"].shape[1] <= max_length
    if is_encoder_decoder and max_length == 5:  # no room for a prompt: the encoder reads its end alone
        assert cut["input_ids"].tolist() == [[tokenizer.eos_token_id]]
    else:
        assert full["input_ids"][0, -cut["input_ids"].shape[1] :].tolist() == cut["input_ids"][0].tolist()


def test_completion_longer_than_all_is_cut_at_its_end(tokenizer):
    batch = CompletionCollator(tokenizer, max_length=4)([Sample("a", "bcdefgh")])
    assert batch["labels"].tolist() == [tokenizer(" bcd")["input_ids"]]


def test_tokenizer_that_begins_texts_with_a_token_begins_prompts_and_plain_text_alike(tokenizer):
    with_bos = copy.deepcopy(tokenizer)
    with_bos.bos_token = "</s>"
    batch = CompletionCollator(with_bos)([Sample("", "text")])
    assert batch["input_ids"].tolist() == [[1, *tokenizer("text")["input_ids"]]]
    assert batch["labels"].tolist() == [[IGNORED, *tokenizer("text")["input_ids"]]]


def test_plain_text_is_cut_into_tokens_where_it_always_was(tokenizer, chat_tokenizer):
    """Generators that are out there were trained on these tokens."""
    for task in built_in_tasks()[::100]:
        shown, context = task.demo[:3], f"{task.description}\n"
        context += "".join(f"- {prompt}: {completion}\n" for prompt, completion in shown)
        for one, row_length in product(
            (tokenizer, chat_tokenizer), (None, 64)
        ):  # the latter begins texts with a token
            collate = CompletionCollator(
                one, examples=shown, description=task.description, max_length=1024, row_length=row_length
            )
            for prompt, completion in task.test[:4]:
                batch = collate([Sample(prompt, completion)])
                read = one(f"{context}- {prompt}:")["input_ids"]
                scored = one(f" {completion}\n", add_special_tokens=False)["input_ids"]
                assert batch["input_ids"].tolist() == [read + scored]
                assert batch["labels"].tolist() == [[IGNORED] * len(read) + scored]


# Chats


def turns(sample, examples=(), description=None):
    """The messages of a chat, written by hand."""
    system = [{"role": "system", "content": description}] if description else []
    pairs = [
        ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
        for prompt, completion in (*examples, sample)
    ]
    return [*system, *(message for pair in pairs for message in pair)]


def ids_of(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


BEFORE = [
    {},
    {"description": "Do it."},
    {"examples": [Sample("x", "y"), Sample("longer", "than x")]},
    {"examples": [Sample("x", "y")], "description": "Do it."},
]


@pytest.mark.parametrize("before", BEFORE)
def test_chat_is_what_the_chat_template_writes(chat_tokenizer, before):
    sample = Sample("ab", "c d")
    messages = turns(sample, **before)
    read, scored = render(sample, "chat", chat_tokenizer, **before)
    assert read == chat_tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert read + scored + "\n" == chat_tokenizer.apply_chat_template(messages, tokenize=False)
    assert scored == "c d<|im_end|>"  # what a template puts behind that, nobody writes
    assert ("Be helpful." in read) == ("description" not in before)  # the template's own system prompt

    batch = CompletionCollator(chat_tokenizer, template="chat", **before)([sample])
    whole = ids_of(chat_tokenizer, messages)[:-1]
    asked = ids_of(chat_tokenizer, messages[:-1], add_generation_prompt=True)
    assert batch["input_ids"].tolist() == [whole]
    assert batch["labels"].tolist() == [[IGNORED] * len(asked) + whole[len(asked) :]]


def test_chats_share_a_row(chat_tokenizer):
    batch = CompletionCollator(chat_tokenizer, template="chat", row_length=200)(SAMPLES[:2])
    chats = [ids_of(chat_tokenizer, turns(sample))[:-1] for sample in SAMPLES[:2]]
    assert batch["input_ids"].tolist() == [chats[0] + chats[1]]
    assert batch["position_ids"].tolist() == [[*range(len(chats[0])), *range(len(chats[1]))]]


def test_chat_of_an_encoder_decoder_is_asked_in_one_and_answered_in_the_other(chat_tokenizer):
    collate = CompletionCollator(chat_tokenizer, is_encoder_decoder=True, template="chat")
    batch = collate([Sample("ab", "cd")])
    asked = ids_of(chat_tokenizer, turns(Sample("ab", "cd"))[:-1], add_generation_prompt=True)
    assert batch["input_ids"].tolist() == [asked]
    answer = chat_tokenizer("cd<|im_end|>", add_special_tokens=False)["input_ids"]
    assert batch["labels"].tolist() == [[*answer, chat_tokenizer.eos_token_id]]
    assert score(make_t5(), batch).loss.isfinite().all()


def test_loss_of_a_chat_is_that_of_transformers(llama, chat_tokenizer):
    batch = CompletionCollator(chat_tokenizer, template="chat")([Sample("ab", "cd")])
    with torch.no_grad():
        expected = llama(**batch).loss * 3  # c, d, and the end of the turn
    torch.testing.assert_close(score(llama, batch).loss[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("before", [{}, {"examples": [Sample("", "more")], "description": "Do it."}])
def test_plain_text_is_no_chat(chat_tokenizer, before):
    sample = Sample("", "text")
    chat, plain = (
        CompletionCollator(chat_tokenizer, template=t, **before)([sample]) for t in ("chat", DEFAULT_TEMPLATE)
    )
    assert all(torch.equal(chat[name], plain[name]) for name in plain)


@pytest.mark.parametrize("samples", [(Sample("a", "b"), Sample("", "text")), (Sample("", "text"), Sample("a", "b"))])
def test_chat_refuses_plain_text_among_its_turns(chat_tokenizer, samples):
    example, sample = samples
    with pytest.raises(TaskError, match="Expected a prompt in every sample of a chat, found plain text"):
        render(sample, "chat", chat_tokenizer, [example])
    CompletionCollator(chat_tokenizer, template="chat")(samples)  # each alone is what it is


def test_answer_is_cut_into_the_tokens_that_it_has_in_the_chat(chat_tokenizer):
    """As Llama 2's, which begins each text that it is given with a space."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    sample = Sample("ab", "cd")
    alone = tokenizer("cd<|im_end|>", add_special_tokens=False)["input_ids"]
    assert alone[0] == tokenizer.convert_tokens_to_ids(" ")
    batch = CompletionCollator(tokenizer, template="chat")([sample])
    assert batch["input_ids"].tolist() == [ids_of(tokenizer, turns(sample))[:-2]]  # without " " and the line break


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_chat_needs_a_chat_template(tokenizer, is_encoder_decoder):
    message = r"'chat' needs a tokenizer with a chat template, and \w+ has none. .* set its chat_template, or choose"
    with pytest.raises(TaskError, match=message):
        CompletionCollator(tokenizer, is_encoder_decoder, "chat")
    with pytest.raises(TaskError, match=message):
        render(Sample("a", "b"), "chat", tokenizer)


ANY_ROLE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        # as Gemma 2
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ANY_ROLE,
         "refuses a chat of system, user: no system role"),
        ("{{ messages[0].parts[0].text }}", "refuses a chat of system, user: .*parts"),
        # asks otherwise than it answers
        (ANY_ROLE + "{% if add_generation_prompt %}assistant:\n{% endif %}", "changes the text before an answer"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "what the system says: 'Do it.'"),
        ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}", "what the assistant says"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "what the system says: 'Do it.' is not in 'DO"),
    ],
)  # fmt: skip
def test_chat_template_that_cannot_do_it_is_refused(chat_tokenizer, chat_template, message):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = chat_template
    with pytest.raises(TaskError, match=message):
        render(Sample("a", "b"), "chat", tokenizer, description="Do it.")


def test_chat_template_may_strip_what_it_is_given(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = chat_tokenizer.chat_template.replace("message.content", "message.content | trim")
    sample, stripped = Sample(" a\n", " b "), Sample("a", "b")
    assert render(sample, "chat", tokenizer) == render(stripped, "chat", chat_tokenizer)


# Scores


def test_loss_is_that_of_transformers(any_model, tokenizer):
    model, _ = any_model
    samples = [sample for sample in SAMPLES if sample.prompt]
    collate = collator(tokenizer, model)
    scores = score(model, collate(samples))
    for row, sample in enumerate(samples):
        with torch.no_grad():
            expected = model(**collate([sample])).loss * scores.num_tokens[row]
        torch.testing.assert_close(scores.loss[row], expected, atol=1e-4, rtol=1e-4)
        extra = 1 if model.config.is_encoder_decoder else 0
        assert scores.num_tokens[row] == len(sample.completion) + 2 + extra  # " " before, "\n" after, and the end
    with torch.no_grad():
        mean = model(**collate(samples)).loss
    torch.testing.assert_close(scores.loss.sum() / scores.num_tokens.sum(), mean, atol=1e-4, rtol=1e-4)


def test_loss_of_plain_text_is_that_of_transformers(llama, tokenizer):
    batch = CompletionCollator(tokenizer)([Sample("", "some plain text")])
    scores = score(llama, batch)
    assert scores.num_tokens.tolist() == [14]  # nothing predicts the first token
    with torch.no_grad():
        torch.testing.assert_close(scores.loss[0], llama(**batch).loss * 14, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [["some plain text", "more"], ["some plain text", ("a", "b")]])
def test_plain_text_works_in_an_encoder_decoder_too(tokenizer, samples):
    model = make_t5()
    samples = [Sample("", raw) if isinstance(raw, str) else Sample(*raw) for raw in samples]
    batch = CompletionCollator(tokenizer, is_encoder_decoder=True)(samples)
    scores = score(model, batch)
    assert scores.loss.isfinite().all()
    assert scores.num_tokens[0] == len("some plain text") + 1
    torch.testing.assert_close(scores.loss[:1], score(model, CompletionCollator(tokenizer, True)(samples[:1])).loss)


def test_loss_has_the_gradient_of_transformers(any_model, tokenizer):
    model, _ = any_model
    batch = collator(tokenizer, model)(SAMPLES[:3])
    gradients = []
    for loss in (
        lambda: model(**batch).loss,
        lambda: (s := score_completions(model, batch)).loss.sum() / s.num_tokens.sum(),
    ):
        model.zero_grad()
        loss().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-5, rtol=1e-3)


def test_batch_size_padding_and_tokenizer_do_not_matter(any_model, tokenizer):
    model, _ = any_model
    samples = [sample for sample in SAMPLES if sample.prompt]
    together = score(model, collator(tokenizer, model)(samples))
    other = copy.deepcopy(tokenizer)
    other.padding_side, other.truncation_side, other.pad_token = "left", "left", "a"
    for row, sample in enumerate(samples):
        alone = score(model, collator(other, model)([sample]))
        torch.testing.assert_close(together.loss[row : row + 1], alone.loss, atol=1e-4, rtol=1e-4)
        assert together.num_tokens[row] == alone.num_tokens
        assert together.exact[row] == alone.exact
    batch = collator(other, model)(samples)
    assert all(torch.equal(tensor, collator(tokenizer, model)(samples)[name]) for name, tensor in batch.items())


def test_scoring_changes_neither_batch_nor_tokenizer(llama, tokenizer):
    collate = CompletionCollator(tokenizer)
    before = (tokenizer.padding_side, tokenizer.pad_token)
    batch = collate(SAMPLES)
    copied = {name: tensor.clone() for name, tensor in batch.items()}
    score(llama, batch)
    assert batch.keys() == copied.keys()
    assert all(torch.equal(batch[name], copied[name]) for name in copied)
    assert (tokenizer.padding_side, tokenizer.pad_token) == before


@pytest.fixture(scope="module")
def overfitted(tokenizer):
    """A Llama that knows some answers by heart and others not."""
    model = make_llama().train()
    train = make_tasks(1)[0].train
    batch = CompletionCollator(tokenizer)(train[:8])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        scores = score_completions(model, batch)
        optimizer.zero_grad()
        (scores.loss.sum() / scores.num_tokens.sum()).backward()
        optimizer.step()
    model.generation_config.eos_token_id = None  # its default is a letter of the tiny tokenizer
    return model.eval(), train


def test_exact_is_what_greedy_generation_writes(overfitted, tokenizer):
    model, samples = overfitted
    exact = score(model, CompletionCollator(tokenizer)(samples)).exact
    assert 0 < exact.sum() < len(samples)  # else this test says nothing
    for sample, expected in zip(samples, exact.tolist(), strict=True):
        read, scored = (
            tokenizer(text, return_tensors="pt")["input_ids"] for text in render(sample, DEFAULT_TEMPLATE, tokenizer)
        )
        written = model.generate(
            read, attention_mask=torch.ones_like(read), max_new_tokens=scored.shape[1], do_sample=False, pad_token_id=0
        )
        assert torch.equal(written[:, read.shape[1] :], scored) == expected


# Several samples in a row


def test_rows_are_filled_in_order(tokenizer):
    collate = CompletionCollator(tokenizer, row_length=20)
    samples = [Sample("a" * n, "b") for n in (1, 2, 9, 30, 1)]  # 7, 8, 15, 36 and 7 tokens
    rows = collate.fill_rows(samples)
    assert [[len(read) + len(scored) for read, scored in row] for row in rows] == [[7, 8], [15], [36], [7]]
    batch = collate(samples)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (4, 36))
    assert batch["position_ids"][0].tolist() == [*range(7), *range(8), *range(21)]  # padding is a sequence, too
    assert set(batch) == {"input_ids", "position_ids", "labels"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_score_as_their_samples_do(tokenizer, name):
    model = {"llama": make_llama, "gpt2": make_gpt2}[name]()
    texts = [Sample("", "plain text"), Sample("", "more of it")]  # the first token of each has none before it
    samples = [*SAMPLES, *texts]
    alone = score(model, CompletionCollator(tokenizer)(samples))
    packed = score(model, CompletionCollator(tokenizer, row_length=48)(samples))
    assert len(packed.loss) < len(samples)
    torch.testing.assert_close(packed.loss.sum(), alone.loss.sum(), rtol=1e-5, atol=1e-4)
    assert packed.num_tokens.sum() == alone.num_tokens.sum()


def test_encoder_decoder_rows_hold_one_sample(tokenizer):
    batch = CompletionCollator(tokenizer, is_encoder_decoder=True, row_length=64)(SAMPLES)
    assert len(batch["input_ids"]) == len(SAMPLES)


# A prefix that all rows share


@pytest.mark.parametrize("examples", [[Sample("ab", "c")] * 6, [Sample("", "abcdefgh")] * 5])
def test_shared_prefix_is_read_once_and_scores_stay_the_same(any_model, tokenizer, examples):
    model, _ = any_model
    context = "".join("".join(render(example, DEFAULT_TEMPLATE, tokenizer)) for example in examples)
    batch = collator(tokenizer, model, examples=examples)(SAMPLES)
    expected = [score(model, collator(tokenizer, model, examples=examples)([sample])) for sample in SAMPLES]
    read = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, inputs, output: read.append(tuple(inputs[0].shape)))
    scores = score(model, batch)
    handle.remove()
    torch.testing.assert_close(scores.loss, torch.cat([alone.loss for alone in expected]), atol=1e-4, rtol=1e-4)
    assert scores.exact.tolist() == [bool(alone.exact) for alone in expected]
    if not model.config.is_encoder_decoder:
        (one, prefix), (rows, rest) = read
        assert (one, rows) == (1, len(SAMPLES))
        assert prefix >= len(context) - 1  # the last token of all predicts the first of plain text
        assert prefix + rest == batch["input_ids"].shape[1]


def test_gradients_flow_through_a_shared_prefix(llama, tokenizer):
    batch = CompletionCollator(tokenizer, examples=[Sample("ab", "c")] * 6)(SAMPLES)
    embeddings = llama.get_input_embeddings().weight.requires_grad_()
    score_completions(llama, batch).loss.sum().backward()
    context = tokenizer("c")["input_ids"]
    assert embeddings.grad[context].abs().max() > 0


# The head


def test_head_sees_only_what_is_scored(llama, tokenizer):
    batch = CompletionCollator(tokenizer)(SAMPLES)
    shapes = []
    handle = llama.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    scores = score(llama, batch)
    handle.remove()
    assert shapes == [(1, int(scores.num_tokens.sum()), 128)]


def test_head_is_as_before_also_after_an_error(any_model, tokenizer):
    model, _ = any_model
    batch = collator(tokenizer, model)(SAMPLES[:3])
    with torch.no_grad():
        before = model(**batch).logits
    head = model.get_output_embeddings()
    score(model, batch)
    assert not head._forward_pre_hooks
    with pytest.raises(IndexError):  # an id that no embedding has
        score(model, batch | {"input_ids": batch["input_ids"] + 1000})
    with pytest.raises(KeyError, match="mine"), logits_only_at(model, batch["labels"] != IGNORED):
        raise KeyError("mine")
    assert not head._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


# Labels

LABELS = ("a", "b c", "a b")  # of several lengths, one the beginning of another
OF_LABELS = [Sample(f"{'q' * (1 + 5 * (i % 4))}{i}", LABELS[i % 3]) for i in range(12)]


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_t5])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_the_most_probable_label_counts(make, tokenizer, batch_size):
    model = make()
    collate = collator(tokenizer, model, template="{prompt} = {completion} .")
    right = 0
    for sample in OF_LABELS:
        losses = [score(model, collate([Sample(sample.prompt, label)])).loss.item() for label in LABELS]
        right += LABELS[losses.index(min(losses))] == sample.completion
    assert label_accuracy(model, collate, OF_LABELS, LABELS, batch_size) == right / len(OF_LABELS)


@pytest.mark.parametrize(("length", "num_examples", "passes"), [(2, 0, 1), (90, 0, 16), (4, 40, 2)])
def test_long_prompts_are_read_once_for_all_labels(tokenizer, length, num_examples, passes):
    """And short ones in few passes: each after a context takes one for it, and one for the rest."""
    model, calls = make_llama(), []
    samples = [Sample(f"{i} {'x ' * length}", LABELS[i % 3]) for i in range(8)]
    collate = collator(tokenizer, model, examples=[Sample("a b", "c")] * num_examples)
    expected = label_accuracy(model, collate, samples, LABELS, batch_size=1)
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert label_accuracy(model, collate, samples, LABELS) == expected
    assert len(calls) == passes


def test_labels_that_a_model_was_taught_are_right(tokenizer):
    """And wrong, if each sample has the other label."""
    model = make_llama()
    collate = collator(tokenizer, model)
    samples = [Sample(f"{word} {i}", label) for i in range(4) for word, label in (("up", "yes"), ("down", "no"))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        score_completions(model, collate(samples)).loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert label_accuracy(model, collate, samples, ["no", "yes"]) == 1
    swapped = [Sample(sample.prompt, "no" if sample.completion == "yes" else "yes") for sample in samples]
    assert label_accuracy(model, collate, swapped, ["no", "yes"]) == 0


@pytest.mark.parametrize(
    ("samples", "labels", "error", "message"),
    [
        (OF_LABELS, ("a",), ArgumentError, "2 to 16 labels, found 12 samples and 1 labels"),
        (OF_LABELS, [str(n) for n in range(17)], ArgumentError, "and 17 labels"),
        ([], LABELS, ArgumentError, "found 0 samples"),
        (OF_LABELS, ("a", "b c"), TaskError, "one of the labels .* found Sample.*'a b'"),
    ],
)
def test_what_has_no_label_accuracy_is_refused(tokenizer, samples, labels, error, message):
    model = make_llama()
    with pytest.raises(error, match=message):
        label_accuracy(model, collator(tokenizer, model), samples, labels)
