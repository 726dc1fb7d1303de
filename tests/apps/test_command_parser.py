"""Tests of what all seven commands have: a version, and scripts for the Tab key."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

import moe_plugin
from docs.generate.commands import COMMANDS

VERSIONS = f"""
import sys
from importlib import import_module
for name in {list(COMMANDS.values())}:
    try:
        import_module(name).main(["--version"])
    except SystemExit as end:
        assert not end.code
assert not {{"torch", "lightning"}} & set(sys.modules)
"""


def test_version_of_every_command_is_ours_and_needs_no_torch():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", VERSIONS], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.splitlines() == [f"moe_plugin {moe_plugin.__version__}"] * len(COMMANDS)


@pytest.fixture
def printed(monkeypatch, capsys):
    def run(command, *words):
        monkeypatch.setattr(sys, "argv", [command, *words])
        with suppress(SystemExit):
            import_module(COMMANDS[command]).main(list(words))
        return capsys.readouterr().out

    return run


class TestCompletion:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_script_of_bash_is_for_the_command(self, command, printed, tmp_path):
        script = tmp_path / "script"
        script.write_text(printed(command, "--completion", "bash"))
        shown = subprocess.run(
            ["bash", "-c", f"source {script}; complete -p {command}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert command in shown.stdout

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("moe-train rule=si", {"rule=sign"}),
            ("moe-eval data.val_b", {"data.val_batch_size="}),
            ("moe-plan hardware=h", {"hardware=h100", "hardware=h200", "hardware=h800"}),
            ("moe-simulate setting.num", {"setting.num_experts="}),
        ],
    )
    def test_words_of_a_configuration_are_completed(self, line, words, printed, monkeypatch):
        monkeypatch.setenv("COMP_LINE", line)
        assert set(printed(line.split()[0], "-sc", "query=bash").split()) == words


class TestHelp:
    @pytest.mark.parametrize(
        ("command", "own", "others"),
        [
            (
                "moe-train",
                {"data", "model", "model/hf", "strategy"},
                {"hardware", "source", "study", "hydra"},
            ),
            ("moe-plan", {"hardware", "model", "experts"}, {"strategy", "callbacks", "source", "rule"}),
            ("moe-simulate", {"rule", "source"}, {"model", "hardware", "study", "data"}),
            ("moe-eval", set(), {"model", "hardware", "study"}),
        ],
    )
    def test_only_groups_of_the_command_are_listed(self, command, own, others, printed):
        section = printed(command, "--help").partition("\nGroups")[2].partition("\n\n")[0]
        groups = {line.partition(":")[0].strip() for line in section.splitlines()[1:]}
        assert own <= groups
        assert not others & groups

    def test_keys_of_a_plan_come_with_their_comments(self, printed):
        assert "# Where the JSON goes.\noutput: plan.json" in printed("moe-plan", "--help")

    def test_own_folder_of_groups_is_listed(self, printed, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.yaml").write_text("x: 1")
        assert "model: deepseek_v3_671b, mine, small, tiny" in printed(
            "moe-train", "--help", "--config-dir", str(tmp_path)
        )


def test_switch_that_a_plan_does_not_have_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        import_module(COMMANDS["moe-plan"]).main(["-m", "nodes=1,2"])
    assert capsys.readouterr().err == "error: '-m' is not an option of this command.\n"
