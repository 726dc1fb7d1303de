"""``moe-study``: trains the arms of studies seed by seed, and writes what each run measured to a CSV."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_plugin.apps.launch.command import FAILED, one_line_errors
from moe_plugin.apps.one_line_parser import one_line_
from moe_plugin.apps.outputs import check_output_file, check_output_folder
from moe_plugin.apps.study.arms import Arm, Study, read_study
from moe_plugin.apps.study.check_runs import check_runs, words_of
from moe_plugin.apps.study.child_run import LOG_FILE, is_finished, run_in_child
from moe_plugin.apps.study.results import collect, run_folder, write_csv


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: With code 1 after all runs, if one of them failed.
    """
    options = _parser().parse_args(arguments)
    with one_line_errors():
        studies = [read_study(name) for name in options.studies]
        check_output_file("--csv", options.csv)
        check_output_folder("--folder", options.folder)
        check_runs(studies, options.change)
    failed = []
    for study in studies:
        for arm, seed in study.runs():
            if not _run(study, arm, seed, options.folder, options.change):
                failed.append(run_folder(options.folder, study.name, arm.name, seed))
            write_csv([result for each in studies for result in collect(each, options.folder)], options.csv)
    if failed:
        print("failed: " + ", ".join(map(str, failed)), file=sys.stderr)
        raise SystemExit(FAILED)


def _parser() -> argparse.ArgumentParser:
    words = one_line_(argparse.ArgumentParser(prog="moe-study", description=__doc__))
    words.add_argument("studies", nargs="+", help="options of conf/study, or YAML files like them")
    words.add_argument("--folder", type=Path, default=Path("runs/study"), help="default: %(default)s")
    words.add_argument("--csv", type=Path, default=Path("runs/study/study.csv"), help="default: %(default)s")
    words.add_argument(
        "--change", action="append", default=[], help="for every run, such as trainer.max_steps=100"
    )
    return words


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


if __name__ == "__main__":
    main()
