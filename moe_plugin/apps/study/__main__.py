"""``moe-study``: trains the arms of studies seed by seed, and writes what each run measured to a CSV."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from moe_plugin.apps.command_parser import CommandParser
from moe_plugin.apps.launch.command import FAILED, one_line_errors
from moe_plugin.apps.launch.folder_lock import locked
from moe_plugin.apps.launch.process_environment import limit_spinning
from moe_plugin.apps.outputs import check_output_file, check_output_folder
from moe_plugin.apps.study.arms import read_study
from moe_plugin.apps.study.check_runs import check_runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: With code 1 after all runs, if one of them failed.
    """
    options = _parser().parse_args(arguments)
    limit_spinning()
    with one_line_errors(), ExitStack() as locks:
        studies = [read_study(name) for name in options.studies]
        check_output_file("--csv", options.csv)
        check_output_folder("--folder", options.folder)
        check_runs(studies, options.change)
        for study in studies:
            locks.enter_context(locked(options.folder / study.name, "--folder"))
        # Torch and Lightning are imported only now: a wrong word is reported at once.
        from moe_plugin.apps.study.run_studies import run_studies

        failed = run_studies(studies, options.change, options.folder, options.csv)
    if failed:
        print("failed: " + ", ".join(map(str, failed)), file=sys.stderr)
        raise SystemExit(FAILED)


def _parser() -> CommandParser:
    words = CommandParser(prog="moe-study", description=__doc__)
    words.add_argument("studies", nargs="+", help="options of conf/study, or YAML files like them")
    words.add_argument("--folder", type=Path, default=Path("runs/study"), help="default: %(default)s")
    words.add_argument("--csv", type=Path, default=Path("runs/study/study.csv"), help="default: %(default)s")
    words.add_argument(
        "--change", action="append", default=[], help="for every run, such as trainer.max_steps=100"
    )
    return words


if __name__ == "__main__":
    main()
