"""evaluate_generator: every figure means what its name says, and nothing is touched."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SEEN, SIZES, UNSEEN, amplified, make_llama, make_tasks, make_zoo
from peft.tuners.lora import LoraLayer

from hf_icm_lora import (
    ArgumentError,
    ExampleLoss,
    IncompatibleAdapterError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraZoo,
    Sample,
    Task,
    TaskError,
    TaskVectorExtractor,
    TaskVectorSpec,
    ZooError,
    evaluate_generator,
    format_report,
    label_accuracy,
    read_report,
)
from hf_icm_lora.adapter import attach_adapter
from hf_icm_lora.completion import CompletionCollator, score_completions
from hf_icm_lora.evaluation import MORE_ROWS, descriptions
from hf_icm_lora.evaluation import ROWS as ROW_TABLE
from hf_icm_lora.lora_config import canonical_lora_config
from hf_icm_lora.report import rank_correlation, storage
from hf_icm_lora.rivals import Rivals

ROOT = Path(__file__).parent.parent
ROWS = ["base", "task_lora", "generated", "wrong_condition", "mean_lora", "nearest_lora", "top_k_merge", "ridge",
        "few_shot_prompt"]  # fmt: skip
IDS = torch.arange(2, 42).reshape(2, 20)


def make_generator(seen):
    return amplified(LoraGeneratorConfig.from_zoo(seen, **SIZES), seen.as_dataset())


@pytest.fixture(scope="module")
def zoo(world):
    return world.zoo


@pytest.fixture(scope="module")
def generator(world):
    return world.generator


@pytest.fixture(scope="module")
def report_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def report(zoo, generator, tokenizer, report_dir):
    return evaluate_generator(generator, make_llama(), tokenizer, zoo, make_tasks(), output_dir=report_dir)


@pytest.fixture
def rivals(zoo):
    weights = {name: zoo.lora_weights(name) for name in SEEN}
    return Rivals(weights, {name: zoo.task_vectors.banks[name]["demonstrations"] for name in SEEN})


def state(model):
    """Everything that must come back: logits, modes, gradients, modules, hooks."""
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = len(model.lm_head._forward_hooks) + len(model.lm_head._forward_pre_hooks)
    return logits, (modes, flags, hooks)


def assert_unchanged(model, before):
    logits, rest = state(model)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert torch.equal(logits, before[0])
    assert rest == before[1]


# The report


def test_report_has_the_documented_shape(report):
    assert {"command", "date", "versions", "machine", "seed", "rows", "splits", "storage", "seconds"} <= set(report)
    assert list(report["rows"]) == ROWS
    assert set(report["versions"]) >= {"python", "hf_icm_lora", "transformers", "peft", "torch"}
    assert list(report["splits"]) == ["seen", "unseen"]
    for split, names in (("seen", SEEN), ("unseen", UNSEEN)):
        assert list(report["splits"][split]) == ROWS
        for name, row in report["splits"][split].items():
            common = {
                f"{kind}_recovered_{what}" for kind in ("mean", "median", "min") for what in ("accuracy", "gain")
            }
            common |= {"mean_loss", "exact_match", "exact_match_interval", "mean_recovered_accuracy_interval"}
            weights = set() if name in ("base", "few_shot_prompt") else {"nearest_seen_distance"}
            told = {"gain_on_examples_correlation"} if name == "generated" else set()
            assert set(row) == common | weights | told | {"tasks"}
            assert list(row["tasks"]) == names
            known = {"loss", "exact_match", "recovered_accuracy", "recovered_gain"}
            assert all(known <= set(score) for score in row["tasks"].values())
    assert all({"relative_error", "cosine"} <= set(s) for s in report["splits"]["seen"]["generated"]["tasks"].values())


def test_report_is_strict_json_and_stands_in_its_files(report, report_dir):
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text) == report
    assert sorted(path.name for path in report_dir.iterdir()) == ["evaluation.json", "evaluation.md"]
    assert read_report(report_dir / "evaluation.json") == report
    assert (report_dir / "evaluation.md").read_text(encoding="utf-8") == format_report(report)


def test_base_gains_nothing_and_the_task_lora_everything(report):
    scores = [(split, name) for split, names in (("seen", SEEN), ("unseen", UNSEEN)) for name in names]
    gains = {row: [report["splits"][s][row]["tasks"][n]["recovered_gain"] for s, n in scores] for row in ROWS}
    assert gains["base"] == [0] * 4
    assert gains["task_lora"] == [1] * 4
    assert all(-1 <= gain <= 1 for row in gains.values() for gain in row)


def test_losses_are_those_of_transformers(report, zoo, tokenizer):
    """Base and task LoRA, computed with the model's own loss, one sample at a time."""
    for name in (*SEEN, *UNSEEN):
        task = next(task for task in make_tasks() if task.name == name)
        split = report["splits"]["seen" if name in SEEN else "unseen"]
        adapted = make_llama()
        weights = zoo.load_snapshot(name)
        scaling = zoo.lora_config["lora_alpha"] / zoo.lora_config["r"]
        with torch.no_grad():
            for key in weights:
                if ".lora_A." in key:
                    module = adapted.get_submodule(
                        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    )
                    module.weight += scaling * weights[key.replace("lora_A", "lora_B")] @ weights[key]
            for row, model in (("base", make_llama()), ("task_lora", adapted)):
                total, tokens = 0.0, 0
                for prompt, completion in task.test:
                    read, scored = f"- {prompt}:", f" {completion}\n"
                    ids = torch.tensor([tokenizer(read + scored)["input_ids"]])
                    labels = ids.clone()
                    labels[:, : len(tokenizer(read)["input_ids"])] = -100
                    count = int((labels != -100).sum())
                    total, tokens = total + count * model(input_ids=ids, labels=labels).loss.item(), tokens + count
                assert split[row]["tasks"][name]["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_losses_do_not_depend_on_the_batch_size(report, zoo, generator, tokenizer):
    again = evaluate_generator(generator, make_llama(), tokenizer, zoo, make_tasks(), batch_size=3)
    for split in report["splits"]:
        for row in ROWS:
            expected = report["splits"][split][row]["mean_loss"]
            assert again["splits"][split][row]["mean_loss"] == pytest.approx(expected, rel=1e-4), row


def test_means_by_family_give_each_family_the_same_weight(report, zoo, generator, tokenizer):
    tasks = [dataclasses.replace(task, family="odd" if task.name == "shift/2" else "even") for task in make_tasks()]
    other = evaluate_generator(generator, make_llama(), tokenizer, zoo, tasks, by_family=True)
    assert (report["by_family"], other["by_family"]) == (False, True)
    for row, summary in other["splits"]["seen"].items():
        losses = [summary["tasks"][name]["loss"] for name in SEEN]
        assert summary["mean_loss"] == pytest.approx((losses[1] + (losses[0] + losses[2]) / 2) / 2)
        own = report["splits"]["seen"][row]
        assert own["mean_loss"] == pytest.approx(sum(losses) / 3)
        assert summary["median_recovered_gain"] == pytest.approx(own["median_recovered_gain"], abs=1e-5)


def test_a_classification_has_its_label_accuracy_in_every_row(zoo, generator, tokenizer):
    labels = ("one", "two two", "three")

    def labelled(name, number_of_labels=3):
        known = (*labels, *map(str, range(number_of_labels - 3)))
        splits = {split: [(f"{split} {i}", known[i % 3]) for i in range(24)] for split in ("train", "demo", "test")}
        return Task(name, **splits, labels=known)

    tasks = [labelled("shift/1"), make_tasks()[1], labelled("shift/3", number_of_labels=17)]
    base = make_llama()
    report = evaluate_generator(generator, base, tokenizer, zoo, tasks)
    for summary in report["splits"]["seen"].values():
        known = {name: score.get("label_accuracy") for name, score in summary["tasks"].items()}
        assert known["shift/2"] is known["shift/3"] is None  # no classes, and more of them than are scored
        assert summary["label_accuracy"] == known["shift/1"]
        assert known["shift/1"] >= summary["tasks"]["shift/1"]["exact_match"]
    found = report["splits"]["seen"]["base"]["label_accuracy"]
    assert found == label_accuracy(base, CompletionCollator(tokenizer, template=zoo.template), tasks[0].test, labels)
    collate = CompletionCollator(tokenizer, template=zoo.template, examples=tasks[0].demo[:12], max_length=1024)
    found = report["splits"]["seen"]["few_shot_prompt"]["label_accuracy"]
    assert found == label_accuracy(base, collate, tasks[0].test, labels)
    assert "| row | right answers | by label |" in format_report(report)


def test_further_rows(zoo, generator, tokenizer):
    tasks, rows = make_tasks()[:2], ["fine_tuned", "scaled", "both", "description", "refined"]
    report = evaluate_generator(generator, make_llama(), tokenizer, zoo, tasks, more_rows=rows, refine_steps=4)
    (table,) = report["splits"].values()
    assert list(table) == [*ROWS, "description", "both", "scaled", "refined", "fine_tuned"]
    assert list(report["seconds"]["rows"]) == list(report["rows"]) == list(table)
    examples = tasks[0].demo[:12]
    alone = {
        "description": generator.generate_adapter(
            make_llama(), processing_class=tokenizer, description=tasks[0].description
        ),
        "both": generator.generate_adapter(
            make_llama(),
            processing_class=tokenizer,
            examples=examples,
            description=tasks[0].description,
            fit_scale=False,
        ),
        "scaled": generator.generate_adapter(make_llama(), processing_class=tokenizer, examples=examples),
        "refined": generator.generate_adapter(
            make_llama(), processing_class=tokenizer, examples=examples, fit_scale=False, refine_steps=4
        ),
    }
    for row, model in alone.items():
        with torch.no_grad():
            scores = score_completions(model, CompletionCollator(tokenizer)(tasks[0].test))
        expected = (scores.loss.sum() / scores.num_tokens.sum()).item()
        assert table[row]["tasks"][tasks[0].name]["loss"] == pytest.approx(expected, rel=1e-3)
    nothing = zoo.layout.scaled(zoo.lora_weights(SEEN[0]), 0.0)
    example_loss = ExampleLoss(make_llama(), tokenizer, zoo.layout, zoo.shared_weights, examples)
    fitted = attached(zoo, example_loss.refine(nothing, 4, learning_rate=1e-2))
    loss = loss_of(fitted, tokenizer, tasks[0])
    assert table["fine_tuned"]["tasks"][tasks[0].name]["loss"] == pytest.approx(loss, rel=1e-3)
    with pytest.raises(ArgumentError, match=r"more_rows: expected some of description, .*; found paper\."):
        evaluate_generator(generator, make_llama(), tokenizer, zoo, tasks, more_rows=["paper"])
    silent = [Task(tasks[0].name, demo=tasks[0].demo, test=tasks[0].test)]
    for row in ("description", "both"):
        with pytest.raises(TaskError, match=f"'shift/1' has no description, which the row {row} reads"):
            evaluate_generator(generator, make_llama(), tokenizer, zoo, silent, more_rows=[row])


def loss_of(model, tokenizer, task, **collation):
    with torch.no_grad():
        scores = score_completions(model, CompletionCollator(tokenizer, **collation)(task.test))
    return (scores.loss.sum() / scores.num_tokens.sum()).item()


def attached(zoo, lora_weights):
    state_dict = zoo.layout.unpack(lora_weights, zoo.shared_weights)
    return attach_adapter(make_llama(), canonical_lora_config(zoo.lora_config, zoo.layout.max_rank), state_dict)


def test_best_rival_has_the_least_loss_on_the_examples(zoo, generator, tokenizer, rivals):
    task = make_tasks()[3]
    report = evaluate_generator(generator, make_llama(), tokenizer, zoo, [task], more_rows=["best_rival"])
    extractor = TaskVectorExtractor(TaskVectorSpec(num_demonstrations=4, num_draws=4))
    vector = extractor.vector(make_llama(), tokenizer, task.demo[:12])
    chosen = [rivals.nearest(vector, task.name), rivals.top_k_merge(vector, task.name)]
    known = [rivals.mean, *chosen, rivals.ridge(vector)]
    candidates = [zoo.layout.scaled(rival, scale) for rival in known for scale in (0.0, 0.25, 0.5, 0.75, 1.0)]
    examples = Task(task.name, test=task.demo[:12])
    best = min(candidates, key=lambda own: loss_of(attached(zoo, own), tokenizer, examples))
    row = report["splits"]["unseen"]["best_rival"]["tasks"][task.name]
    assert row["loss"] == pytest.approx(loss_of(attached(zoo, best), tokenizer, task), rel=1e-3)


def test_noisy_nearest_is_as_far_as_the_generated_adapter(zoo, generator, tokenizer, rivals):
    task = make_tasks()[3]
    report = evaluate_generator(generator, make_llama(), tokenizer, zoo, [task], more_rows=["noisy_nearest"])
    rows = {row: table["tasks"][task.name] for row, table in report["splits"]["unseen"].items()}
    own = TaskVectorExtractor(TaskVectorSpec(num_demonstrations=4, num_draws=4)).vector(
        make_llama(), tokenizer, task.demo[:12]
    )
    noisy = rivals.noisy_nearest(generator.decode_task_vector(own), task.name)
    distances = (rivals.weights - noisy).norm(dim=1) / rivals.deviation
    assert float(distances.min()) == pytest.approx(rows["generated"]["nearest_seen_distance"], rel=1e-3)
    assert rows["noisy_nearest"]["loss"] == pytest.approx(loss_of(attached(zoo, noisy), tokenizer, task), rel=1e-3)


def test_fallback_is_nothing_where_the_adapter_does_harm(zoo, generator, tokenizer, monkeypatch):
    tasks = make_tasks()
    extractor = TaskVectorExtractor(TaskVectorSpec(**generator.config.task_vector_spec))
    vectors = [extractor.vector(make_llama(), tokenizer, task.demo[:12]) for task in tasks]
    decode = generator.decode_task_vector

    def decode_and_harm(vector, generator=None):
        return (-50 if torch.equal(vector, vectors[1]) else 1) * decode(vector)

    monkeypatch.setattr(generator, "decode_task_vector", decode_and_harm)
    report = evaluate_generator(generator, make_llama(), tokenizer, zoo, tasks, more_rows=["fallback"])
    monkeypatch.undo()
    seen = report["splits"]["seen"]
    signs = [seen["generated"]["tasks"][name]["gain_on_examples"] for name in SEEN]
    assert signs[0] > 0 > signs[1]
    assert signs[2] > 0
    examples = tasks[2].demo[:12]
    example_loss = ExampleLoss(make_llama(), tokenizer, zoo.layout, zoo.shared_weights, examples)
    assert signs[2] == pytest.approx(example_loss.gain(decode(vectors[2])), rel=1e-3)
    taken = ["generated", "base", "generated"]
    assert [seen["fallback"]["tasks"][n]["loss"] for n in SEEN] == [
        seen[row]["tasks"][n]["loss"] for row, n in zip(taken, SEEN, strict=True)
    ]
    gains = [seen["generated"]["tasks"][name]["recovered_gain"] for name in SEEN]
    assert seen["generated"]["gain_on_examples_correlation"] == rank_correlation(signs, gains)


def test_other_generators_are_rows(zoo, generator, tokenizer):
    task = make_tasks()[3]
    torch.manual_seed(1)
    other = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo.subset(SEEN), architecture="conv1d")).eval()
    other.fit_normalizer(zoo.subset(SEEN).as_dataset())
    report = evaluate_generator(
        generator, make_llama(), tokenizer, zoo, [task], other_generators={"paper_cvae": other}
    )
    assert list(report["splits"]["unseen"]) == [*ROWS, "paper_cvae"]
    model = other.generate_adapter(make_llama(), processing_class=tokenizer, examples=task.demo[:12])
    row = report["splits"]["unseen"]["paper_cvae"]["tasks"][task.name]
    assert row["loss"] == pytest.approx(loss_of(model, tokenizer, task), rel=1e-3)
    with pytest.raises(ArgumentError, match="other_generators: ridge are names of rows already"):
        evaluate_generator(generator, make_llama(), tokenizer, zoo, [task], other_generators={"ridge": other})


