"""Every command in README and docs is one that can be given: nothing is run, configurations are composed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.generate.commands import COMMANDS
from moe_plugin.apps.launch.compose import compose_jobs, quote_option
from moe_plugin.apps.launch.overrides import parse
from tests.docs.pages import PAGES, ROOT, command_lines

LINES = sorted({tuple(words) for page in PAGES for words in command_lines(page) if words})
HYDRA = {"moe-train": "config", "moe-plan": "plan", "moe-simulate": "simulate"}
SWITCHES = {"--cfg", "job", "--resolve", "-m", "--help"}


class ParsedError(Exception):
    """A command line has been read."""


def beginning_with(*names: str) -> list[tuple[str, ...]]:
    """Return the words of the commands with these names; the first is the name."""
    lines = []
    for words in LINES:
        if "moe_plugin.apps.train" in words:  # torchrun
            words = ("moe-train", *words[words.index("moe_plugin.apps.train") + 1 :])
        if words[0] == "srun":
            words = words[1:]
        lines += [words] * (words[0] in names)
    return sorted(set(lines))


def needs(words: Sequence[str]) -> None:
    """Skip if an extra is missing that the command asks for."""
    for word, package in {"optuna": "optuna", "joblib": "joblib", "slurm": "submitit"}.items():
        if any(given.endswith(f"={word}") for given in words):
            pytest.importorskip(
                f"hydra_plugins.hydra_{package}_{'sweeper' if word == 'optuna' else 'launcher'}"
            )


class TestHydraCommands:
    @pytest.mark.parametrize("words", beginning_with(*HYDRA), ids=" ".join)
    def test_command_composes(self, words):
        needs(words)
        overrides = [quote_option(word) for word in words[1:] if word not in SWITCHES]
        # The first job of a sweep; all of its words are read before.
        assert next(compose_jobs(overrides, multirun="-m" in words, config_name=HYDRA[words[0]]))


class TestOtherCommands:
    @pytest.mark.parametrize("words", beginning_with("moe-eval"), ids=" ".join)
    def test_overrides_of_moe_eval_are_well_formed(self, words):
        assert len(parse(words[1:])) == len(words) - 1

    @pytest.mark.parametrize("words", beginning_with("moe-inspect", "moe-report", "moe-study"), ids=" ".join)
    def test_options_are_known(self, words, monkeypatch):
        read = argparse.ArgumentParser.parse_args

        def stop(parser, *given):
            read(parser, *given)
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(ParsedError):
            import_module(COMMANDS[words[0]]).main(list(words[1:]))


class TestTools:
    def test_targets_of_make_exist(self):
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        used = {words[1] for words in beginning_with("make") if not words[1].startswith("CASES")}
        assert used - targets == set()

    def test_modules_exist(self):
        modules = {words[2] for words in beginning_with("python") if words[1] == "-m"}
        assert {module for module in modules if find_spec(module) is None} == set()

    def test_scripts_and_tests_exist(self):
        paths = {word for words in beginning_with("python", "pytest") for word in words if "/" in word}
        ours = {path for path in paths if path.startswith(("examples/", "tests/"))}
        assert ours
        assert {path for path in ours if not Path(ROOT, path).exists()} == set()
