"""Tests of the table of extras and of its error; tests/missing_extras.py runs without any extra installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_plugin.apps.launch.compose import compose_jobs
from moe_plugin.apps.launch.early_checks import check_early
from moe_plugin.errors import ConfigError
from moe_plugin.extras import EXTRAS, require

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr("moe_plugin.extras.find_spec", lambda name: None)


class TestExtras:
    @pytest.mark.parametrize(("package", "extra"), EXTRAS.items())
    def test_extra_installs_its_package(self, package, extra):
        (listed,) = re.findall(rf"^{extra} = \[(.*)\]$", PROJECT, flags=re.MULTILINE)
        assert f'"{package.rpartition(".")[2].replace("_", "-")}' in listed


class TestRequire:
    def test_installed_package_passes(self):
        require("torch", "x")

    def test_missing_one_names_the_extra(self, nothing_installed):
        with pytest.raises(ConfigError) as told:
            require("hydra_plugins.hydra_submitit_launcher", "hydra/launcher")
        fix = "Run: pip install 'moe_plugin[slurm]'."
        assert str(told.value) == f"'hydra/launcher' needs the package 'hydra-submitit-launcher'. {fix}"

    def test_package_of_no_extra_is_named_itself(self, nothing_installed):
        with pytest.raises(ConfigError, match=r"Run: pip install comet-ml\.$"):
            require("comet_ml", "logger.comet")

    @pytest.mark.parametrize(
        ("words", "extra"),
        [
            (["logger=wandb"], "wandb"),
            (["logger=mlflow"], "mlflow"),
            (["model=hf/mixtral", "router=native"], "hf"),
        ],
    )
    def test_run_without_the_package_is_refused_early(self, words, extra, nothing_installed):
        with pytest.raises(ConfigError, match=rf"moe_plugin\[{extra}\]"):
            check_early(*compose_jobs(words, multirun=False))