def test_distance_to_the_nearest_seen_adapter(report, zoo):
    seen = {name: zoo.lora_weights(name) for name in SEEN}
    mean = torch.stack(list(seen.values())).mean(0)
    unit = torch.stack([(weights - mean).norm() ** 2 for weights in seen.values()]).mean().sqrt()
    for split, names in (("seen", SEEN), ("unseen", UNSEEN)):
        rows = report["splits"][split]
        for name in names:
            others = [weights for other, weights in seen.items() if other != name]
            for row, own in (("task_lora", zoo.lora_weights(name)), ("mean_lora", mean)):
                expected = min((own - weights).norm() for weights in others) / unit
                assert rows[row]["tasks"][name]["nearest_seen_distance"] == pytest.approx(float(expected), rel=1e-4)
            assert rows["nearest_lora"]["tasks"][name]["nearest_seen_distance"] == pytest.approx(0, abs=1e-6)
        found = [score["nearest_seen_distance"] for score in rows["generated"]["tasks"].values()]
        assert rows["generated"]["nearest_seen_distance"] == pytest.approx(sum(found) / len(found))
        assert "nearest_seen_distance" not in rows["base"]


def test_storage(report, zoo, generator):
    assert report["storage"] == storage(generator, 3)
    assert report["storage"]["adapter_bytes"] == 2 * zoo.layout.num_weights
    assert report["storage"]["shared_bytes"] == 2 * zoo.layout.num_shared_weights > 0


