"""One run of a study in a process of its own, forked so that it need not import everything anew."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moe_plugin.apps.report.summary import SUMMARY_FILE
from moe_plugin.apps.train import main as train

LOG_FILE, COMMIT_FILE = "log.txt", "commit.txt"


def is_finished(folder: Path) -> bool:
    """Return whether a run has come to its end."""
    return (folder / SUMMARY_FILE).exists()


def run_in_child(words: Sequence[str], folder: Path) -> bool:
    """Trains, with what it prints in the folder's ``log.txt``.

    The child is a copy of this process before any training, so that runs don't depend on those before them. What it
    imports is there already. An interrupted run goes on from its last checkpoint.

    Args:
        words: The command line of ``moe-train`` without the run's folder.
        folder: The run's.

    Returns:
        Whether it came to its end.
    """
    import moe_plugin.apps.launch.job  # noqa: F401 (for the child, which finds torch and Lightning imported)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMIT_FILE).write_text(commit() + "\n")
    child = multiprocessing.get_context("fork").Process(
        target=_train, args=([*words, f"hydra.run.dir={folder}"], folder)
    )
    child.start()
    child.join()
    return child.exitcode == 0 and is_finished(folder)


def commit() -> str:
    """The commit of the code that runs, with a + where files differ from it; empty where there is no repository."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _train(words: list[str], folder: Path) -> None:
    with (folder / LOG_FILE).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        train(words)
