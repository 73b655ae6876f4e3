"""The command line: the whole chain through `main`, and errors in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SEEN, UNSEEN, make_llama, make_tasks, save_base_and_tasks
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_icm_lora import LoraGeneratorModel, LoraZoo, ZooError, load_adapter, save_tasks
from hf_icm_lora.cli import COMMANDS, main
from hf_icm_lora.evaluation import MORE_ROWS, descriptions
from hf_icm_lora.report import read_report

SMALL = ["--hidden_size", "32", "--latent_size", "8", "--reconstruction_steps", "3", "--max_steps", "4", "--dtype",
         "float32", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True", "--use_cpu", "True",
         ]  # fmt: skip


def train(folder, output_dir, *more):
    """Train with `SMALL` options; later ones win."""
    options = ["--zoo", str(folder / "zoo"), "--tasks", str(folder / "tasks.jsonl"), "--output_dir", str(output_dir)]
    return main(["train", *options, *SMALL, *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder with a base model, tasks, and all that the commands make of them."""
    folder = tmp_path_factory.mktemp("cli")
    base, tasks = save_base_and_tasks(folder, tokenizer)
    zoo, generator = str(folder / "zoo"), str(folder / "generator")
    (folder / "examples.jsonl").write_text('{"prompt": "ab", "completion": "bc"}\n\n["xy", "yz"]\n')
    collect = [
        "collect",
        "--output_dir",
        zoo,
        "--base_model",
        base,
        "--tasks",
        tasks,
        "--dtype",
        "float32",
        "--r",
        "4",
    ]
    assert main([*collect, "--max_steps", "8", "--eval_steps", "4", "--use_cpu", "True"]) == 0
    vectors = ["vectors", "--zoo", zoo, "--tasks", tasks, "--num_demonstrations", "4", "--min_demonstrations", "2"]
    assert main([*vectors, "--num_draws", "3", "--dtype", "float32"]) == 0
    assert train(folder, generator, "--unseen", *UNSEEN) == 0
    generate = ["generate", "--generator", generator, "--examples", str(folder / "examples.jsonl")]
    assert main([*generate, "--description", "Shift.", "--output_dir", str(folder / "adapter")]) == 0
    evaluate = ["evaluate", "--generator", generator, "--zoo", zoo, "--tasks", tasks, "--num_examples", "4"]
    assert main([*evaluate, "--output_dir", str(folder / "evaluation")]) == 0
    return folder


