"""The Space in examples/space: what it does with a task, and once in a browser what a user sees of it."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import SIZES, make_llama
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM

from hf_icm_lora import (
    GenerationRecord,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    TaskError,
    load_adapter,
)

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "examples" / "space"
SHIFT_1 = "ab => bc\ncd => de\nef => fg\ngh => hi\nij => jk"
SHIFT_2 = "ab => cd\ncd => ef\nef => gh\ngh => ij\nij => kl"

PAGE_FACTS = """
import json, os, app
page = app.build()
events = [event for event in page.fns.values() if event.fn is app.write_adapter]
print(json.dumps({"analytics": page.analytics_enabled, "history": os.environ["GRADIO_RUN_HISTORY"],
                  "seconds": page.delete_cache[1], "at_once": [event.concurrency_limit for event in events]}))
"""


@pytest.fixture(scope="module")
def models(world, tokenizer):
    """A generator, its base model and tokenizer, as `load` gives them, and the folder of the base model."""
    torch.manual_seed(0)
    generator = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(world.zoo, **SIZES)).eval()
    generator.fit_normalizer(world.zoo.as_dataset())
    generator.zoo_normalizer.weight_scale.mul_(100)  # untrained, but its adapters change what the base model says
    path = world.folder / "base"
    return generator, LlamaForCausalLM.from_pretrained(path), tokenizer, path


@pytest.fixture
def generation(models, monkeypatch):
    """The plain functions, with the tiny models."""
    *loaded, base_path = models
    monkeypatch.syspath_prepend(SPACE)
    import generation

    monkeypatch.setattr(generation, "load", lambda: loaded)
    monkeypatch.setattr(generation, "BASE_MODEL", str(base_path))
    return generation


@pytest.fixture
def app(generation):
    """The page, without a server."""
    pytest.importorskip("gradio", reason="needs `pip install .[space]`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Gradio about its own code
        import app
    return app


def is_bare(model) -> bool:
    return not any(isinstance(module, LoraLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("France => Paris\nJapan => Tokyo", [("France", "Paris"), ("Japan", "Tokyo")]),
        ("\n  France  =>  Paris  \n\n", [("France", "Paris")]),
        ("New York\tUnited States\r\nRome\tItaly", [("New York", "United States"), ("Rome", "Italy")]),
        ("x => y => z", [("x", "y => z")]),
        ("a=>b", [("a", "b")]),
        ("", []),
        (" \n\n", []),
    ],
)
def test_examples_are_read_line_by_line(generation, text, samples):
    assert generation.read_examples(text) == samples


@pytest.mark.parametrize("text", ["France: Paris", "a => b\nFrance =>", "=> Paris", "a -> b"])
def test_a_line_that_is_no_example_is_named(generation, text):
    with pytest.raises(TaskError, match="'prompt => completion' on each line, found "):
        generation.read_examples(text)


@pytest.mark.parametrize(
    ("description", "examples", "query", "message"),
    [
        ("", "", "ab", "Give a few examples, or say in a sentence"),
        ("  ", " \n", "ab", "Give a few examples, or say in a sentence"),
        ("Shift.", "", " ", "Write a query"),
        ("Shift.", "ab", "ab", "found 'ab'"),
        ("Shift.", "a => b\n" * 1000, "ab", "4000 characters"),
    ],
)
def test_input_that_cannot_be_used_is_refused_in_a_sentence(
    generation, tmp_path, description, examples, query, message
):
    with pytest.raises(TaskError, match=message) as error:
        generation.generate(description, examples, query, tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("description", "examples"), [("", SHIFT_1), ("Shift by 1.", ""), ("Shift by 1.", SHIFT_1)])
def test_an_adapter_changes_the_answer_and_leaves_the_base_model_as_it_was(
    generation, models, tmp_path, description, examples
):
    result = generation.generate(description, examples, "zz", tmp_path)
    assert result.before != result.after
    assert is_bare(models[1])
    again = generation.generate(description, examples, "zz", tmp_path / "again")
    assert again[:3] == result[:3]


def test_the_archive_is_a_peft_folder_and_the_snippet_gives_the_same_answer(generation, tmp_path, monkeypatch, capsys):
    result = generation.generate("Shift by 1.", SHIFT_1, "zz", tmp_path)
    with zipfile.ZipFile(result.archive) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        archive.extractall(tmp_path / "unpacked")
    assert names == {f"adapter/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")}
    load_adapter(tmp_path / "unpacked" / "adapter")
    monkeypatch.chdir(tmp_path / "unpacked")
    exec(result.snippet, {})
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("- zz:")
    assert printed.removeprefix("- zz:").strip() == result.after


def test_users_at_the_same_time_get_their_own_adapters(generation, tmp_path):
    def weights(number):
        examples = (SHIFT_1, SHIFT_2)[number % 2]
        result = generation.generate("", examples, "zz", tmp_path / f"{started}-{number}")
        return result[:3], load_adapter(result.archive.with_suffix(""))[1]

    started = "alone"
    alone = [weights(number) for number in range(2)]
    assert any(not torch.equal(alone[0][1][key], alone[1][1][key]) for key in alone[0][1])
    started = "together"
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(weights, range(8)))
    for number, (texts, tensors) in enumerate(together):
        assert texts == alone[number % 2][0]
        assert all(torch.equal(tensors[key], alone[number % 2][1][key]) for key in tensors)


def test_after_a_failure_the_next_user_is_served(generation, models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.save_pretrained", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generation.generate("", SHIFT_1, "zz", tmp_path)
    assert is_bare(models[1])
    assert generation.generate("", SHIFT_1, "zz", tmp_path).archive.exists()


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"gain_on_examples": 0.8, "scale": 1.0}, ("takes away 80%", "it was not fitted", "it may still")),
        ({"gain_on_examples": 0.1, "scale": 0.5}, ("only its strength was fitted, 50%", "little elsewhere")),
        ({"gain_on_examples": 0.0, "scale": 0.0}, ("0.00", "would do harm")),
        ({}, ("not known",)),
    ],
)
def test_what_is_known_is_said_in_words(generation, about, expected):
    told = generation.in_words(GenerationRecord({"folder": "x"}, "{prompt} {completion}", "examples", **about))
    assert all(part in told for part in expected)


def test_the_snippet_names_the_class_and_the_base_model(generation, models):
    config, tokenizer = models[1].config, models[2]
    packaged = generation.write_snippet("smollm2", tokenizer, "8 o'clock", "- {prompt}: {completion}\n", config)
    assert "name = smollm2_path()" in packaged
    ast.parse(packaged)
    config = type(config)(**config.to_dict() | {"is_encoder_decoder": True})
    other = generation.write_snippet("user/base", tokenizer, "x", "{prompt} {completion}", config)
    assert "name = 'user/base'" in other
    assert "AutoModelForSeq2SeqLM.from_pretrained(name)" in other
    assert "stop_strings" not in other
    ast.parse(other)


def test_a_query_can_be_a_turn_of_a_chat(generation, chat_tokenizer):
    read, end = generation.prompt_and_end(chat_tokenizer, "an answer", "chat")
    chat = [{"role": "user", "content": "an answer"}]
    assert read == chat_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert end == "<|im_end|>"
    snippet = generation.write_snippet("user/base", chat_tokenizer, "x", "chat", make_llama().config)
    assert 'return_tensors="pt", add_special_tokens=False)' in snippet  # it has them already
    ast.parse(snippet)


def test_the_base_model_is_that_of_the_generator_unless_another_is_named(generation, models, monkeypatch):
    generator = models[0]
    assert generation.base_model_name(generator) == str(models[3])
    monkeypatch.setattr(generation, "BASE_MODEL", None)
    assert generation.base_model_name(generator) == "smollm2"
    monkeypatch.setattr(generation, "GENERATOR", "user/generator")
    assert generation.base_model_name(generator) == generator.config.base_model_name_or_path


def test_the_card_is_one_that_the_hub_takes():
    from huggingface_hub import SpaceCard

    data = SpaceCard.load(SPACE / "README.md").data
    assert (data.sdk, data.app_file, data.license) == ("gradio", "app.py", "apache-2.0")
    assert len(data.to_dict()["short_description"]) <= 60
    assert (SPACE / data.app_file).is_file()
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={data.sdk_version}" in constraints


def test_the_requirements_are_those_of_the_package():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("INSTALL_REQUIRES", "EXTRAS")
    }
    gguf = [requirement for requirement in lists["EXTRAS"]["demo"] if requirement.startswith("gguf")]
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == sorted(lists["INSTALL_REQUIRES"] + gguf)


# The page


def test_the_tasks_to_try_can_be_used(app, generation):
    for description, examples, query in app.EXAMPLES.values():
        samples = generation.read_examples(examples)
        assert description or samples
        assert query not in dict(samples)
        assert len(description + examples + query) < generation.MAX_CHARACTERS


def test_files_are_there_while_gradio_copies_them_and_gone_after_that(app):
    results = app.write_adapter("", SHIFT_1, "zz")
    before, after, told, _, archive, snippet = next(results)
    assert before != after
    assert "Novelty" in told
    assert "PeftModel" in snippet
    assert archive.is_file()
    with pytest.raises(StopIteration):
        next(results)
    assert not archive.parent.exists()


def test_errors_of_the_package_become_a_sentence_on_the_page(app):
    with pytest.raises(app.gr.Error, match="Give a few examples, or say in a sentence what the task is.") as error:
        next(app.write_adapter("", "", "zz"))
    assert error.value.__suppress_context__


def test_the_page_sends_nothing_keeps_nothing_and_lets_one_user_at_a_time_to_the_model():
    pytest.importorskip("gradio", reason="needs `pip install .[space]`")
    # In a process of its own, since Gradio leaves event loops open.
    result = subprocess.run([sys.executable, "-c", PAGE_FACTS], cwd=SPACE, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "analytics": False, "history": "False", "seconds": 600, "at_once": [1]
    }  # fmt: skip


# The browser


@pytest.fixture
def address(tmp_path):
    """Where the app runs with the shipped generator, in a process of its own."""
    pytest.importorskip("gradio", reason="needs `pip install .[space]`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_TEMP_DIR": str(tmp_path)}
    environment = {key: value for key, value in os.environ.items() if key not in ("GENERATOR", "BASE_MODEL")}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, SPACE / "app.py"], env=environment | more, stdout=log, stderr=log, cwd=tmp_path
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=60).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, 1280 x 900."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs `pip install .[space]`")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    view = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    try:
        yield browser
    finally:
        browser.quit()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_user_types_a_task_and_gets_an_answer_and_an_adapter(address, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(condition, seconds=60):
        return WebDriverWait(browser, seconds).until(condition)

    def field(label):
        found = f"//label[.//span[contains(., '{label}')]]//*[self::textarea or self::input]"
        return wait(lambda browser: browser.find_element(By.XPATH, found))

    def button(text):
        return wait(lambda browser: browser.find_element(By.XPATH, f"//button[contains(., '{text}')]"))

    def says(text):
        return lambda browser: text in browser.find_element(By.TAG_NAME, "body").text

    browser.implicitly_wait(5)
    browser.get(address)
    button("Write the adapter").click()
    wait(says("Give a few examples, or say in a sentence what the task is."))
    assert "Traceback" not in browser.find_element(By.TAG_NAME, "body").text

    button("Infinitives").click()
    wait(lambda _: "accept => to accept" in field("Examples").get_property("value"))
    field("Examples").send_keys("\ncarry => to carry\nbuild => to build")
    field("Query").clear()
    field("Query").send_keys("understand")
    button("Write the adapter").click()
    wait(says("Novelty"), 600)
    assert field("With the adapter").get_property("value") == "to understand"
    assert field("Answer of the base model").get_property("value") != "to understand"
    assert says("Nearest known task")(browser)
    assert says("Gain on examples")(browser)
    assert says("PeftModel.from_pretrained(base")(browser)

    button("Download the adapter").click()
    wait(lambda _: (tmp_path / "adapter.zip").exists())
    shutil.unpack_archive(tmp_path / "adapter.zip", tmp_path)
    lora_config, tensors = load_adapter(tmp_path / "adapter")
    assert lora_config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len(tensors) == 2 * 2 * 30

    wait(lambda browser: not browser.find_elements(By.CLASS_NAME, "toast-body"))
    (ROOT / "build").mkdir(exist_ok=True)
    browser.save_screenshot(str(ROOT / "build" / "space.png"))

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    elsewhere = [url for url in urls if not url.startswith((address, "data:", "blob:", "chrome:", "about:"))]
    assert elsewhere == []
