from __future__ import annotations

from pathlib import Path

import pytest

from tests.apps.launch.small_job import write_texts


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the small job's texts and nothing else; the test, and the processes it starts, run there."""
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NODE_RANK", "0")
    return tmp_path