def fails(capsys, *argv):
    """Run a command that must fail, and return its one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"hf-icm-lora {argv[0]}: ")
    return error


# The chain


def test_collected_zoo(folder):
    zoo = LoraZoo(folder / "zoo")
    assert list(zoo) == [*SEEN, *UNSEEN]
    assert zoo.base_model_name_or_path == str(folder / "base")
    assert zoo.lora_config["r"] == 4
    assert zoo.lora_config["lora_alpha"] == 16
    assert zoo.lora_config["task_type"] == "CAUSAL_LM"


def test_vectors_of_all_tasks(folder):
    vectors = LoraZoo(folder / "zoo").task_vectors
    assert sorted(vectors.banks) == [*SEEN, *UNSEEN]
    spec = vectors.spec
    assert (spec.num_demonstrations, spec.min_demonstrations, spec.num_draws, spec.layers) == (4, 2, 3, (1, 2))


def test_trained_generator_is_json_and_safetensors(folder):
    assert {path.name for path in (folder / "generator").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "reconstruction", "trainer_state.json"
    }  # fmt: skip
    generator = LoraGeneratorModel.from_pretrained(folder / "generator")
    assert generator.config.training_tasks == SEEN
    assert generator.config.hidden_size == 32
    assert [run["steps"] for run in generator.config.training_runs] == [3, 4]


def test_tasks_without_a_lora_take_part(folder, tmp_path, capsys):
    save_tasks(make_tasks(6), tmp_path / "more.jsonl")
    assert train(folder, tmp_path / "more", "--unseen", *UNSEEN, "--tasks", str(tmp_path / "more.jsonl")) == 0
    generator = LoraGeneratorModel.from_pretrained(tmp_path / "more")
    assert sorted(generator.config.training_tasks) == [*SEEN, "shift/5", "shift/6"]
    error = fails(capsys, "train", "--zoo", folder / "zoo", "--tasks", folder / "tasks.jsonl", "--unseen", "shift/9")
    assert "--unseen: ['shift/9'] not found among the 4 tasks" in error


def test_same_seed_trains_the_same_generator(folder, tmp_path):
    """Also from its first weights on, which are drawn before the Trainer exists."""
    for name, seed in (("one", "1"), ("other", "2"), ("again", "1")):
        torch.rand(3)
        assert train(folder, tmp_path / name, "--seed", seed) == 0
    one, other, again = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other", "again"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_training_reports_unseen_tasks_and_resumes(folder, tmp_path, capsys):
    more = ("--unseen", *UNSEEN, "--save_strategy", "steps", "--save_steps", "2")
    capsys.readouterr()
    assert train(folder, tmp_path / "out", *more, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["training_runs"][-1]["unseen_loss"] > 0
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    assert train(folder, tmp_path / "resumed", *more, "--resume_from_checkpoint", checkpoint) == 0
    assert f"loss of unseen tasks: {told['training_runs'][-1]['unseen_loss']:.4f} nats" in capsys.readouterr().out
    assert train(folder, tmp_path / "out", *more, "--resume_from_checkpoint", "True") == 0  # the last one
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapter_for_another_base_model_is_read_by_peft(folder, tokenizer, tmp_path):
    """The closed form writes it, in a layout of its own."""
    other = tmp_path / "other"
    make_llama(seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    argv = ["--generator", str(folder / "generator"), "--examples", str(folder / "examples.jsonl")]
    argv += ["--fit_scale", "False", "--base_model", str(other), "--out", str(tmp_path / "adapter")]
    assert main(["generate", *argv]) == 0
    model = PeftModel.from_pretrained(make_llama(seed=1), tmp_path / "adapter")
    assert set(model.peft_config["default"].target_modules) == {"down_proj"}
    assert any(tensor.any() for name, tensor in model.state_dict().items() if "lora_B" in name)


def test_generated_adapter_is_refined_on_the_examples(folder, tmp_path):
    argv = ["generate", "--generator", str(folder / "generator"), "--examples", str(folder / "examples.jsonl")]
    more = ["--no_fit_scale", "--refine_steps", "2", "--dtype", "float32"]
    assert main([*argv, *more, "--out", str(tmp_path / "adapter")]) == 0
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = LoraGeneratorModel.from_pretrained(folder / "generator").generate_adapter(
        base,
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        examples=[("ab", "bc"), ("xy", "yz")],
        fit_scale=False,
        refine_steps=2,
    )
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in found)


def test_generated_adapter_is_read_by_peft(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, folder / "adapter")
        after = model(ids).logits
    assert not torch.allclose(before, after)
    lora_config, state_dict = load_adapter(folder / "adapter")
    assert lora_config["base_model_name_or_path"] == str(folder / "base")
    assert len(state_dict) == 8


def test_adapter_of_a_description_alone(folder, tmp_path, capsys):
    generate = ["generate", "--generator", str(folder / "generator"), "--description", "Shift each letter by 9."]
    assert main([*generate, "--output_dir", str(tmp_path / "adapter")]) == 0
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "adapter"))
    one, other = (load_adapter(path / "adapter")[1] for path in (folder, tmp_path))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_evaluation_report(folder):
    report = read_report(folder / "evaluation" / "evaluation.json")
    assert {split: sorted(rows["base"]["tasks"]) for split, rows in report["splits"].items()} == {
        "seen": SEEN, "unseen": UNSEEN
    }  # fmt: skip
    assert report["num_examples"] == 4
    assert "| generated |" in (folder / "evaluation" / "evaluation.md").read_text()


def test_env_names_versions(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(f"- {name}: " in out for name in ("platform", "python", "hf_icm_lora", "torch", "peft", "device"))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ev"], {"evaluate"}),
        ([""], set(COMMANDS)),
        (["generate", "--exa"], {"--examples"}),
        (["train", "--zoo", "x", "--prio"], {"--prior"}),
        (["vectors", "--exa"], set()),
    ],
)
def test_completion_in_bash(capsys, words, found):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    typed = " ".join(f"'{word}'" for word in ["hf-icm-lora", *words])
    ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _hf_icm_lora; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    ran = subprocess.run(["bash", "--norc", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert set(ran.stdout.split()) == found
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == f"autoload -U +X bashcompinit && bashcompinit\n{script}"


# Wrong command lines


@pytest.mark.parametrize(
    "argv",
    [
        [], ["nonsense"], ["--traceback"], ["--"], ["env", "more"], ["env", "--nothing"],
        ["vectors", "--unknown", "1"], ["train", "--hidden_size", "wide"], ["generate", "--dtype", "float8"],
        ["collect", "--r"],
    ],
)  # fmt: skip
def test_wrong_command_line_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: hf-icm-lora" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    assert "usage: hf-icm-lora" in capsys.readouterr().out


def test_help_says_what_the_further_rows_are(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert all(f"{row}: {text}" in help_text for row, text in descriptions(MORE_ROWS).items())


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("collect", "(default: smollm2)"),
        ("vectors", "By default the zoo's."),
        ("evaluate", "By default the zoo's."),
        ("generate", "By default the generator's."),
    ],
)
def test_help_says_which_base_model_is_the_default(command, default, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert default in text[text.index("Path or Hub id of the base model") :][:130]


# Errors


def test_missing_things_are_said_in_one_line(folder, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    for command in ("vectors", "train", "evaluate"):
        more = ["--generator", folder / "generator"] if command == "evaluate" else []
        assert "is not a zoo" in fails(capsys, command, "--zoo", nowhere, *more)
    assert "nowhere" in fails(capsys, "generate", "--generator", nowhere)
    assert "nowhere" in fails(capsys, "evaluate", "--zoo", folder / "zoo", "--generator", nowhere)
    tasks = ("--tasks", folder / "tasks.jsonl")
    assert "nowhere" in fails(capsys, "collect", "--output_dir", tmp_path / "zoo", "--base_model", nowhere, *tasks)
    assert "nowhere" in fails(capsys, "vectors", "--zoo", folder / "zoo", "--tasks", nowhere)
    error = fails(capsys, "generate", "--generator", folder / "generator", "--examples", nowhere)
    assert "No such file" in error


def test_unknown_names_are_said_in_one_line(folder, capsys):
    zoo_and_tasks = ("--zoo", folder / "zoo", "--tasks", folder / "tasks.jsonl")
    assert "--names: ['lost'] not found" in fails(capsys, "vectors", *zoo_and_tasks, "--names", "lost")
    assert "--families: ['lost'] not found" in fails(capsys, "vectors", *zoo_and_tasks, "--families", "lost")


def test_vectors_need_all_tasks_of_the_zoo(folder, tmp_path, capsys):
    before = (folder / "zoo" / "task_vectors.safetensors").read_bytes()
    save_tasks(make_tasks(3), tmp_path / "few.jsonl")
    for more in (["--tasks", tmp_path / "few.jsonl"], ["--tasks", folder / "tasks.jsonl", "--names", *SEEN]):
        error = fails(capsys, "vectors", "--zoo", folder / "zoo", *more)
        assert "leave 3 of the zoo's 4 tasks" in error
        assert "there is no shift/4" in error
    assert (folder / "zoo" / "task_vectors.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("hidden_size", "33", "no multiple of 4 heads"), ("prior", "none at all", "expected one of"),
     ("latent_size", "0", "from 1 to 65536"), ("lr_scheduler_type", "sideways", "sideways")],
)  # fmt: skip
def test_bad_values_are_said_in_one_line(folder, tmp_path, capsys, option, value, message):
    tasks = ("--tasks", folder / "tasks.jsonl")
    argv = ("train", "--zoo", folder / "zoo", *tasks, "--output_dir", tmp_path / "out", *SMALL, f"--{option}", value)
    assert message in fails(capsys, *argv)


def test_truncated_generator_is_said_in_one_line(folder, tmp_path, capsys):
    shutil.copy(folder / "generator" / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "generator" / "model.safetensors").read_bytes()[:1000])
    fails(capsys, "generate", "--generator", tmp_path, "--description", "Shift.")


def test_adapter_is_never_overwritten(folder, capsys):
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    argv = ("--generator", folder / "generator", "--description", "Shift.", "--output_dir", folder / "adapter")
    assert "exists already" in fails(capsys, "generate", *argv)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_what_cannot_be_pushed_is_said_before_anything_is_uploaded(folder, tmp_path, capsys):
    evaluation = ("--evaluation", folder / "evaluation")
    assert "no folder of a generator" in fails(capsys, "push", tmp_path, "user/it")
    assert "--evaluation goes with a generator" in fails(capsys, "push", folder / "zoo", "user/it", *evaluation)
    bare = shutil.copytree(folder / "generator", tmp_path / "bare")
    (bare / "README.md").unlink()
    error = fails(capsys, "push", bare, "user/it", "--base_model", "user/base", *evaluation)
    assert "has no README.md to put the evaluation into: save the generator again" in error


def test_gguf_of_an_adapter_that_names_no_base_model(folder, tmp_path, capsys):
    nameless = shutil.copytree(folder / "adapter", tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    error = fails(capsys, "export", nameless, "--format", "gguf", "--output", tmp_path / "it.gguf")
    assert "names no base model: pass --base_model" in error
    assert not (tmp_path / "it.gguf").exists()


def test_traceback_on_demand(tmp_path):
    with pytest.raises(ZooError, match="is not a zoo"):
        main(["--traceback", "vectors", "--zoo", str(tmp_path)])
    with pytest.raises(ZooError, match="is not a zoo"):
        main(["vectors", "--zoo", str(tmp_path), "--traceback"])


def test_debug_is_the_option_of_training_arguments(tmp_path, capsys):
    assert "is not a zoo" in fails(capsys, "train", "--zoo", tmp_path, "--debug", "underflow_overflow")
    with pytest.raises(SystemExit):
        main(["train", "--debug", "upside_down"])
    assert "invalid DebugOption value: 'upside_down'" in capsys.readouterr().err


def test_options_are_not_read_from_a_file_beside_the_program(tmp_path, monkeypatch):
    """`HfArgumentParser` would, by default."""
    (tmp_path / "hf-icm-lora.args").write_text("--nothing 1")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "hf-icm-lora"), "env"])
    assert main() == 0


# Several commands in one process, which imports everything once. Each line of output begins with its command.
LAUNCHED = """
import contextlib, io, os, runpy, sys
import hf_icm_lora

