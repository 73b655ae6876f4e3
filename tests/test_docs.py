"""The quick start, pasted block by block into one session, on the real SmolLM2-135M."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "docs" / "quickstart.md"


def test_tables_of_the_pages_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "suite")
    import page

    tables = 0
    for name in page.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert page.filled(text) == text, f"{name}: run python benchmarks/suite/page.py"
        tables += text.count("<!-- end -->")
    assert tables >= 4
    assert page.filled(text.replace("| 0.", "| 9.")) == text


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_quick_start_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", QUICKSTART.read_text(encoding="utf-8"), re.DOTALL)
    session: dict = {"__name__": "quickstart"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"quickstart.md, block {number}", "exec"), session)
    assert (tmp_path / "quickstart/adapters/both/adapter_model.safetensors").is_file()
    assert session["report"]["splits"].keys() == {"seen", "unseen"}
