"""Tests that the wheel, and an editable installation, bring the config groups to any Hydra app."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = ("moe_plugin", "conf", "hydra_plugins", "pyproject.toml", "setup.py", "README.md", "LICENSE")

# A user's app. It sees the installation under test (.pth files included) and this environment's dependencies, but not
# an installation of ours in this environment: `python -S` has read no .pth file.
APP = """
import site, sys
site.addsitedir(sys.argv.pop(1))
sys.path.append(sys.argv.pop(1))
import hydra
@hydra.main(config_path=sys.argv.pop(1), config_name="config", version_base="1.3")
def app(config):
    for node in (config.get("callbacks") or {}).values():
        print("made", type(hydra.utils.instantiate(node)).__name__)
app()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a package is built from, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def install(*arguments: str, target: Path) -> Path:
    """Installs into a folder, without its dependencies, with this environment's setuptools."""
    switches = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *switches, *arguments], check=True)
    return target


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder the package is installed in."""
    target = tmp_path_factory.mktemp(request.param)
    return install(*(["--editable"] if request.param == "editable" else []), str(source), target=target)


@pytest.fixture
def run_app(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a user's app with the given files in its ``conf``, and returns what it prints."""

    def run(files: dict[str, str], *words: str) -> str:
        for name, text in files.items():
            (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "conf" / name).write_text(text)
        (tmp_path / "app.py").write_text(APP)
        folders = [str(installed), sysconfig.get_paths()["purelib"], str(tmp_path / "conf")]
        return run_isolated(["app.py", *folders, *words], tmp_path)

    return run


def run_isolated(arguments: Sequence[str], folder: Path) -> str:
    """Runs Python in a folder, without an installation of ours in this environment, and returns what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


class TestInstalled:
    def test_own_app_finds_our_groups_beside_its_own(self, run_app: Callable[..., str]) -> None:
        files = {"config.yaml": "defaults: [{callbacks: default}]", "callbacks/default.yaml": "mine: 1"}
        config = run_app(files, "callbacks=[default,loss_free]", "--cfg", "job")
        assert "mine: 1" in config
        assert "_target_: moe_plugin.callbacks.loss_free.LossFreeBalancing" in config

    def test_untouched_app_makes_the_callback_beside_its_own(self, run_app: Callable[..., str]) -> None:
        mine = "mine: {_target_: fractions.Fraction}"
        files = {"config.yaml": "defaults: [{callbacks: default}]", "callbacks/default.yaml": mine}
        shown = run_app(files, "+balancing=loss_free", "hydra.run.dir=.", "hydra.output_subdir=null")
        assert shown.splitlines() == ["made Fraction", "made LossFreeBalancing"]

    def test_rule_of_the_callback_is_an_option(self, run_app: Callable[..., str]) -> None:
        sign = {"_target_": "moe_plugin.balancing.rules.Sign", "rate": "auto", "centred": True}
        words = ["+balancing=loss_free", "+rule=sign", "--cfg", "job", "--resolve"]
        config = yaml.safe_load(run_app({"config.yaml": "x: 1"}, *words))
        assert config.keys() == {"x", "callbacks", "rule"}
        assert config["callbacks"]["loss_free"]["rule"]["rule"] == config["rule"] == sign
        config = yaml.safe_load(run_app({"config.yaml": "x: 1"}, words[0], *words[2:]))
        assert config.keys() == {"x", "callbacks"}
        assert config["callbacks"]["loss_free"]["rule"]["rule"] is None

    def test_app_gets_three_groups_and_no_more(self, run_app: Callable[..., str]) -> None:
        shown = run_app({"config.yaml": "x: 1"}, "--help")
        groups = shown.partition("== Configuration groups ==")[2].partition("== Config ==")[0]
        options = dict(line.split(": ") for line in groups.splitlines() if ": " in line)
        rules = {path.stem for path in (ROOT / "hydra_plugins" / "moe_plugin_groups" / "rule").iterdir()}
        assert {group: set(names.split(", ")) for group, names in options.items()} == {
            "balancing": {"loss_free"},
            "callbacks": {"load_monitor", "loss_free"},
            "rule": rules,
        }

    @pytest.mark.parametrize("option", ["callbacks/default", "model/tiny"])
    def test_app_without_an_option_does_not_get_that_of_our_commands(
        self, option: str, run_app: Callable[..., str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        text = f"defaults: [{{{option.replace('/', ': ')}}}]"
        with pytest.raises(subprocess.CalledProcessError):
            run_app({"config.yaml": text}, "--cfg", "job")
        assert f"Could not find '{option}'" in capfd.readouterr().err

    def test_groups_are_those_of_the_installation(
        self, run_app: Callable[..., str], installed: Path, source: Path
    ) -> None:
        shown = run_app({"config.yaml": "x: 1"}, "--info", "searchpath")
        (line,) = (line for line in shown.splitlines() if line.startswith("| moe_plugin"))
        assert str(installed) in line or str(source) in line

    def test_package_is_a_search_path(self, run_app: Callable[..., str]) -> None:
        text = "defaults: [{experts: '8'}]\nhydra: {searchpath: ['pkg://moe_plugin.conf']}"
        assert "num_experts: 8" in run_app({"config.yaml": text}, "--cfg", "job")

    def test_our_command_finds_its_groups_and_those(self, installed: Path, tmp_path: Path) -> None:
        words = [
            "rule=sign",
            "balancing=none",
            "callbacks=[default,loss_free]",
            "+hardware=h100",
            "--cfg",
            "job",
        ]
        text = "import site, sys; site.addsitedir(sys.argv.pop(1)); sys.path.append(sys.argv.pop(1)); "
        text += "from moe_plugin.apps.train import main; main()"
        folders = [str(installed), sysconfig.get_paths()["purelib"]]
        shown = run_isolated(["-c", text, *folders, *words], tmp_path)
        config = yaml.safe_load(shown)
        assert config["rule"]["_target_"] == "moe_plugin.balancing.rules.Sign"
        assert list(config["callbacks"])[-2:] == ["load_monitor", "loss_free"]


class TestConstraints:
    def test_every_line_pins_a_version_that_any_index_has(self) -> None:
        lines = [
            line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
        ]
        assert all("==" in line and "+" not in line and "/" not in line for line in lines)
        assert not any(line.startswith(("moe_plugin", "pip==", "setuptools==")) for line in lines)
