"""The example scripts and the notebook, as a user runs them, with a tiny base model and tiny tasks as stand-ins."""

import contextlib
import dataclasses
import json
import os
import re
import runpy
import shutil
import sqlite3
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_llama, make_tasks
from hub import Hub
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_icm_lora
from hf_icm_lora import (
    BehaviouralDataset,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraGeneratorTrainingArguments,
    LoraZoo,
    UnfamiliarTaskError,
    load_tasks,
)
from hf_icm_lora.report import read_report

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = ("collect_zoo", "train_generator", "generate_adapter", "evaluate_generator")
UNSEEN = ("shift/5", "shift/6")
QUIET = {"use_cpu": True, "disable_tqdm": True}
SMALL = {"hidden_size": 32, "latent_size": 8, "per_device_train_batch_size": 8, "logging_steps": 1, **QUIET}
COLLECT = {"r": 4, "max_steps": 8, "eval_steps": 4, "num_demonstrations": 3, "num_draws": 4, **QUIET}
# What the notebook asks the built-in suite for.
COUNTRIES = ("finnish", "german", "french", "spanish", "portuguese", "italian", "dutch")
OUR_ARGUMENTS = ("CollectionArguments", "RecipeArguments")


def run(script: str, arguments: dict | list[str]) -> None:
    """Run a script in this process, with arguments from a command line or from one JSON file."""
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(arguments, dict):
            file = Path(arguments["output_dir"]).with_suffix(".json")
            file.write_text(json.dumps(arguments), encoding="utf-8")
            arguments = [str(file)]
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")


def command_line(arguments: dict) -> list[str]:
    lists = {name: value if isinstance(value, list) else [value] for name, value in arguments.items()}
    return [word for name, values in lists.items() for word in (f"--{name}", *map(str, values))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys())


