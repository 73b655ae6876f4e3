"""Small changes to the code, one at a time, which a test should notice: how much do the tests see?

    pip install mutmut==3.8.1
    python fuzz/mutants.py build/mutants files layout
    python fuzz/mutants.py build/mutants-2 adapter zoo --names "*[05]"   # every fifth, by the end of its number

Makes the mutants in a copy of the repository, runs the tests of their module against each and prints those that
survive. A mutant that hangs was noticed. Interrupted, the same call goes on.
"""

import argparse
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {
    "files": ["files", "faults"],
    "layout": ["layout", "faults"],
    "lora_config": ["lora_config", "layout", "faults"],
    "adapter": ["adapter", "faults"],
    "zoo": ["zoo", "faults"],
}
# Exit codes of a mutant's tests; 255 is an error of mutmut.
VERDICTS = {None: "not tried", 0: "survived", 33: "not covered", 255: "not run", 24: "hung", -24: "hung"}
CONFIG = """
[tool.mutmut]
source_paths = ["hf_icm_lora"]
only_mutate = {modules}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-x"]
also_copy = {others}
process_isolation = "forkserver"
timeout_constant = 5.0
"""
# mutmut asks for tests by their names in another process: names with addresses, or with all of Unicode, are not found.
IDS = """

def pytest_make_parametrize_id(config, val, argname):
    import hashlib
    import re

    text = re.sub("0x[0-9a-f]+", "", argname + repr(val)[:300])
    return "x" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
"""


def copy_repository(folder: Path, modules: list[str]) -> None:
    """Copy what is committed, in a form that mutmut can change."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    for module in modules:  # of decorated functions mutmut changes none
        path = folder / "hf_icm_lora" / f"{module}.py"
        path.write_text(without_decorators(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in (folder / "tests").glob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        source = re.sub(r",\s*ids=(str|ascii|[A-Z]{5,}|lambda [^,\n]*?\])(?=[,)])", "", source)
        path.write_text(source, encoding="utf-8")
    with (folder / "tests" / "conftest.py").open("a", encoding="utf-8") as file:
        file.write(IDS)
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        tests = sorted({f"tests/test_{name}.py" for module in modules for name in TESTS[module]})
        others = sorted(path.name for path in folder.iterdir() if path.name not in (".git", "hf_icm_lora", "tests"))
        paths = [f"hf_icm_lora/{module}.py" for module in modules]
        file.write(CONFIG.format(modules=json.dumps(paths), tests=json.dumps(tests), others=json.dumps(others)))


def without_decorators(source: str) -> str:
    """Write `@contextmanager def f` as `def plain_f` and, after it, `f = contextmanager(plain_f)`."""
    found = re.compile(r"^@((?:contextlib\.)?contextmanager)\ndef (\w+)(.*?)(?=^\S|\Z)(?!\))", re.M | re.S)
    return found.sub(lambda m: f"def plain_{m[2]}{m[3]}{m[2]} = {m[1]}(plain_{m[2]})\n\n\n", source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Where the copy goes, with all that is found.")
    parser.add_argument("modules", nargs="+", choices=TESTS)
    parser.add_argument("--names", default="*", help="Pattern of the mutants' names.")
    options = parser.parse_args()
    if not options.folder.exists():
        copy_repository(options.folder, options.modules)
    subprocess.run(["mutmut", "run", "--max-children", "1", options.names], cwd=options.folder, check=False)
    counts = Counter()
    for module in options.modules:
        record = options.folder / "mutants" / "hf_icm_lora" / f"{module}.py.meta"
        for name, code in json.loads(record.read_text(encoding="utf-8"))["exit_code_by_key"].items():
            counts[verdict := VERDICTS.get(code, "killed")] += 1
            if verdict in ("survived", "not covered"):
                told = subprocess.run(["mutmut", "show", name], cwd=options.folder, capture_output=True, text=True)
                print(f"{verdict}: {name}", *re.findall(r"^[-+] .*$", told.stdout, re.M), sep="\n")
    print(dict(counts))


if __name__ == "__main__":
    main()