def run(command, *arguments):
    sys.argv, out = ["hf-icm-lora", command, *arguments], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_module("hf_icm_lora.cli", run_name="__main__")
        except SystemExit as end:
            assert not end.code, command
    print("".join(f"{{command}} {{line}}\\n" for line in out.getvalue().splitlines()), end="", flush=True)

collect, *others = {commands!r}
if child := os.fork():  # a process that collects leaves its group, for good
    assert os.waitpid(child, 0)[1] == 0
    for command in others:
        run(*command)
else:
    run(*collect)
"""


@pytest.fixture(scope="module")
def launched(folder, tmp_path_factory):
    """The zoo and the report that two processes of `accelerate launch` make together, as in `folder`."""
    own = tmp_path_factory.mktemp("launched")
    zoo, tasks = str(own / "zoo"), str(folder / "tasks.jsonl")
    config = Path(__file__).parent.parent / "examples" / "accelerate_configs" / "two_cpu_processes.yaml"
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    start += ["--main_process_port", "0", str(own / "commands.py")]
    steps = ["--max_steps", "8", "--eval_steps", "4", "--use_cpu", "True"]
    draws = ["--num_demonstrations", "4", "--min_demonstrations", "2", "--num_draws", "3"]
    scored = ["--zoo", str(folder / "zoo"), "--generator", str(folder / "generator"), "--num_examples", "4"]
    commands = [
        ["collect", "--output_dir", zoo, "--base_model", str(folder / "base"), "--r", "4", *steps],
        ["vectors", "--zoo", zoo, *draws],
        ["evaluate", *scored, "--output_dir", str(own / "evaluation")],
    ]
    commands = [[*command, "--tasks", tasks, "--dtype", "float32", "--json"] for command in commands]
    (own / "commands.py").write_text(LAUNCHED.format(commands=commands))
    result = subprocess.run(start, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    told = {}
    for line in result.stdout.splitlines():
        command, _, figures = line.partition(" ")
        told.setdefault(command, []).append(json.loads(figures))
    alone = ["--output_dir", str(own / "alone"), "--tasks", tasks, "--dtype", "float32"]
    assert main(["evaluate", *scored, *alone]) == 0
    return own, told


def test_launched_processes_share_the_tasks_of_a_collection(folder, launched):
    own, told = launched
    alone = LoraZoo(folder / "zoo")
    assert [process["tasks"] for process in told["collect"]] == [list(alone)] * 2  # each ends when all is there
    for path in alone.path.rglob("*.safetensors"):
        if path.name != "task_vectors.safetensors":
            assert (own / "zoo" / path.relative_to(alone.path)).read_bytes() == path.read_bytes()


def test_launched_processes_share_the_tasks_of_vectors(folder, launched):
    own, told = launched
    assert len(told["vectors"]) == 1  # the first process alone writes and tells
    banks, alone = LoraZoo(own / "zoo").task_vectors.banks, LoraZoo(folder / "zoo").task_vectors.banks
    assert list(banks) == list(alone)
    for name, modes in alone.items():
        for mode, bank in modes.items():
            assert torch.allclose(banks[name][mode], bank, atol=1e-4)


def test_launched_processes_share_the_tasks_of_an_evaluation(launched):
    own, told = launched
    (told,) = told["evaluate"]
    alone = json.loads((own / "alone" / "evaluation.json").read_text(encoding="utf-8"))
    assert told["splits"] == json.loads((own / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["splits"]
    for split, rows in alone["splits"].items():
        for row, summary in rows.items():
            assert list(told["splits"][split][row]["tasks"]) == list(summary["tasks"])
            assert told["splits"][split][row]["mean_loss"] == pytest.approx(summary["mean_loss"], rel=1e-5)