def logs(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder with a base model and a file of samples, and the zoo that `collect_zoo.py` makes of them."""
    folder = tmp_path_factory.mktemp("examples")
    make_llama().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [
        {"task": task.name, "prompt": sample.prompt, "completion": sample.completion, "description": task.description}
        for task in make_tasks(6)
        for sample in (*task.train, *task.demo, *task.test)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(hf_icm_lora, "smollm2_path", lambda: folder / "base")
        run("collect_zoo", {"dataset": str(folder / "samples.jsonl"), "output_dir": str(folder / "zoo"), **COLLECT})
    return folder


@pytest.fixture(scope="module")
def generator(folder):
    """The generator that `train_generator.py` makes, in both stages, with everything that it can do."""
    arguments = {
        "zoo": str(folder / "zoo"),
        "tasks": str(folder / "zoo" / "samples.jsonl"),
        "unseen": list(UNSEEN),
        "output_dir": str(folder / "generator"),
        "reconstruction_steps": 20,
        "max_steps": 60,
        "learning_rate": 3e-2,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_behavioural_loss",
        "early_stopping_patience": 2,
        "report_to": ["tensorboard"],
        **SMALL,
    }
    run("train_generator", arguments)
    return folder / "generator"


# The scripts say how they are run


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_line_of_code_in_a_docstring_is_the_command(name):
    docstring = runpy.run_path(str(EXAMPLES / f"{name}.py"))["__doc__"]
    command = re.search(r"^    (.+)$", docstring, re.MULTILINE)[1]
    assert command.startswith(f"python examples/{name}.py --")
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 220


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_options_in_a_docstring_exist(name):
    module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    commands = re.findall(r"^    python (.+)$", module["__doc__"].replace("\\\n", ""), re.MULTILINE)
    classes = [module[key] for key in ("ScriptArguments", *OUR_ARGUMENTS) if key in module]
    fields = {field.name for one in classes for field in dataclasses.fields(one)}
    assert commands
    for command in commands:
        options = set(re.findall(r" --(\w+)", command))
        assert options
        assert options <= fields


# collect_zoo.py


def test_collected_zoo(folder):
    zoo, tasks = LoraZoo(folder / "zoo"), load_tasks(folder / "zoo" / "samples.jsonl")
    assert list(zoo) == [f"shift/{shift}" for shift in range(1, 7)]
    assert zoo.base_model_name_or_path == str(folder / "base")
    assert zoo.lora_config["r"] == 4
    assert zoo.task_vectors.spec.num_demonstrations == 3
    assert set(zoo.task_vectors.banks) == set(zoo)
    assert [task.name for task in tasks] == list(zoo)
    assert sum(len(task.train) + len(task.demo) + len(task.test) for task in tasks) == 6 * 40
    assert all(task.description for task in tasks)
    for split in ("train", "demo", "test"):  # the same prompts in every task
        assert len({tuple(sample.prompt for sample in getattr(task, split)) for task in tasks}) == 1


def test_the_same_call_collects_what_is_missing(folder, tmp_path):
    rows = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    arguments = {
        "dataset": tmp_path / "samples.jsonl", "base_model": folder / "base", "output_dir": tmp_path / "zoo", **COLLECT
    }  # fmt: skip
    times = []
    for count in (40, 80):
        (tmp_path / "samples.jsonl").write_text("".join(rows[:count]), encoding="utf-8")
        run("collect_zoo", command_line(arguments))
        times.append({file.parent.name: file.stat().st_mtime_ns for file in tmp_path.glob("zoo/adapters/*/task.json")})
    assert [len(one) for one in times] == [1, 2]
    assert times[0].items() <= times[1].items()


# train_generator.py


def test_training_stops_early_and_keeps_the_best_checkpoint(generator):
    evaluations = {row["step"]: row["eval_behavioural_loss"] for row in logs(generator) if "eval_loss" in row}
    best, last = min(evaluations, key=evaluations.get), max(evaluations)
    assert last == min(best + 10, 60)  # two evaluations of five steps
    assert equal(weights(generator), weights(generator / f"checkpoint-{best}"))
    assert last == best or not equal(weights(generator), weights(generator / f"checkpoint-{last}"))
    terms = [row for row in logs(generator) if "loss" in row]
    first, last = (statistics.mean(row["behavioural_loss"] for row in rows) for rows in (terms[:5], terms[-5:]))
    assert last < first
    config = LoraGeneratorModel.from_pretrained(generator).config
    assert set(config.training_tasks) == {f"shift/{shift}" for shift in range(1, 5)}
    assert config.training_runs[-1]["unseen_loss"] == pytest.approx(evaluations[best], rel=1e-5)


def test_tensorboard_gets_all_terms(generator):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stages = {
        generator / "reconstruction": {"reconstruction_loss", "kl", "active_units"},
        generator: {"behavioural_loss"},
    }
    for stage, terms in stages.items():
        values = {}
        for file in (stage / "runs").rglob("events.out.tfevents.*"):
            events = EventAccumulator(str(file)).Reload()
            for tag in events.Tags()["scalars"]:
                values.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
        assert values.keys() >= {"train/loss", *(f"train/{term}" for term in terms)}
        assert ("eval/loss" in values) == (stage == generator)
        for term in terms:
            logged = {row["step"]: row[term] for row in logs(stage) if "loss" in row}
            assert values[f"train/{term}"] == pytest.approx(logged, rel=1e-5)


def test_trackio_gets_all_terms(folder, tmp_path):
    arguments = {
        "zoo": folder / "zoo", "tasks": folder / "zoo" / "samples.jsonl", "output_dir": tmp_path / "generator",
        "reconstruction_steps": 2, "max_steps": 3, "save_strategy": "no",
        "report_to": "trackio", "project": "tests", "run_name": "tiny", **SMALL,
    }  # fmt: skip
    command = [sys.executable, EXAMPLES / "train_generator.py", *command_line(arguments)]
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run(command, env=environment, check=True)
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "tests.db")) as database:
        rows = database.execute("SELECT metrics FROM metrics WHERE run_name = 'tiny' ORDER BY step").fetchall()
    tracked = [row for row in (json.loads(metrics) for (metrics,) in rows) if "train/loss" in row]
    expected = [row for row in logs(tmp_path / "generator") if "loss" in row]
    assert len(expected) == 3
    told = [row["train/behavioural_loss"] for row in tracked]
    assert told == pytest.approx([row["behavioural_loss"] for row in expected])


def test_a_call_after_an_interruption_ends_as_the_whole(folder, tmp_path, capsys):
    arguments = {
        "zoo": str(folder / "zoo"), "tasks": str(folder / "zoo" / "samples.jsonl"), "unseen": list(UNSEEN),
        "output_dir": str(tmp_path / "generator"), "reconstruction_steps": 4, "max_steps": 6, "save_steps": 3, **SMALL,
    }  # fmt: skip
    run("train_generator", arguments)
    whole = weights(tmp_path / "generator")
    for lost, remaining in (("checkpoint-6", 3), ("checkpoint-3", 4 + 6)):  # without any, it starts anew
        for checkpoint in ("checkpoint-6", lost):
            if (tmp_path / "generator" / checkpoint).exists():
                shutil.rmtree(tmp_path / "generator" / checkpoint)
        (tmp_path / "generator" / "model.safetensors").unlink()
        capsys.readouterr()
        run("train_generator", arguments)
        assert capsys.readouterr().out.count("{'loss'") == remaining
        assert equal(weights(tmp_path / "generator"), whole)


def test_two_processes_train_one_generator(folder, tmp_path):
    arguments = {
        "zoo": folder / "zoo", "tasks": folder / "zoo" / "samples.jsonl", "unseen": list(UNSEEN),
        "output_dir": tmp_path / "generator", "reconstruction_steps": 2, "max_steps": 2, "save_strategy": "no",
        **SMALL, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    config = EXAMPLES / "accelerate_configs" / "two_cpu_processes.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [*launch, "--main_process_port", "0", EXAMPLES / "train_generator.py", *command_line(arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    model = LoraGeneratorModel.from_pretrained(tmp_path / "generator")
    assert [run["batch_size"] for run in model.config.training_runs] == [8, 8]
    # Also where the last batch was filled up for the second process.
    tasks = [task for task in load_tasks(folder / "zoo" / "samples.jsonl") if task.name in UNSEEN]
    unseen = BehaviouralDataset(tasks, LoraZoo(folder / "zoo").task_vectors)
    base, tokenizer = (kind.from_pretrained(folder / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    args = LoraGeneratorTrainingArguments(tmp_path / "alone", **QUIET, report_to=[])
    alone = LoraGeneratorTrainer(model, args, base_model=base, processing_class=tokenizer, eval_dataset=unseen)
    expected = alone.evaluate()["eval_behavioural_loss"]
    assert len(unseen) % 8
    assert model.config.training_runs[-1]["unseen_loss"] == pytest.approx(expected, rel=1e-3)  # in bf16


@pytest.mark.parametrize(
    "config", sorted((EXAMPLES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_understands_the_configurations(config):
    loaded = load_config_from_file(str(config))
    words = {"one": 1, "two": 2, "eight": 8}
    number, unit = config.stem.split("_")[:2]
    assert loaded.num_machines == (words[number] if unit == "nodes" else 1)
    assert loaded.num_processes == (8 * words[number] if unit == "nodes" else words[number])


# generate_adapter.py and evaluate_generator.py


def test_generated_adapter_lowers_the_loss(folder, generator, tmp_path, capsys):
    rows = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "examples.jsonl").write_text("".join(rows[:30]), encoding="utf-8")
    arguments = {"examples": tmp_path / "examples.jsonl", "generator": generator, "output_dir": tmp_path / "adapter"}
    run("generate_adapter", command_line(arguments))
    told = capsys.readouterr().out
    before, after = re.search(r"on 8 other examples: ([\d.]+) -> ([\d.]+)", told).groups()
    assert float(after) < float(before) - 0.1
    assert float(re.search(r"gain_on_examples: ([\d.]+)", told)[1]) > 0
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        with model.disable_adapter():
            without = model(ids).logits
        assert not torch.allclose(model(ids).logits, without)


def test_unfamiliar_task_can_be_refused(folder, generator, tmp_path):
    rows = [json.dumps({"prompt": f"{{{i}}}", "completion": "#~@" * 3}) + "\n" for i in range(12)]
    (tmp_path / "examples.jsonl").write_text("".join(rows), encoding="utf-8")
    arguments = {
        "examples": tmp_path / "examples.jsonl", "num_held_out": 0, "generator": generator,
        "output_dir": tmp_path / "adapter",
    }  # fmt: skip
    with pytest.raises(UnfamiliarTaskError, match="larger, by"):
        run("generate_adapter", command_line(arguments | {"on_unfamiliar": "raise"}))
    assert not (tmp_path / "adapter").exists()


def test_adapter_from_a_description_alone(folder, generator, tmp_path, capsys):
    arguments = {"description": "Shift each letter by 9.", "generator": generator, "output_dir": tmp_path / "adapter"}
    run("generate_adapter", command_line(arguments))
    assert "gain_on_examples" not in capsys.readouterr().out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path / "adapter")
    assert any(tensor.abs().max() > 0 for name, tensor in model.named_parameters() if ".lora_B." in name)


def test_evaluation_compares_generators(folder, generator, tmp_path):
    (tmp_path / "evaluate.yaml").write_text(
        f"generator: {generator}\nzoo: {folder / 'zoo'}\ntasks: {folder / 'zoo' / 'samples.jsonl'}\n"
        f"names: [shift/1, shift/2, shift/5]\ncompare_with: [{generator / 'checkpoint-5'}]\nnum_examples: 3\n"
        f"more_rows: [description]\noutput_dir: {tmp_path / 'evaluation'}\n"
    )
    run("evaluate_generator", [tmp_path / "evaluate.yaml"])
    splits = read_report(tmp_path / "evaluation" / "evaluation.json")["splits"]
    assert {split: set(rows["base"]["tasks"]) for split, rows in splits.items()} == {
        "seen": {"shift/1", "shift/2"}, "unseen": {"shift/5"}
    }  # fmt: skip
    losses = {row: splits["seen"][row]["mean_loss"] for row in splits["seen"]}
    assert losses.keys() >= {"description", "checkpoint-5", "few_shot_prompt"}
    assert losses["generated"] < losses["base"]


# To the Hub

CHAIN = """
import runpy, sys
for script, *arguments in {calls!r}:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


def test_each_script_pushes_what_it_made(folder, tmp_path):
    samples = folder / "zoo" / "samples.jsonl"
    pushed = {"push_to_hub": True}
    calls = [
        ("collect_zoo", {"dataset": folder / "samples.jsonl", "base_model": folder / "base",
                         "output_dir": folder / "zoo", "hub_base_model": "user/base", "hub_model_id": "user/zoo",
                         **COLLECT}),
        ("train_generator", {"zoo": folder / "zoo", "tasks": samples, "unseen": list(UNSEEN), "max_steps": 2,
                             "reconstruction_steps": 2, "output_dir": tmp_path / "generator", "save_strategy": "no",
                             "hub_base_model": "user/base", "hub_model_id": "user/generator", **SMALL}),
        ("evaluate_generator", {"generator": tmp_path / "generator", "zoo": folder / "zoo", "tasks": samples,
                                "names": ["shift/1", "shift/5"], "output_dir": tmp_path / "evaluation",
                                "num_examples": 3, "hub_model_id": "user/evaluated"}),
        ("generate_adapter", {"description": "Shift.", "generator": tmp_path / "generator",
                              "base_model": folder / "base", "output_dir": tmp_path / "adapter",
                              "hub_model_id": "user/adapter"}),
    ]  # fmt: skip
    calls = [[str(EXAMPLES / f"{name}.py"), *command_line(arguments | pushed)] for name, arguments in calls]
    with Hub() as hub:
        code = CHAIN.format(calls=calls)
        environment = hub.environment(tmp_path)
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        files = {(kind, name): repo.files() for (kind, name), repo in hub.repos.items()}
    assert files.keys() == {
        ("dataset", "user/zoo"), ("model", "user/generator"), ("model", "user/evaluated"), ("model", "user/adapter")
    }  # fmt: skip
    assert "zoo.json" in files["dataset", "user/zoo"]
    for name in ("user/generator", "user/evaluated"):
        config = json.loads(files["model", name]["config.json"])
        assert config["base_model_name_or_path"] == "user/base"
        assert len(config["training_runs"]) == 2
        assert not [path for path in files["model", name] if path.endswith((".bin", ".pt", ".pth"))]
    assert "few_shot_prompt" in files["model", "user/evaluated"]["README.md"].decode()
    assert "adapter_model.safetensors" in files["model", "user/adapter"]


# The notebook


def notebook() -> dict:
    return json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))


