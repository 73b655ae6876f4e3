"""The package's own rules: who imports whom, what is public, and what is never called."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_icm_lora

PACKAGE = Path(hf_icm_lora.__file__).parent
ROOT = PACKAGE.parent
SOURCES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*.py"))}
MODULES = sorted(name for name in SOURCES if name != "__init__")
MOST_LINES = 600
LEVELS = [  # a module imports from earlier levels only
    {"errors"},
    {"files", "processes", "products", "provenance", "rivals"},
    {"report", "lora_config"},
    {"model_card"},
    {"hub"},
    {"tasks"},
    {"suite", "smollm2", "completion", "layout"},
    {"base_model", "reading"},
    {"adapter"},
    {"task_vectors", "closed_form"},
    {"configuration_lora_generator", "behaviour", "training_data", "serving"},
    {"zoo", "normalization", "networks", "learned_closed_form"},
    {"generation"},
    {"modeling_lora_generator"},
    {"collection", "importing", "trainer", "evaluation"},
    {"metrics", "plots"},
    {"cli"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
OPTIONAL = ("matplotlib", "gguf", "evaluate", "hypothesis", "pytest")


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports, also inside its functions."""
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_icm_lora"):
            found |= {node.module.split(".")[1]} if "." in node.module else {"__init__"}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hf_icm_lora.")}
    return found


def calls(tree: ast.AST) -> set[str]:
    """What a module calls, as written: `torch.load`, `model.cuda`, `eval`."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_every_module_has_its_level():
    assert set(LEVEL_OF) == set(MODULES)
    assert {node for name in MODULES for node in imports_of(name)} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    upwards = {other for other in imports_of(name) if LEVEL_OF[other] >= LEVEL_OF[name]}
    assert not upwards


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name):
    lines = (PACKAGE / f"{name}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES


def test_trainer_and_generator_know_no_zoo():
    def all_imports(name):
        return imports_of(name) | {deeper for other in imports_of(name) for deeper in all_imports(other)}

    assert "zoo" not in all_imports("trainer")
    assert "zoo" not in all_imports("modeling_lora_generator") | all_imports("training_data")
    assert "modeling_lora_generator" not in all_imports("training_data")
    assert "modeling_lora_generator" not in all_imports("zoo")
    assert "zoo" in all_imports("evaluation")  # the search itself works


def test_all_is_sorted_complete_and_importable():
    public = hf_icm_lora.__all__
    # As ruff's RUF022 sorts: constants, then classes, then the rest.
    assert public == sorted(public, key=lambda name: (name[0].islower(), name))
    assert len(set(public)) == len(public)
    imported = {
        alias.name for node in SOURCES["__init__"].body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(public) == imported
    for name in public:
        assert getattr(hf_icm_lora, name).__module__.startswith("hf_icm_lora.")


def test_version_is_the_same_everywhere():
    setup = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    assert hf_icm_lora.__version__ == setup
    changelog = ROOT / "CHANGELOG.md"
    if changelog.exists():
        top = re.search(
            r"^## \[?v?(\d+\.\d+\.\d+\S*?)\]?(?:\s|$)", changelog.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert hf_icm_lora.__version__ == top[1]


def test_hooks_have_the_versions_that_the_quality_target_has():
    hooks = re.findall(r"(ruff==[\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert len(set(hooks)) == 1
    assert f'"{hooks[0]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_importing_the_package_needs_nothing_optional():
    code = f"import sys, hf_icm_lora, hf_icm_lora.cli; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_unpickled_trusted_or_evaluated(name):
    tree = SOURCES[name]
    called = calls(tree)
    assert not called & {"torch.load", "eval", "exec", "compile", "__import__", "os.system", "builtins.eval"}
    assert not {call for call in called if call.split(".")[0] in ("pickle", "dill", "joblib", "marshal", "shelve")}
    assert not {call for call in called if call.endswith(".cuda")}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert not imported & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell"):
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


def test_the_search_for_forbidden_calls_finds_them():
    assert calls(ast.parse("x.y.cuda(); eval('1'); model.eval(); torch.load('f')")) == {
        "x.y.cuda", "eval", "model.eval", "torch.load"
    }  # fmt: skip


def test_errors_have_a_type_of_the_package_and_a_built_in_one():
    errors = {name: getattr(hf_icm_lora, name) for name in hf_icm_lora.__all__ if name.endswith("Error")}
    drawn = re.findall(r"[├└]── (\w+) ", hf_icm_lora.errors.__doc__)
    assert sorted(drawn) == sorted(errors.keys() - {"IcmLoraError"})
    for name in drawn:
        assert issubclass(errors[name], hf_icm_lora.IcmLoraError)
        assert issubclass(errors[name], (ValueError, RuntimeError, FileExistsError))


@pytest.mark.parametrize("name", MODULES)
def test_no_error_is_raised_without_a_type_of_its_own(name):
    raised = {ast.unparse(node.exc) for node in ast.walk(SOURCES[name]) if isinstance(node, ast.Raise) and node.exc}
    assert {error.partition("(")[0] for error in raised} & {"ValueError", "IcmLoraError", "Exception"} == set()


@pytest.mark.parametrize("name", hf_icm_lora.__all__)
def test_public_names_are_documented(name):
    thing = getattr(hf_icm_lora, name)
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{name}(")  # what dataclasses and named tuples write by themselves
    if inspect.isclass(thing):
        members = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
        methods = {key: getattr(value, "__func__", value) for key, value in members.items()}
        undocumented = [
            key
            for key, value in methods.items()
            if (inspect.isfunction(value) or isinstance(value, property) or hasattr(value, "func"))
            and not value.__doc__
        ]
        assert undocumented == []


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_their_public_functions_are_documented(name):
    assert ast.get_docstring(SOURCES[name])
    for node in SOURCES[name].body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(f"hf_icm_lora.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_some_examples_do_run():
    finder, attempted = doctest.DocTestFinder(), 0
    for name in MODULES:
        for test in finder.find(importlib.import_module(f"hf_icm_lora.{name}")):
            attempted += sum(doctest.SKIP not in example.options for example in test.examples)
    assert attempted >= 5
