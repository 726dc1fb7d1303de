"""The code of the pages in docs/ runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


class TestPretrained:
    def test_code_runs_and_balances(self, tmp_path, monkeypatch, capsys):
        pytest.importorskip("transformers")
        monkeypatch.chdir(tmp_path)
        code = re.findall(r"^```python\n(.*?)^```", (DOCS / "pretrained.md").read_text(), re.S | re.M)
        exec("\n".join(code), {})
        shown = capsys.readouterr().out
        after = [float(value) for value in re.findall(r"-> ([\d.]+)", shown)]
        assert len(after) == 2
        assert max(after) < 0.1
        assert "0 of 2 biases lie in the model's own checkpoint" in shown
        assert (tmp_path / "bias.safetensors").exists()
