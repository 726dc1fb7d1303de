"""What the runs of a study measured: one row per run, in one small CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from moe_plugin.apps.report.summary import SUMMARY_FILE, read_summary
from moe_plugin.apps.study.arms import Study
from moe_plugin.apps.study.child_run import COMMIT_FILE, is_finished

SEED_PREFIX = "seed_"
_TYPES = {"str": str, "int": int, "float": lambda text: float(text or "nan")}  # empty: not measured


@dataclass(frozen=True)
class Result:
    """A run; see `RunSummary` for the measures.

    Attributes:
        study: The study it belongs to.
        arm: The arm.
        seed: Its seed.
        commit: The commit of the code that trained it.
    """

    study: str
    arm: str
    seed: int
    commit: str
    val_loss: float
    perplexity: float
    max_violation_global: float
    max_violation_batch: float
    dead_experts: int
    mean_experts_per_token: float
    active_flops_per_token: float
    tokens_per_second: float
    seconds: float


def run_folder(root: Path, study: str, arm: str, seed: int) -> Path:
    """Return the folder of a run below the folder of all studies; see `Result` for the other arguments."""
    return root / study / arm / f"{SEED_PREFIX}{seed}"


def seed_of(folder: Path) -> int:
    """Return the seed of the run in a folder."""
    return int(folder.name.removeprefix(SEED_PREFIX))


def collect(study: Study, root: Path) -> list[Result]:
    """Return the finished runs of a study, by arm and then by seed; see `run_folder` for `root`."""
    return [
        _read_result(study.name, arm.name, seed, root)
        for arm in study.arms
        for seed in range(arm.seeds)
        if is_finished(run_folder(root, study.name, arm.name, seed))
    ]


def _read_result(study: str, arm: str, seed: int, root: Path) -> Result:
    folder = run_folder(root, study, arm, seed)
    measured = asdict(read_summary(folder / SUMMARY_FILE)) | {"study": study, "arm": arm, "seed": seed}
    measured["commit"] = (folder / COMMIT_FILE).read_text().strip()
    return Result(**{field.name: measured[field.name] for field in fields(Result)})


def write_csv(results: Iterable[Result], path: Path) -> None:
    """Write one row per run, as `read_csv` reads it, numbers to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Result)])
        for result in results:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in asdict(result).values()])


def read_csv(path: Path) -> dict[str, list[Result]]:
    """Return the rows of `write_csv` by study."""
    studies: dict[str, list[Result]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            result = Result(
                **{field.name: _TYPES[str(field.type)](row[field.name]) for field in fields(Result)}
            )
            studies.setdefault(result.study, []).append(result)
    return studies


def by_arm(results: Iterable[Result]) -> dict[str, dict[int, Result]]:
    """Return the runs of each arm by seed."""
    arms: dict[str, dict[int, Result]] = {}
    for result in results:
        arms.setdefault(result.arm, {})[result.seed] = result
    return arms
