"""Tests of which folder a run gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.launch.claimed_folder import claimed_folder, new_folder
from moe_plugin.apps.launch.overrides import parse

KEY = "hydra.run.dir"


def config(folder: str) -> DictConfig:
    """Returns what is read of a configuration."""
    setup_globals()
    return OmegaConf.create({"name": "it's", "hydra": {"run": {"dir": folder}}})


def claimed(folder: str) -> str:
    """Returns the folder as Hydra reads it."""
    with claimed_folder(config(folder), KEY) as word:
        (override,) = parse([word])
    assert override.key_or_group == KEY
    value = override.value()
    assert isinstance(value, str)
    return value


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class TestClaimedFolder:
    def test_dated_folder_is_a_new_one_each_time(self) -> None:
        first, second, third = (claimed("runs/${name}/${now:%Y}") for _ in range(3))
        assert first.startswith("runs/it's/2")
        assert (second, third) == (f"{first}_2", f"{first}_3")

    def test_named_folder_is_the_same_each_time(self) -> None:
        assert [claimed("runs/a=1,2") for _ in range(2)] == ["runs/a=1,2"] * 2


class TestNewFolder:
    def test_processes_that_want_the_same_get_one_each(self, tmp_path: Path) -> None:
        start, go = os.pipe()
        processes = []
        for _ in range(8):
            if process := os.fork():
                processes.append(process)
                continue
            os.close(go)
            os.read(start, 1)
            (new_folder(tmp_path / "wanted") / str(os.getpid())).touch()
            os._exit(0)
        os.close(go)
        for process in processes:
            assert os.waitpid(process, 0)[1] == 0
        os.close(start)
        owners = [[file.name for file in folder.iterdir()] for folder in tmp_path.iterdir()]
        assert sorted(owners) == sorted([str(process)] for process in processes)
