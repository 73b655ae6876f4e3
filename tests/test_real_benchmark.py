"""benchmarks/real: episodes, the meta-learned closed form and its training, at small size."""

import copy
import gzip
import json

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from benchmarks.real import prepare, train
from benchmarks.real.episodes import Episodes, Stream
from benchmarks.real.score import MODES, evaluate
from benchmarks.real.writer import Base, MetaClosedForm, Solve, Writer, dequantise, initialise, ridge, stored_sizes
from tests.conftest import make_llama

TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<s>hi<|im_end|>
{% endif %}<{{ message['role'] }}>{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


SMALL = {"num_memory": 3, "reader_rank": 2, "state_rank": 2, "label_rank": 2}


def real_line(number: int, labels: bool) -> dict:
    """A task in the format of the real tasks: the first letter's name, or the letters reversed."""
    words = [chr(97 + i % 26) + chr(97 + i // 26) + str(number) for i in range(60)]
    samples = [(word, ("early" if word[0] < "n" else "late") if labels else word[::-1]) for word in words]
    return {
        "name": f"task{number}", "family": "sort" if labels else "reverse", "description": f"Task {number}.",
        "descriptions": ["One.", "Two.", "Three."], "labels": ["early", "late"] if labels else None,
        "train": samples[:40], "demo": samples[40:48], "test": samples[48:],
    }  # fmt: skip


def with_chat(tokenizer):
    """A copy of a tokenizer with the chat template, and with the token that ends a turn."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer):
    """A folder of prepare.py: six tasks in three files, and a tiny Llama in fp32."""
    folder = tmp_path_factory.mktemp("prepared")
    templates = prepare.Templates(with_chat(tokenizer))
    for split, numbers in {"train": (0, 1, 2), "suite": (3,), "validation": (4, 5)}.items():
        path = folder / f"{split}.jsonl.gz"
        with gzip.open(path, "wt") as lines:
            lines.writelines(json.dumps(real_line(number, labels=number % 2 == 0)) + "\n" for number in numbers)
        prepare.save_tasks(*prepare.tokenise(prepare.real_tasks(path), templates), templates, folder / split)
    base = make_llama()
    tensors = {name: tensor for name, tensor in base.state_dict().items() if name != "lm_head.weight"}
    prepare.save_base(tensors, base.config, folder)
    return folder


@pytest.fixture
def model(prepared):
    torch.manual_seed(0)
    base = Base(prepared, "cpu", torch.float32)
    model = MetaClosedForm(base, Writer(base, rank=8, **SMALL))
    stream = Stream(Episodes(prepared, {"train": 1.0}), seed=1, budget=2000)
    initialise(model, [batch for batch, _ in zip(stream, range(3), strict=False)])
    return model


def disturb(writer: Writer) -> None:
    """Give every parameter values of its own, as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in writer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_dequantise_is_what_gguf_reads(kind):
    kind = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(np.random.default_rng(0).standard_normal((6, 96), dtype=np.float32), kind)
    name = "embed_tokens" if kind.name == "Q8_0" else "q_proj"
    expected = gguf.quants.dequantize(raw, kind)
    assert torch.equal(dequantise(name, torch.from_numpy(raw)), torch.from_numpy(expected))


def test_base_is_the_llama(prepared):
    base, llama, ids = Base(prepared, "cpu", torch.float32), make_llama(), torch.randint(0, 97, (2, 19))
    model = MetaClosedForm(base, Writer(base, rank=2))
    with torch.no_grad():
        torch.testing.assert_close(base.logits(model.last(ids, trained=True)), llama(ids).logits, atol=1e-4, rtol=1e-4)


def test_solve_has_the_gradient_of_a_solve():
    matrix = torch.randn(3, 5, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    matrix = (matrix @ matrix.mT + torch.eye(5)).requires_grad_()
    right = torch.randn(3, 5, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, r: Solve.apply((m + m.mT) / 2, r), (matrix, right))


def test_ridge_is_weighted_least_squares_and_a_masked_position_does_not_count():
    generator = torch.Generator().manual_seed(0)
    a, values = torch.randn(1, 3, 4, 5, generator=generator), torch.randn(1, 3, 4, 6, generator=generator)
    weight = torch.rand(1, 3, 4, generator=generator) + 0.5
    weight[0, 2, 1:] = 0
    kept = weight.flatten() > 0
    strength = 0.3 * float((weight[..., None] * a.square()).sum() / weight.sum())
    rows = a.flatten(0, 2)[kept] * weight.flatten()[kept, None].sqrt()
    wanted = values.flatten(0, 2)[kept] * weight.flatten()[kept, None].sqrt()
    rows, wanted = torch.cat([rows, strength**0.5 * torch.eye(5)]), torch.cat([wanted, torch.zeros(5, 6)])
    a, values, weight = (tensor.flatten(1, 2) for tensor in (a, values, weight))
    found = ridge(a, values, weight, torch.tensor(0.3))
    torch.testing.assert_close(found[0], torch.linalg.lstsq(rows, wanted).solution, atol=1e-4, rtol=1e-4)
    values[0, 9:] = 1e3
    torch.testing.assert_close(ridge(a, values, weight, torch.tensor(0.3)), found)


@pytest.mark.parametrize("demos", [6, 0])
@pytest.mark.parametrize("template", ["plain", "chat"])
@torch.no_grad()
def test_what_is_written_is_a_plain_lora(prepared, model, template, demos):
    """The rows come out as PEFT computes them with the adapter on the plain Llama."""
    disturb(model.writer)
    batch = Episodes(prepared, {"validation": 1.0}).held_out([0], demos, queries=4, template=template, describe=True)
    hidden, adapter = model.write(batch, model.read(batch))
    peft_model = get_peft_model(make_llama(), LoraConfig(r=8, lora_alpha=8, target_modules=["down_proj"]))
    for index, layer in enumerate(peft_model.get_base_model().model.layers):
        layer.mlp.down_proj.lora_A["default"].weight.copy_(model.writer.keys[index] * model.writer.key_scale[index])
        layer.mlp.down_proj.lora_B["default"].weight.copy_(adapter[index][0].T)
    logits = peft_model(batch["rows_ids"][0]).logits
    mask = batch["mask"][0]
    expected = logits.gather(1, batch["rows_at"][0][..., None].expand(-1, -1, logits.shape[-1]))[mask]
    torch.testing.assert_close(model.base.logits(hidden[0][mask]), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("template", ["plain", "chat"])
@torch.no_grad()
def test_memory_tokens_are_read_after_what_is_known_of_a_task(prepared, model, template):
    disturb(model.writer)
    episodes = Episodes(prepared, {"validation": 1.0})
    for demos in (0, 6):
        one, both = (episodes.held_out(tasks, demos, 2, template, describe=True) for tasks in ([0], [0, 1]))
        ids = one["reader_ids"][0, : one["reader_end"][0]].tolist()
        assert ids[: len(episodes.opening(template, 0))] == episodes.opening(template, 0)
        assert (len(ids) == len(episodes.opening(template, 0))) == (demos == 0)
        embedded = torch.cat([model.base.embed[ids].float(), model.writer.memory])[None]
        alone, (cos, sin) = model.read(one), model.base.rotary(len(ids) + 3)
        for index, weights in enumerate(model.writer.reader(model.base)):
            embedded, _ = model.base.layer(embedded, cos, sin, **weights)
            torch.testing.assert_close(alone.memory[index], embedded[:, -3:])
        beside_another = model.read(both)  # which pads the shorter one
        torch.testing.assert_close(alone.memory[-1][0], beside_another.memory[-1][0])


@torch.no_grad()
def test_a_description_alone_makes_an_adapter_of_its_own(prepared, model):
    episodes = Episodes(prepared, {"validation": 1.0})

    def adapter(wording: int) -> torch.Tensor:
        batch = episodes.held_out([0], 0, 2, "plain", describe=True, wording=wording)
        return model.write(batch, model.read(batch))[1][-1]

    assert not adapter(0).any()  # before training
    disturb(model.writer)
    assert (adapter(0) - adapter(1)).norm() > 1e-3 * adapter(0).norm() > 0


def test_the_reader_sees_the_examples_and_no_query(prepared):
    episodes = Episodes(prepared, {"train": 1.0, "suite": 0.5})
    rng = np.random.default_rng(0)
    for template, before in (("plain", 0), ("chat", len(episodes.constants["chat_before"]))):
        batch = episodes.draw(rng, 4, 3, 3000, template, remap=0.0, describe=1.0, mix=0.0)
        for task in range(len(batch["mask"])):
            read = batch["reader_ids"][task].tolist()
            for row in range(7):
                at = batch["rows_at"][task, row][batch["mask"][task, row]]
                answer = batch["targets"][task, row][batch["mask"][task, row]].tolist()
                assert batch["rows_ids"][task, row][at + 1].tolist() == answer
                text = batch["rows_ids"][task, row, before : int(at[-1]) + 1].tolist()
                found = any(read[place : place + len(text)] == text for place in range(len(read)))
                assert found == (row < 4)
            for row in range(4):
                at = batch["reader_at"][task, row][batch["mask"][task, row]]
                answer = batch["targets"][task, row][batch["mask"][task, row]].tolist()
                assert [read[int(place) + 1] for place in at] == answer


def test_renamed_labels_are_renamed_alike(prepared, tokenizer):
    episodes, renamed = Episodes(prepared, {"train": 1.0}), 0
    own = {tuple(ids[0]) for ids in episodes.tasks[0]["labels"].values()}
    later = tokenizer.convert_tokens_to_ids("n")
    for seed in range(12):
        batch = episodes.draw(np.random.default_rng(seed), 8, 4, 4000, "plain", remap=1.0, describe=0.0, mix=0.0)
        assert len(batch["mask"]) == 3
        for task in range(3):
            words = {True: set(), False: set()}
            for row in range(12):
                answer = batch["targets"][task, row][batch["mask"][task, row]]
                words[bool(batch["rows_ids"][task, row, 2] < later)].add(tuple(answer.tolist()))
            if set().union(*words.values()) <= own or all(len(found) > 1 for found in words.values()):
                continue  # the words happened to be the same, or the task has no labels
            assert all(len(found) == 1 for found in words.values())
            renamed += 1
    assert renamed >= 5  # of 24: three in five draw from the label sets, which are all of the same two words here


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_prompt_and_answer_change_places_where_answers_are_unique(prepared, tokenizer, template):
    episodes = Episodes(prepared, {"train": 1.0})
    assert episodes.invertible == [False, True, False]  # the others have labels
    asked = {"remap": 0.0, "describe": 1.0, "mix": 0.0}
    batch = episodes.draw(np.random.default_rng(0), 4, 3, 4000, template, **asked, inverse=1.0)
    texts = prepare.Templates(with_chat(tokenizer))
    before, after = (" ", "\n") if template == "plain" else ("", "<|im_end|>")
    words = {word for word, _ in real_line(1, labels=False)["train"]}
    inverted = 0
    for task, row in np.ndindex(len(batch["mask"]), 7):
        mask = batch["mask"][task, row]
        answer = texts.tokenizer.decode(batch["targets"][task, row][mask])
        word = answer.removeprefix(before).removesuffix(after)
        if word not in words:
            continue
        prompt = f"- {word[::-1]}:" if template == "plain" else f"{word[::-1]}{texts.after}"
        start = int(batch["rows_at"][task, row][0]) + 1
        assert texts.tokenizer.decode(batch["rows_ids"][task, row, :start]).endswith(prompt)
        inverted += 1
    assert inverted == 7  # all samples of the one task


def test_a_batch_follows_from_seed_and_step(prepared):
    def batches(first_step: int):
        return iter(Stream(Episodes(prepared, {"train": 1.0}), seed=3, budget=2000, first_step=first_step))

    late, early = batches(2), batches(0)
    next(early), next(early)
    a, b = next(early), next(late)
    assert all(torch.equal(a[name], b[name]) for name in a)


def options(prepared, folder, **values) -> train.TrainOptions:
    common = {"max_steps": 4, "budget": 1500, "rank": 8, "eval_tasks": 0, "warmup_steps": 2, "keep_state": True}
    return train.TrainOptions(data=str(prepared), output_dir=str(folder), **{**common, **values})


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_an_interrupted_run_ends_as_one_that_was_not(prepared, tmp_path, monkeypatch):
    whole = train.train(options(prepared, tmp_path / "whole")).writer.state_dict()
    saved = train.Run.save

    class Interrupted(Exception):
        pass

    def save(self):
        saved(self)
        if self.step == 2:
            raise Interrupted

    parts = options(prepared, tmp_path / "parts", save_minutes=0.0)
    monkeypatch.setattr(train.Run, "save", save)
    with pytest.raises(Interrupted):
        train.train(parts)
    monkeypatch.undo()
    resumed = train.train(parts).writer.state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, msg=name)
    lines = log_of(tmp_path / "parts")
    assert lines[-1]["step"] == 4


def test_training_moves_every_parameter_and_lowers_the_loss(prepared, tmp_path):
    model = train.train(options(prepared, tmp_path, max_steps=40, learning_rate=5e-3, keep_state=False))
    torch.manual_seed(0)
    fresh = Writer(model.base, rank=8, num_memory=8)
    for (name, trained), (_, start) in zip(model.writer.named_parameters(), fresh.named_parameters(), strict=True):
        assert not torch.equal(trained, start), name
    batch = Episodes(prepared, {"train": 1.0}).held_out([0, 1, 2], demos=8, queries=8, template="plain")
    with torch.no_grad():
        after, _ = train.losses(model, batch, 0.0)
        untrained = MetaClosedForm(model.base, fresh)
        initialise(untrained, [batch])
        before, _ = train.losses(untrained, batch, 0.0)
    assert after < before


def test_without_a_step_the_result_is_the_plain_closed_form(prepared, tmp_path):
    writer = train.train(options(prepared, tmp_path, max_steps=0, keep_state=False)).writer
    zero = (writer.state_out, writer.label_out, writer.memory_out, writer.constant, *writer.reader_b.values())
    for parameter in zero:
        assert not parameter.any()
    torch.testing.assert_close(writer.keys @ writer.keys.mT, torch.eye(8).expand(2, 8, 8), atol=1e-4, rtol=1e-4)


def test_eight_bits_keep_what_was_learned(model, tmp_path):
    disturb(model.writer)
    model.writer.save(tmp_path / "writer.safetensors")
    again = Writer(model.base, rank=8, **SMALL)
    again.load(tmp_path / "writer.safetensors")
    assert stored_sizes(tmp_path / "writer.safetensors") == {"rank": 8, "num_memory": 3}
    for (name, a), (_, b) in zip(model.writer.state_dict().items(), again.state_dict().items(), strict=True):
        assert (a - b).norm() <= 0.01 * a.norm(), name


def test_a_run_goes_on_from_a_writer_without_memory_tokens(prepared, model, tmp_path):
    torch.manual_seed(1)
    old = Writer(model.base, rank=8)
    disturb(old)
    old.save(tmp_path / "old.safetensors")
    old.load(tmp_path / "old.safetensors")  # in 8 bits
    start = {"start_from": str(tmp_path / "old.safetensors")}
    new = train.train(options(prepared, tmp_path / "new", max_steps=0, keep_state=False, **start)).writer
    for name, tensor in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], tensor), name
    assert {name for name in new.state_dict() if name not in old.state_dict()} == {
        "memory", "memory_keys", "memory_in", "memory_out", "log_memory",
    }  # fmt: skip
    assert new.memory.any()
    stored = load_file(tmp_path / "old.safetensors")
    save_file({name: tensor for name, tensor in stored.items() if name != "gain"}, tmp_path / "old.safetensors")
    with pytest.raises(RuntimeError, match='Missing key.*"gain"'):
        new.load(tmp_path / "old.safetensors")


def test_validation_tasks_are_scored_half_way_and_at_the_end(prepared, tmp_path):
    train.train(options(prepared, tmp_path, eval_tasks=2, keep_state=False))
    scored = [line for line in log_of(tmp_path) if "mode" in line]
    half, last = scored[:4], scored[4:]
    assert [(line["step"], line["mode"], len(line["found"])) for line in half] == [(2, "adapter", 1)] * 4
    assert {(line["template"], line["demos"]) for line in half} == {(t, d) for t in ("plain", "chat") for d in (12, 0)}
    assert [(line["step"], line["mode"]) for line in last] == [(4, "adapter")] * 4 + [(4, "reader")] * 4


@pytest.mark.parametrize("demos", [6, 0])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_every_mode_is_scored_and_wrong_examples_make_another_adapter(prepared, model, template, demos):
    disturb(model.writer)
    episodes = Episodes(prepared, {"validation": 1.0, "train": 1.0})
    losses = {}
    for mode in MODES:
        found = evaluate(model, episodes, mode, template, num_tasks=2, demos=demos, queries=4, describe=True)
        assert len(found) == 2
        assert all(np.isfinite(loss) and 0 <= right <= 1 for loss, right in found.values())
        losses[mode] = [loss for loss, _ in found.values()]
    assert len({tuple(values) for values in losses.values()}) == len(MODES)
