"""The notebook runs from top to bottom, and balances."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_notebook_runs_and_balances(capsys):
    pytest.importorskip("transformers")
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    for name, counts in names["load"].items():
        assert names["max_violation"](counts) < names["max_violation"](names["without"][name]) / 4
    assert f"-> {names['max_violation'](counts):.2f}" in capsys.readouterr().out


def test_notebook_is_saved_without_output():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
