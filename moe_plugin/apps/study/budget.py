"""Did the number of experts stay at its target: ``python -m moe_plugin.apps.study.budget STUDY_FOLDER``.

For each arm of a study whose text changes its domain in the middle (``moe-study budget``): the mean number of experts
per token over the steps of three parts of training, by what the run logged, and the largest error of a logged window
in the last one.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.report.summary import SUMMARY_FILE, read_summary
from moe_plugin.apps.study.markdown import head, row
from moe_plugin.apps.study.trained_run import runs_of

_COLUMNS = (
    *("arm", "target", "second sixth", "right after the change", "last third"),
    *("error, %", "worst window, %"),
)
_LOGGED = "load/experts_per_token"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table, means over the seeds of each arm."""
    parser = argparse.ArgumentParser(prog="python -m moe_plugin.apps.study.budget", description=__doc__)
    parser.add_argument("study", type=Path, help="folder of a study, such as runs/study/budget")
    options = parser.parse_args(arguments)
    print(head(*_COLUMNS))
    for arm in sorted(path for path in options.study.iterdir() if path.is_dir()):
        with one_line_errors():
            folders = runs_of(arm).values()
        target = read_summary(next(iter(folders)) / SUMMARY_FILE).target_experts_per_token
        assert target is not None
        runs = [_logged(folder) for folder in folders]
        parts = [fmean(values) for values in zip(*map(_by_part, runs), strict=True)]
        errors = [100 * (parts[-1] / target - 1), max(_worst(windows, target) for windows in runs)]
        cells = [f"{value:.3f}" for value in parts] + [f"{value:+.2f}" for value in errors]
        print(row(arm.name, f"{target:g}", *cells))


def _by_part(windows: Sequence[float]) -> list[float]:
    """Return experts per token over the second sixth, the sixth after a half, and the last third of training."""
    sixth = len(windows) / 6
    bounds = ((1, 2), (3, 4), (4, 6))
    return [fmean(windows[round(begin * sixth) : round(end * sixth)]) for begin, end in bounds]


def _worst(windows: Sequence[float], target: float) -> float:
    """Return the largest error of a window in the last third, in percent."""
    return max(100 * abs(value / target - 1) for value in windows[round(len(windows) * 2 / 3) :])


def _logged(folder: Path) -> list[float]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return [float(line[_LOGGED]) for line in csv.DictReader(file) if line.get(_LOGGED)]


if __name__ == "__main__":
    main()
