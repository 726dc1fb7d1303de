"""The code of the pages in docs/ runs."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from moe_plugin import balance_

DOCS = Path(__file__).parents[2] / "docs"


class TestPretrained:
    def test_code_runs_and_balances(self, tmp_path, monkeypatch, capsys):
        pytest.importorskip("transformers")
        monkeypatch.chdir(tmp_path)
        code = re.findall(r"^```python\n(.*?)^```", (DOCS / "pretrained.md").read_text(), re.S | re.M)
        names = {}
        exec("\n".join(code), names)
        balanced, exported, shown = names["balanced"], names["exported"], capsys.readouterr().out
        routers = re.findall(r"(\S+): MaxVio [\d.]+ -> ([\d.]+)", shown)
        assert [name for name, _ in routers] == list(balanced)
        assert max(float(after) for _, after in routers) < 0.1
        assert (exported.in_checkpoint, exported.in_sidecar) == ((), tuple(balanced))
        assert str(exported) in shown
        other = copy.deepcopy(names["model"])
        balance_(other).remove()
        reloaded = balance_(other, rule=None)
        reloaded.load(tmp_path / "bias.safetensors")
        batch = names["batches"][0]
        assert torch.equal(other(**batch).logits, names["model"](**batch).logits)
