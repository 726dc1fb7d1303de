"""Trains the arms of studies, and writes what was measured after each run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_plugin.apps.study.arms import Arm, Study
from moe_plugin.apps.study.check_runs import words_of
from moe_plugin.apps.study.child_run import LOG_FILE, is_finished, run_in_child
from moe_plugin.apps.study.results import collect, run_folder, write_csv


def run_studies(studies: Sequence[Study], changes: Sequence[str], root: Path, csv: Path) -> list[Path]:
    """Train every arm with every seed, unless that run is finished already.

    Args:
        studies: The studies.
        changes: What to change for every run.
        root: The folder of all studies.
        csv: Where the results go.

    Returns:
        The folders of the runs that failed.
    """
    failed = []
    for study in studies:
        for arm, seed in study.runs():
            if not _run(study, arm, seed, root, changes):
                failed.append(run_folder(root, study.name, arm.name, seed))
            write_csv([result for each in studies for result in collect(each, root)], csv)
    return failed


def _run(study: Study, arm: Arm, seed: int, root: Path, changes: Sequence[str]) -> bool:
    """Train an arm with a seed, unless that run is finished already; return whether it is finished."""
    folder = run_folder(root, study.name, arm.name, seed)
    if is_finished(folder):
        return True
    print(f"{study.name}: {arm.name}, seed {seed}", flush=True)
    done = run_in_child([*words_of(study, arm, changes), f"seed={seed}"], folder.resolve())
    if not done:
        print(f"failed: {arm.name}, seed {seed}; see {folder / LOG_FILE}", file=sys.stderr, flush=True)
    return done
