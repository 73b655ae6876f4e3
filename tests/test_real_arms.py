"""benchmarks/real: the arms that are scored on real tasks, and the command that scores them, at small size."""

import json

import pytest
import torch
from peft import PeftModel

from benchmarks.real.bench import ARMS, Arm, Given, Prompt, base, few_shot_prompt, score, train_lora
from benchmarks.real.choices import ChoiceOptions
from benchmarks.real.choices import run as run_choices
from benchmarks.real.multi_task import batches
from benchmarks.real.run import RunOptions, chosen, run
from hf_icm_lora import LoraGeneratorModel, Task, save_tasks
from hf_icm_lora.completion import DEFAULT_TEMPLATE, CompletionCollator, score_completions
from hf_icm_lora.learned_closed_form import closed_form_config
from tests.conftest import make_llama
from tests.test_learned_closed_form import NETWORK, SIZES


def letters(name: str, family: str, labels=None, shift: int = 1) -> Task:
    """The next letter, or whether it is an early one."""
    prompts = [chr(97 + i % 26) + chr(97 + i // 26) for i in range(40)]

    def answer(prompt: str) -> str:
        return ("early" if prompt[0] < "n" else "late") if labels else chr(97 + (ord(prompt[0]) - 97 + shift) % 26)

    samples = [(prompt, answer(prompt)) for prompt in prompts]
    return Task(name, samples[:24], samples[24:32], samples[32:], "Letters.", family, labels=labels)


TASKS = [letters("next/1", "next"), letters("next/2", "next", shift=2), letters("early", "sort", ("early", "late"))]


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    sizes = {"num_task_vectors": 2, "task_vector_size": 32}
    generator = LoraGeneratorModel(closed_form_config(make_llama(), **SIZES | NETWORK | sizes)).eval()
    generator.zoo_normalizer.is_fitted.fill_(1)
    return generator


def given(tokenizer, generator, task=TASKS[2]) -> Given:
    return Given(task, TASKS[0], make_llama(), tokenizer, generator, num_examples=6)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_scored_and_leaves_the_base_as_it_was(name, chat_tokenizer, generator, tmp_path):
    own, arm = given(chat_tokenizer, generator), ARMS[name]
    if "steps" in arm.options:
        arm = Arm(arm.make, options={"steps": 2})
    if name == "multi_task_lora":
        drawn = batches(TASKS, size=4, longest=100)
        model = train_lora(make_llama(), chat_tokenizer, DEFAULT_TEMPLATE, drawn, steps=2, rate=1e-2)
        model.save_pretrained(tmp_path / "multi_task")
        arm = Arm(arm.make, options={"folder": str(tmp_path / "multi_task")})
    before = {key: tensor.clone() for key, tensor in own.base.state_dict().items()}
    scores = score(own, arm, own.task.test)
    assert 0 <= scores["exact_match"] <= 1
    assert scores["loss"] > 0
    assert (scores["bytes"] > 0) == (arm.make not in (base, few_shot_prompt))
    assert own.base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in own.base.state_dict().items())
    if arm.make is not few_shot_prompt:
        assert scores["exact_match"] <= scores["label_accuracy"] <= 1


def test_a_prompt_is_scored_as_the_model_reads_it(chat_tokenizer, generator):
    own = given(chat_tokenizer, generator)
    found = score(own, Arm(few_shot_prompt, options={"described": True}), own.task.test)
    collate = CompletionCollator(
        chat_tokenizer, False, DEFAULT_TEMPLATE, own.task.demo[:6], own.task.description, max_length=2048
    )
    with torch.no_grad():
        expected = score_completions(make_llama(), collate(own.task.test))
    assert found["loss"] == pytest.approx((expected.loss.sum() / expected.num_tokens.sum()).item(), abs=1e-3)
    assert found["exact_match"] == pytest.approx(expected.exact.float().mean().item(), abs=1e-3)


def test_no_arm_sees_a_test_sample(chat_tokenizer, generator):
    """Other test samples change no adapter and no prompt."""
    for name in ("generated", "closed_form", "task_lora", "few_shot_prompt", "wrong_condition"):
        made = []
        for test in (TASKS[2].test, [("zz", "late")]):
            own = given(chat_tokenizer, generator, Task(**{**vars(TASKS[2]), "test": test}))
            result = ARMS[name].make(own)
            if isinstance(result, PeftModel):
                result = {key: tensor for key, tensor in result.state_dict().items() if "lora_" in key}
            made.append(result)
        if isinstance(made[0], Prompt):
            assert made[0] == made[1]
        else:
            assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_a_run_keeps_what_it_has_and_adds_what_is_missing(tmp_path, chat_tokenizer, generator):
    save_tasks(TASKS, tmp_path / "validation.jsonl.gz")
    options = RunOptions(
        str(tmp_path), arms=["base", "few_shot_prompt"], per_kind=2, num_test=8, output=str(tmp_path / "real.json")
    )
    run(options, make_llama(), chat_tokenizer, generator)
    report = json.loads((tmp_path / "real.json").read_text())
    rows = report["splits"]["validation"]
    assert set(rows) == {"base", "few_shot_prompt"}
    assert set(rows["base"]["tasks"]) == {"next/1", "next/2", "early"}
    rows["base"]["tasks"]["early"]["exact_match"] = 0.123  # what was scored before is not scored again
    (tmp_path / "real.json").write_text(json.dumps(report))
    options.arms = ["base", "task_lora"]
    run(options, make_llama(), chat_tokenizer, generator)
    rows = json.loads((tmp_path / "real.json").read_text())["splits"]["validation"]
    assert rows["base"]["tasks"]["early"]["exact_match"] == 0.123
    kinds = [rows["task_lora"]["tasks"][name]["exact_match"] for name in ("next/1", "next/2")]
    expected = (sum(kinds) / 2 + rows["task_lora"]["tasks"]["early"]["exact_match"]) / 2
    assert rows["task_lora"]["exact_match"] == pytest.approx(expected)


def test_some_tasks_of_each_kind_are_chosen():
    assert [task.name for task in chosen(TASKS, 1)] == ["next/1", "early"]
    assert chosen(TASKS, 2) == TASKS


def test_each_arm_says_what_it_is():
    assert len({str(arm) for arm in ARMS.values()}) == len(ARMS)
    assert str(ARMS["generated_in_chat"]).endswith("Made in the plain template, scored in the chat one.")


def test_choices_are_kept_and_summed_up(tmp_path, tokenizer, generator):
    save_tasks(TASKS, tmp_path / "validation.jsonl.gz")
    options = ChoiceOptions(str(tmp_path), num_tasks=2, output=str(tmp_path / "choices.json"))
    first = run_choices(options, make_llama(), tokenizer, generator)
    assert set(first["tasks"]) == {"next/1", "next/2"}
    options.num_tasks = 3
    report = run_choices(options, make_llama(), tokenizer, generator)
    assert first["tasks"].items() <= report["tasks"].items()
    assert len(report["tasks"]) == 3
    right = [task["two_orders"] for task in report["tasks"].values()]
    assert report["summary"]["two_orders"]["right"] == pytest.approx(sum(right) / 3)
    for name, task in report["tasks"].items():
        own = next(task for task in TASKS if task.name == name)
        model = generator.generate_adapter(make_llama(), processing_class=tokenizer, examples=own.demo[:12])
        assert task["gain_on_examples"] == pytest.approx(model.lora_generation["default"].gain_on_examples, abs=0.01)


def test_all_kinds_are_drawn_alike_for_the_lora_of_all_tasks():
    drawn = batches(TASKS, size=400, longest=100)
    answers = [sample.completion for sample in next(drawn)]
    share = sum(answer in ("early", "late") for answer in answers) / 400
    assert 0.4 < share < 0.6  # one of two kinds, though one of three tasks
