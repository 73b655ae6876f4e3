"""The pages of the documentation as programs: their blocks are run, on tiny stand-ins for the real models and tasks.

    python    the blocks of a page one after the other, in one namespace
    bash      between them: `hf-icm-lora` through its `main`; `make`, `pip` and `python` lines must name what there is

`python tests/pages.py PAGE STAND_INS` runs a page in the current folder and prints what failed, for pages that name a
repository of the Hub: the clients read where the Hub is when they are imported.
"""

import dataclasses
import functools
import gc
import json
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers

import hf_icm_lora
from hf_icm_lora import base_model, cli

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "docs" / "source"
BASE_MODEL, ENCODER_DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct", "google-t5/t5-small"  # tiny ones on the stand-in
MOST_STEPS = 4  # of a training
MOST_DRAWS = 2  # of a task vector
SAMPLES = {"train": 16, "demo": 8, "test": 4}  # of a built-in task
NUM_OTHERS = 3  # tasks of a family that the page does not name


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int  # of its first line of code, from 1
    language: str
    code: str


def read(page: str) -> str:
    """Return the text of a page by its path in the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(text: str) -> list[Block]:
    """Return the Python and bash blocks of a page."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = [Block(text[: match.start(2)].count("\n") + 1, match[1], match[2]) for match in found]
    return [block for block in blocks if block.language in ("python", "bash")]


def failures_of(page: str, text: str, expected: Sequence[str] = ()) -> dict[str, str]:
    """Run a page up to the first block that fails, and return where and why it did.

    Blocks that hold one of the `expected` strings must fail: that one of them does not is a failure, too.
    """
    session: dict = {"__name__": "__main__"}
    for block in blocks_of(text):
        known = [string for string in expected if string in block.code]
        where = f"{page}, block at line {block.line}"
        try:
            run_block(page, block, session)
        except (Exception, SystemExit):
            if not known:
                return {where: traceback.format_exc()}
        else:
            if known:
                return {where: f"It runs by now: take {known} from what cannot run yet."}
    return {}


def run_block(page: str, block: Block, session: dict) -> None:
    """Run a block; an error has the page's own line."""
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec"), session)
        return
    for line in re.sub(r"\\\n", " ", block.code).splitlines():
        if words := shlex.split(line, comments=True):
            check_command(words)


def check_command(words: Sequence[str]) -> None:
    """Run `hf-icm-lora`, or check that another command could be run."""
    match words:
        case ["hf-icm-lora", *argv]:
            assert cli.main([*argv, "--traceback"]) == 0
        case ["make", *targets]:
            rules = re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE)
            assert set(targets) <= set(rules), f"The Makefile has no {set(targets) - set(rules)}."
        case ["pip", "install", *rest]:
            for requirement in rest:
                check_requirement(requirement)
        case ["python", "-m", "pytest", *rest]:
            for file in rest:
                if not file.startswith("-"):
                    read(file)
        case ["accelerate", "launch", "--config_file", config, "-m", "hf_icm_lora.cli", command, *rest]:
            read(config)
            unknown = options_of(rest) - {
                f.name for kind in cli.COMMANDS[command][1] for f in dataclasses.fields(kind)
            }
            assert not unknown, f"{command} has no options {unknown}."
        case ["python", "-m", module, *rest]:
            check_command(["python", f"{module.replace('.', '/')}.py", *rest])
        case ["python", script, *rest]:
            source = read(script)
            unknown = {name for name in options_of(rest) if not re.search(rf"^    {name}: ", source, re.MULTILINE)}
            assert not unknown, f"{script} has no options {unknown}."
        case _:
            raise AssertionError(f"Nobody knows how to check {shlex.join(words)!r}.")


def options_of(words: Sequence[str]) -> set[str]:
    return {word.removeprefix("--") for word in words if word.startswith("--")}


def check_requirement(requirement: str) -> None:
    """Check an argument of `pip install`: this package with extras that it has, or a pinned version."""
    name, _, extras = requirement.removesuffix("]").partition("[")
    if name in (".", "hf_icm_lora"):
        unknown = set(filter(None, extras.split(","))) - set(metadata("hf_icm_lora").get_all("Provides-Extra"))
        assert not unknown, f"setup.py has no extras {unknown}."
    elif not requirement.startswith("-"):
        assert requirement in read("constraints.txt").split(), f"constraints.txt has no {requirement}."


def few_tasks(text: str):
    """Return a `built_in_tasks` of a few samples of a few tasks, among them those that a page names."""
    code = "\n".join(block.code for block in blocks_of(text))
    real = functools.cache(hf_icm_lora.built_in_tasks)

    def built_in_tasks(families=None):
        kept = {}
        for task in real(None if families is None else tuple(families)):
            if families is None and task.family not in code:
                continue
            others = kept.setdefault(task.family, [])
            if task.name in code or len(others) < NUM_OTHERS:
                others.append(task)
        return [
            dataclasses.replace(task, **{split: getattr(task, split)[:most] for split, most in SAMPLES.items()})
            for tasks in kept.values()
            for task in tasks
        ]

    return built_in_tasks


def use_stand_ins(patch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """Let blocks import tiny models instead of the real ones, a few samples of a few tasks, and train a few steps."""
    built_in_tasks = few_tasks(text)
    for module in (hf_icm_lora, base_model):
        patch.setattr(module, "smollm2_path", lambda: folder / "base")
    for module in (hf_icm_lora, cli):
        patch.setattr(module, "smollm2_generator_path", lambda: folder / "generator")
        patch.setattr(module, "built_in_tasks", built_in_tasks)

    checked, train = hf_icm_lora.TaskVectorSpec.__post_init__, transformers.Trainer.train

    def few_draws(self):
        object.__setattr__(self, "num_draws", min(self.num_draws, MOST_DRAWS))
        checked(self)

    def few_steps(self, *arguments, **options):
        args = self.args
        if args.max_steps > MOST_STEPS:
            for field in ("eval_steps", "save_steps", "logging_steps"):
                if (getattr(args, field) or 0) >= 1:
                    setattr(args, field, max(1, int(getattr(args, field) * MOST_STEPS / args.max_steps)))
        if not 0 < args.max_steps <= MOST_STEPS:
            args.max_steps = MOST_STEPS
        return train(self, *arguments, **options)

    patch.setattr(hf_icm_lora.TaskVectorSpec, "__post_init__", few_draws)
    patch.setattr(transformers.Trainer, "train", few_steps)


def local_only(event: str, arguments: tuple) -> None:
    """Audit hook: no client may reach another machine."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        assert arguments[1][0] == "127.0.0.1", f"A client tried to connect to {arguments[1]}."


def main() -> None:
    page, stand_ins, *expected = sys.argv[1:]
    sys.addaudithook(local_only)
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        use_stand_ins(patch, Path(stand_ins), read(page))
        failures = failures_of(page, read(page), expected)
    print("\n" + json.dumps(failures))


if __name__ == "__main__":
    main()