def test_seconds_are_measured(report):
    seconds = report["seconds"]
    assert list(seconds) == ["task_vector", "rows", "attachment", "fine_tuning", "evaluation"]
    assert list(seconds["rows"]) == ROWS
    assert all(value >= 0 for value in [*seconds["rows"].values(), seconds["attachment"]])
    assert min(seconds["task_vector"], seconds["fine_tuning"], seconds["evaluation"]) > 0


@pytest.mark.parametrize("names", [SEEN, UNSEEN])
def test_split_without_tasks_is_left_out(zoo, generator, tokenizer, names):
    tasks = [task for task in make_tasks() if task.name in names]
    report = evaluate_generator(generator, make_llama(), tokenizer, zoo, tasks)
    assert list(report["splits"]) == (["seen"] if names == SEEN else ["unseen"])
    json.dumps(report, allow_nan=False)
    format_report(report)


def test_zoo_that_trains_both_matrices(tmp_path, tokenizer):
    zoo = make_zoo(tmp_path, make_llama(), tokenizer, make_tasks(3), freeze_a=False)
    generator = make_generator(zoo.subset(SEEN[:2]))
    report = evaluate_generator(generator, make_llama(), tokenizer, zoo, make_tasks(3))
    assert [row["recovered_gain"] for row in report["splits"]["seen"]["task_lora"]["tasks"].values()] == [1, 1]
    json.dumps(report, allow_nan=False)


