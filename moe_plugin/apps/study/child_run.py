"""One run of a study in its own process, a fork that need not import everything again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

from moe_plugin.apps.launch.lifeline import end_with_parent
from moe_plugin.apps.report.code_commit import code_commit
from moe_plugin.apps.report.summary import SUMMARY_FILE
from moe_plugin.apps.train import main as train

LOG_FILE, COMMIT_FILE = "log.txt", "commit.txt"


def is_finished(folder: Path) -> bool:
    """Return whether a run is finished."""
    return (folder / SUMMARY_FILE).exists()


def run_in_child(words: Sequence[str], folder: Path) -> bool:
    """Train in a child process, which prints to the folder's ``log.txt``.

    The child is a copy of this process before any training, so runs do not depend on earlier ones. An interrupted run
    continues from its last checkpoint.

    Args:
        words: The command line of ``moe-train`` without the run's folder.
        folder: The run's folder.

    Returns:
        Whether the run is finished.
    """
    import moe_plugin.apps.launch.train_job  # noqa: F401 (for the child, which finds torch and Lightning imported)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMIT_FILE).write_text(code_commit() + "\n")
    child = multiprocessing.get_context("fork").Process(
        target=_train, args=([*words, f"hydra.run.dir={folder}"], folder, os.getpid())
    )
    child.start()
    child.join()
    return child.exitcode == 0 and is_finished(folder)


def _train(words: list[str], folder: Path, parent: int) -> None:
    end_with_parent(parent)
    with (folder / LOG_FILE).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        train(words)
