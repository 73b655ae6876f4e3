"""template="chat": the whole way from tasks to scores in the tokenizer's own chat template."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import make_llama, make_tasks, save_base_and_tasks
from peft import LoraConfig

from hf_icm_lora import (
    CollectionArguments,
    LoraGeneratorModel,
    LoraZoo,
    RecipeArguments,
    TaskError,
    TaskVectorSpec,
    collect_zoo,
    evaluate_generator,
    generator_card,
    in_context_adapter,
    read_report,
    train_generator,
)
from hf_icm_lora.adapter import attach_adapter
from hf_icm_lora.cli import main
from hf_icm_lora.completion import DEFAULT_TEMPLATE
from hf_icm_lora.lora_config import canonical_lora_config
from hf_icm_lora.model_card import adapter_card, zoo_card

SEEN, UNSEEN = make_tasks(4)[:3], make_tasks(4)[3:]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
BEGINNING = "<s><|im_start|>system\n"


@contextmanager
def noted(model):
    """Collect all rows of tokens that a model reads."""
    rows: list[list[int]] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: rows.extend(inputs[0].tolist()))
    yield rows
    handle.remove()


def assert_chats(tokenizer, rows):
    assert rows
    assert all(tokenizer.decode(row).startswith(BEGINNING) for row in rows)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, chat_tokenizer):
    folder, base = tmp_path_factory.mktemp("chat"), make_llama()
    args = CollectionArguments(
        output_dir=folder, max_steps=8, eval_steps=4, use_cpu=True, template="chat", row_length=256
    )
    return collect_zoo(folder / "zoo", base, chat_tokenizer, [*SEEN, *UNSEEN], LORA, args)


@pytest.fixture(scope="module")
def generator(zoo, chat_tokenizer, tmp_path_factory):
    base = make_llama()
    sizes = dict(hidden_size=32, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=1, latent_size=4)
    args = RecipeArguments(
        str(tmp_path_factory.mktemp("generator")), max_steps=4, reconstruction_steps=4, row_length=256,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    with noted(base) as rows:
        train_generator(zoo, base, chat_tokenizer, SEEN, args, eval_tasks=UNSEEN, **sizes)
    assert_chats(chat_tokenizer, rows)  # task vectors and behavioural training
    return LoraGeneratorModel.from_pretrained(args.output_dir)


def loss_in_chat(model, tokenizer, samples, examples=()) -> float:
    """Loss per token of the answers, by transformers and the chat template alone."""
    total, tokens = 0.0, 0
    for sample in samples:
        messages = [
            {"role": role, "content": text}
            for pair in (*examples, sample)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)[:-1]  # without the line break at the end
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        labels = [-100] * len(asked) + whole[len(asked) :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss.item()
        total, tokens = total + loss * (len(whole) - len(asked)), tokens + len(whole) - len(asked)
    return total / tokens


def attached(zoo, name):
    lora_config = canonical_lora_config(zoo.lora_config, zoo.layout.max_rank)
    return attach_adapter(make_llama(), lora_config, zoo.layout.unpack(zoo.lora_weights(name), zoo.shared_weights))


def test_adapters_are_fitted_and_chosen_in_chats(zoo, chat_tokenizer):
    assert LoraZoo(zoo.path).template == "chat"
    for task in SEEN:
        record = zoo.records[task.name]
        found = record["validation_losses"][str(record["best_step"])]
        assert found == pytest.approx(loss_in_chat(attached(zoo, task.name), chat_tokenizer, task.demo), rel=1e-3)
        assert found < 0.95 * loss_in_chat(make_llama(), chat_tokenizer, task.demo)


def test_generated_adapter_is_of_a_chat_and_judged_in_it(generator, chat_tokenizer):
    assert generator.config.template == "chat"
    assert TaskVectorSpec(**generator.config.task_vector_spec).template == "chat"
    examples, base = UNSEEN[0].demo, make_llama()
    given = {"processing_class": chat_tokenizer, "examples": examples, "description": UNSEEN[0].description}
    with noted(base) as rows:
        model = generator.generate_adapter(base, **given, fit_scale=False)
    assert_chats(chat_tokenizer, rows)
    assert sum(UNSEEN[0].description in chat_tokenizer.decode(row) for row in rows) > 1
    assert model.lora_generation["default"].template == "chat"

    record = generator.generate_adapter(model, **given, on_unfamiliar="base").lora_generation["default"]
    gain = 1 - loss_in_chat(model, chat_tokenizer, examples) / loss_in_chat(make_llama(), chat_tokenizer, examples)
    assert record.gain_on_examples == pytest.approx(gain, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("template", [None, "chat"])
def test_evaluation_scores_chats(zoo, generator, chat_tokenizer, template):
    task = SEEN[0]
    report = evaluate_generator(
        generator, make_llama(), chat_tokenizer, zoo, [task, *UNSEEN], num_examples=4, template=template
    )
    assert report["template"] == "chat"
    losses = {name: row["tasks"][task.name]["loss"] for name, row in report["splits"]["seen"].items()}
    base, prompted = (
        loss_in_chat(make_llama(), chat_tokenizer, task.test, examples) for examples in ((), task.demo[:4])
    )
    assert losses["base"] == pytest.approx(base, rel=1e-3)
    assert losses["few_shot_prompt"] == pytest.approx(prompted, rel=1e-3)
    oracle = loss_in_chat(attached(zoo, task.name), chat_tokenizer, task.test)
    assert losses["task_lora"] == pytest.approx(oracle, rel=1e-3)


def test_adapters_of_one_template_are_scored_in_another(zoo, generator, chat_tokenizer):
    task = SEEN[0]
    report = evaluate_generator(
        generator, make_llama(), chat_tokenizer, zoo, [task, *UNSEEN], num_examples=4, template=DEFAULT_TEMPLATE
    )
    assert report["template"] == DEFAULT_TEMPLATE
    losses = {name: row["tasks"][task.name]["loss"] for name, row in report["splits"]["seen"].items()}
    lines = "".join(f"- {prompt}: {completion}\n" for prompt, completion in task.demo[:4])
    for row, model, context in (
        ("base", make_llama(), ""),
        ("few_shot_prompt", make_llama(), lines),
        ("task_lora", attached(zoo, task.name), ""),  # fitted in chats
    ):
        total, tokens = 0.0, 0
        for prompt, completion in task.test:
            read = chat_tokenizer(f"{context}- {prompt}:")["input_ids"]
            scored = chat_tokenizer(f" {completion}\n", add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[-100] * len(read) + scored])
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([read + scored]), labels=labels).loss.item()
            total, tokens = total + loss * len(scored), tokens + len(scored)
        assert losses[row] == pytest.approx(total / tokens, rel=1e-3)


def test_cards_say_what_form_prompts_have(zoo, generator):
    form = "of the form that the chat template of the base model's tokenizer gives."
    assert f"The adapters expect prompts {form}" in generator_card(generator).text
    assert f"fine-tuned on text {form}" in zoo_card(zoo, repo_id="me/zoo", base_model_name_or_path="user/base").text
    about = {"generator": {"folder": "mine"}, "template": "chat", "made_from": "examples", "refine_steps": 0}
    assert f"It expects prompts {form}" in adapter_card(generator.adapter_config(), {"default": about}).text


def test_without_a_chat_template_nothing_is_begun(tmp_path, zoo, generator, chat_tokenizer):
    plain = copy.deepcopy(chat_tokenizer)
    plain.chat_template = None
    message = "needs a tokenizer with a chat template, and .* has none"
    args = CollectionArguments(output_dir=tmp_path / "out", use_cpu=True, template="chat", on_error="skip")
    with pytest.raises(TaskError, match=message):
        collect_zoo(tmp_path / "zoo", make_llama(), plain, SEEN, LORA, args)
    assert not (tmp_path / "zoo").exists()
    examples = SEEN[0].demo
    for begin in (
        lambda: generator.generate_adapter(make_llama(), processing_class=plain, examples=examples),
        lambda: in_context_adapter(make_llama(), plain, examples, template="chat"),
        lambda: evaluate_generator(generator, make_llama(), plain, zoo, SEEN),
    ):
        with pytest.raises(TaskError, match=message):
            begin()


def test_command_line(tmp_path, chat_tokenizer, capsys):
    base, tasks = save_base_and_tasks(tmp_path, chat_tokenizer)
    zoo, generator, adapter = (str(tmp_path / name) for name in ("zoo", "generator", "adapter"))
    of_zoo, quiet = ["--zoo", zoo, "--tasks", tasks, "--dtype", "float32"], ["--use_cpu", "True"]
    collect = ["collect", "--output_dir", zoo, "--base_model", base, "--tasks", tasks, "--template", "chat"]
    assert main([*collect, "--dtype", "float32", "--max_steps", "2", "--eval_steps", "2", *quiet]) == 0
    assert main(["vectors", *of_zoo, "--num_draws", "2"]) == 0
    train = ["train", *of_zoo, "--output_dir", generator, "--unseen", "shift/4", "--report_to", "none", *quiet]
    assert main([*train, "--hidden_size", "32", "--reconstruction_steps", "2", "--max_steps", "2"]) == 0
    generate = ["generate", "--generator", generator, "--description", "Shift.", "--output_dir", adapter]
    assert main(generate) == 0
    evaluate = ["evaluate", *of_zoo, "--generator", generator, "--num_examples", "4", "--output_dir"]
    for folder, template, expected in (("own", [], "chat"), ("other", ["--template", "Q{prompt}A{completion}"], None)):
        assert main([*evaluate, str(tmp_path / folder), *template]) == 0
        found = read_report(tmp_path / folder / "evaluation.json")["template"]
        assert found == (expected or template[1])