# The base model


@pytest.mark.parametrize("training", [False, True])
def test_base_comes_back_unchanged(zoo, generator, tokenizer, training):
    base = make_llama().train(training)
    base.lm_head.eval()
    base.model.layers[0].requires_grad_(False)
    before = state(base)
    evaluate_generator(generator, base, tokenizer, zoo, make_tasks())
    assert_unchanged(base, before)


class CountingTokenizer:
    """A tokenizer that counts its calls, and is interrupted at one of them."""

    def __init__(self, tokenizer, interrupted_at=None):
        self.tokenizer, self.interrupted_at, self.calls = tokenizer, interrupted_at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.interrupted_at:
            raise KeyboardInterrupt
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_base_comes_back_unchanged_after_an_error(zoo, generator, tokenizer, part):
    base, counting = make_llama().train(), CountingTokenizer(tokenizer)
    before = state(base)
    evaluate_generator(generator, base, counting, zoo, make_tasks(), more_rows=["refined"])
    interrupted = CountingTokenizer(tokenizer, interrupted_at=int(part * counting.calls))
    with pytest.raises(KeyboardInterrupt):
        evaluate_generator(generator, base, interrupted, zoo, make_tasks(), more_rows=["refined"])
    assert_unchanged(base, before)


def test_generator_and_global_random_state_are_left_alone(zoo, generator, tokenizer):
    before, base = {name: tensor.clone() for name, tensor in generator.state_dict().items()}, make_llama()
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    evaluate_generator(generator, base, tokenizer, zoo, make_tasks())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())


