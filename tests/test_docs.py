"""The quick start, pasted block by block into one session, on the real SmolLM2-135M."""

import re
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parent.parent / "docs" / "quickstart.md"


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
