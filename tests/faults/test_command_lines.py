"""Every wrong command line is one line on stderr, exit code 2, and nothing is created; right ones are accepted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import pytest

from moe_plugin.apps import train
from tests.apps.launch.small_job import write_texts
from tests.faults.line_battery import Answer
from tests.faults.line_places import furnish_
from tests.faults.right_lines import RIGHT
from tests.faults.wrong_lines import SMALL, WRONG

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of the batteries: with a checkpoint of another model, and a run's events."""
    folder = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MOE_PLUGIN_CACHE", str(folder / "cache"))
        write_texts(folder)
        train.main([*SMALL, "model.dim=8", "hydra.run.dir=run"])
    (events, *_) = sorted((folder / "run" / "tensorboard").glob("events.*"))
    return {
        "OTHER_CHECKPOINT": str(folder / "run" / "checkpoints" / "last.ckpt"),
        "EVENTS": str(events),
        "MOE_PLUGIN_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def answers(command: str, kind: str, surroundings: Mapping[str, str], folder: Path) -> list[Answer]:
    """Returns what came of a command's lines, tried in another process in an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in surroundings.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        furnish_(command)
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.line_battery", command, kind],
            cwd=folder,
            env=os.environ | surroundings,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return [Answer(**json.loads(line)) for line in done.stdout.splitlines()]


def is_clean(answer: Answer) -> bool:
    """Returns whether a wrong line is answered as it should be."""
    is_one_line = answer.err.startswith("error: ") and answer.err.count("\n") == 1
    return (
        (answer.code, answer.out, answer.created) == (2, "", []) and is_one_line and answer.part in answer.err
    )


class TestWrongLines:
    @pytest.mark.parametrize("command", WRONG)
    def test_each_is_answered_in_one_line_and_nothing_is_created(
        self, command: str, surroundings: Mapping[str, str], tmp_path: Path, figure
    ) -> None:
        got = answers(command, "wrong", surroundings, tmp_path)
        unclean = [answer for answer in got if not is_clean(answer)]
        early = [answer.seconds for answer in got if answer.before_torch] or [0.0]
        late = [answer.seconds for answer in got if not answer.before_torch] or [0.0]
        figure(
            f"wrong command lines, {command}: {len(got) - len(unclean)} of {len(got)} clean; processor time of the "
            f"{len(early)} answered before torch is imported: median {median(early):.2f} s, slowest "
            f"{max(early):.2f} s; of the {len(late)} others, without importing it: median {median(late):.2f} s, "
            f"slowest {max(late):.2f} s"
        )
        assert len(got) == len(WRONG[command][1])
        assert unclean == []

    def test_importing_what_the_late_answers_need_takes_a_time(self, figure) -> None:
        code = "import time; import moe_plugin.apps.launch.validate_config; print(time.process_time())"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        figure(
            f"wrong command lines: importing torch and Lightning takes {float(done.stdout):.1f} s of processor time"
        )

    def test_there_are_as_many_as_the_goal_names(self) -> None:
        assert sum(len(lines) for _, lines in WRONG.values()) >= 261


class TestRightLines:
    @pytest.mark.parametrize("command", RIGHT)
    def test_each_is_accepted(
        self, command: str, surroundings: Mapping[str, str], tmp_path: Path, figure
    ) -> None:
        got = answers(command, "right", surroundings, tmp_path)
        refused = [a for a in got if a.code != 0 or not any(Path(path).match(a.part) for path in a.created)]
        figure(f"right command lines, {command}: {len(got) - len(refused)} of {len(got)} accepted")
        assert refused == []