# Who is compared with whom


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("unseen", ["shift/1", "shift/4"])
def test_wrong_condition_is_another_task_of_the_split_where_there_is_one(zoo, tokenizer, monkeypatch, unseen, place):
    generator = make_generator(zoo.subset([name for name in (*SEEN, *UNSEEN) if name != unseen]))
    tasks = [task for task in make_tasks() if task.name != unseen]
    tasks.insert(place, next(task for task in make_tasks() if task.name == unseen))
    vectors, decode = [], generator.decode_task_vector
    monkeypatch.setattr(
        generator, "decode_task_vector", lambda vector, *_: (vectors.append(vector), decode(vector))[1]
    )
    evaluate_generator(generator, make_llama(), tokenizer, zoo, tasks)
    assert len(vectors) == 8
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    assert not any(torch.equal(own, other) for own, other in pairs)
    seen = [own for own, _ in pairs[:3]]
    assert all(any(torch.equal(other, vector) for vector in seen) for _, other in pairs[:3])


def test_everyone_is_given_the_same_examples(zoo, generator, tokenizer):
    """The first `num_examples` demo samples, in the task vector and in the prompt."""
    tasks = make_tasks()[2:]
    report = evaluate_generator(generator, make_llama(), tokenizer, zoo, tasks, num_examples=5)
    for task, rows in zip(tasks, report["splits"].values(), strict=True):
        expected = loss_of(make_llama(), tokenizer, task, examples=task.demo[:5])
        assert rows["few_shot_prompt"]["tasks"][task.name]["loss"] == pytest.approx(expected, rel=1e-4)
        model = generator.generate_adapter(
            make_llama(), processing_class=tokenizer, examples=task.demo[:5], fit_scale=False
        )
        expected = loss_of(model, tokenizer, task)
        assert rows["generated"]["tasks"][task.name]["loss"] == pytest.approx(expected, rel=1e-3)