def execute(session: dict) -> None:
    """Run the cells from first to last, but for the installation."""
    for cell in notebook()["cells"]:
        if cell["cell_type"] == "code" and "install" not in cell["metadata"].get("tags", ()):
            exec(compile("".join(cell["source"]), f"quickstart.ipynb, {cell['id']}", "exec"), session)


def test_notebook_is_a_clean_one():
    content = notebook()
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) > 10
    assert all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", one) for one in ids)
    for cell in content["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    text = "".join("".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "markdown")
    assert all((EXAMPLES / name).is_file() for name in re.findall(r"`(\w+\.py)`", text))
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "quickstart.ipynb", "exec")


def test_notebook_runs_from_top_to_bottom(folder, generator, tmp_path, monkeypatch):
    names = [*(f"country_names/{language}" for language in COUNTRIES), "calendar/catalan"]
    suite = [
        dataclasses.replace(task, name=name, family=name.split("/")[0])
        for task, name in zip(make_tasks(len(names)), names, strict=True)
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_icm_lora, "smollm2_path", lambda: folder / "base")
    monkeypatch.setattr(hf_icm_lora, "smollm2_generator_path", lambda: generator)
    monkeypatch.setattr(
        hf_icm_lora, "built_in_tasks", lambda families: [task for task in suite if task.family in families]
    )
    session: dict = {"__name__": "quickstart"}
    execute(session)
    check(session, tmp_path / "build" / "quickstart")
    assert session["losses"]["from examples"] < session["losses"]["base model"] - 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_notebook_on_the_real_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session: dict = {"__name__": "quickstart"}
    execute(session)
    check(session, tmp_path / "build" / "quickstart")
    losses = session["losses"]
    assert losses["from examples"] < 0.7 * losses["base model"]
    assert losses["refined"] < losses["from examples"]
    assert session["own_losses"]["own generator"] < session["own_losses"]["base model"]


def check(session: dict, output_dir: Path) -> None:
    """What must be so with any base model."""
    losses = session["losses"]
    assert losses["without adapter"] == pytest.approx(losses["base model"], rel=1e-6)
    assert losses["loaded again"] == pytest.approx(losses["from both"], rel=5e-3)  # PEFT loads in fp32 beside bf16
    assert len({round(losses[name], 6) for name in ("from examples", "from its description", "from both")}) == 3
    assert (output_dir / "adapters" / "both" / "adapter_model.safetensors").is_file()
    assert not isinstance(session["base"], PeftModel)
    assert len(LoraZoo(output_dir / "zoo")) == 4
    own = LoraGeneratorModel.from_pretrained(output_dir / "generator")
    assert session["unseen_names"][0] not in own.config.training_tasks
    assert session["own_losses"]["own generator"] != pytest.approx(session["own_losses"]["base model"], rel=1e-4)