def test_no_adapter_depends_on_the_test_samples(zoo, generator, tokenizer):
    tasks, more_rows = make_tasks(), list(MORE_ROWS)
    others = [
        Task(task.name, description=task.description, demo=task.demo, test=[("zz", "?"), ("yy", "!")])
        for task in tasks
    ]
    one, other = (
        evaluate_generator(generator, make_llama(), tokenizer, zoo, given, more_rows=more_rows, refine_steps=2)
        for given in (tasks, others)
    )
    for split, rows in one["splits"].items():
        for row in rows.keys() - {"base", "few_shot_prompt"}:
            for name, score in rows[row]["tasks"].items():
                found = other["splits"][split][row]["tasks"][name]
                assert found["nearest_seen_distance"] == score["nearest_seen_distance"], row
                assert found["loss"] != score["loss"]


# The table of rows


def test_a_further_row_is_a_function_and_its_docstring(zoo, generator, tokenizer, monkeypatch):
    def answers_first(given):
        """The base model with nothing but the answers
        before every prompt."""
        return [Sample("", sample.completion) for sample in given.examples]

    monkeypatch.setitem(MORE_ROWS, "answers_first", answers_first)
    task = make_tasks()[3]
    report = evaluate_generator(generator, make_llama(), tokenizer, zoo, [task], more_rows=["answers_first"])
    answers = [Sample("", sample.completion) for sample in task.demo[:12]]
    expected = loss_of(make_llama(), tokenizer, task, examples=answers)
    row = report["splits"]["unseen"]["answers_first"]["tasks"][task.name]
    assert row["loss"] == pytest.approx(expected, rel=1e-4)
    assert "- `answers_first`: The base model with nothing but the answers before every prompt." in format_report(
        report
    )
    assert report["seconds"]["rows"]["answers_first"] >= 0


def test_every_row_is_described_in_one_sentence():
    for row, text in descriptions(ROW_TABLE | MORE_ROWS).items():
        assert re.fullmatch(r"\S.*[^.\s]\.", text), row
        assert "%" not in text  # argparse would format it


def test_the_page_describes_all_rows_in_the_same_words():
    page = (ROOT / "docs/source/evaluation.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert table == list(descriptions(ROW_TABLE | MORE_ROWS).items())


# Refusals, before anything is computed


@pytest.fixture
def counted():
    """A base model that counts its forward passes."""
    base = make_llama()
    base.calls = 0

    def count(*_):
        base.calls += 1

    base.model.register_forward_pre_hook(count)
    return base


def test_generator_of_another_layout_is_refused(counted, zoo, tokenizer):
    layout = zoo.layout.to_dict()
    config = LoraGeneratorConfig.from_zoo(zoo.subset(SEEN), **SIZES)
    config.layout = layout | {"modules": layout["modules"][:-1]}
    with pytest.raises(IncompatibleAdapterError, match="layout or base model"):
        evaluate_generator(LoraGeneratorModel(config), counted, tokenizer, zoo, make_tasks())
    assert counted.calls == 0


def test_generator_of_another_base_is_refused(counted, zoo, tokenizer):
    config = LoraGeneratorConfig.from_zoo(zoo.subset(SEEN), **SIZES)
    config.base_model_fingerprint = "0" * 64
    with pytest.raises(IncompatibleAdapterError, match="layout or base model"):
        evaluate_generator(LoraGeneratorModel(config), counted, tokenizer, zoo, make_tasks())
    assert counted.calls == 0


def test_zoo_with_another_lora_a_is_refused(counted, tmp_path, generator, tokenizer):
    """Same base, same layout, another seed: its LoRAs on the generator's A would be other adapters."""
    zoo = make_zoo(tmp_path, make_llama(), tokenizer, make_tasks(), seed=7)
    with pytest.raises(IncompatibleAdapterError, match="another lora_A"):
        evaluate_generator(generator, counted, tokenizer, zoo, make_tasks())
    assert counted.calls == 0


def test_another_base_model_is_refused(zoo, generator, tokenizer):
    """As the documentation says: zoo, generator and base model must belong together."""
    other = make_llama(seed=1)
    before = state(other)
    with pytest.raises(IncompatibleAdapterError, match="fingerprint"):
        evaluate_generator(generator, other, tokenizer, zoo, make_tasks())
    assert_unchanged(other, before)


def test_task_without_a_lora_is_refused_before_any_forward_pass(counted, zoo, generator, tokenizer):
    with pytest.raises(ZooError, match="shift/5"):
        evaluate_generator(generator, counted, tokenizer, zoo, make_tasks(5))
    assert counted.calls == 0


@pytest.mark.parametrize("training_tasks", [["without/1", "without/2"], [], None])
def test_zoo_without_any_seen_task_is_refused_before_any_forward_pass(counted, zoo, tokenizer, training_tasks):
    generator = make_generator(zoo.subset(SEEN))
    generator.config.training_tasks = training_tasks
    with pytest.raises(ZooError, match=f"holds none of the {len(training_tasks or ())} tasks"):
        evaluate_generator(generator, counted, tokenizer, zoo, make_tasks())
    assert counted.calls == 0


def test_seen_tasks_without_a_lora_are_no_rivals(zoo, tokenizer):
    """Behavioural training sees tasks that the zoo lacks."""
    reports = []
    for more in ([], ["without a LoRA"]):
        generator = make_generator(zoo.subset(SEEN))
        generator.config.training_tasks = [*SEEN, *more]
        reports.append(evaluate_generator(generator, make_llama(), tokenizer, zoo, make_tasks()))
    assert reports[0]["splits"] == reports[1]["splits"]
    assert reports[0]["storage"] == reports[1]["storage"]


@pytest.mark.parametrize("split", ["demo", "test"])
def test_task_without_samples_is_refused(counted, zoo, generator, tokenizer, split):
    task = make_tasks()[0]
    parts = {name: getattr(task, name) for name in ("train", "demo", "test") if name != split}
    with pytest.raises(TaskError, match=f"'shift/1' has 0 '{split}' samples"):
        evaluate_generator(generator, counted, tokenizer, zoo, [Task("shift/1", **parts), *make_tasks()[1:]])
    assert counted.calls == 0


def test_no_tasks_are_refused(counted, zoo, generator, tokenizer):
    with pytest.raises(TaskError, match="at least one task"):
        evaluate_generator(generator, counted, tokenizer, zoo, [])


def test_base_with_adapters_is_refused_and_keeps_them(zoo, generator, tokenizer):
    model = generator.generate_adapter(make_llama(), task_vector=torch.zeros(2, 32), adapter_name="mine")
    with pytest.raises(IncompatibleAdapterError, match="without adapters"):
        evaluate_generator(generator, model, tokenizer, zoo, make_tasks())
    assert list(model.peft_config) == ["mine"]
    assert any(isinstance(module, LoraLayer) for module in model.modules())


def test_zoo_may_be_reopened(zoo):
    assert LoraZoo(zoo.path).task_vectors.banks.keys() == {f"shift/{i}" for i in range(1, 7)}
