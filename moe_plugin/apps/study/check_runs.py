"""Checks the configuration of every arm before the first run, which may be hours before the last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_plugin.apps.launch.check_jobs import check_jobs
from moe_plugin.apps.launch.compose import compose_jobs, quote_option
from moe_plugin.apps.launch.overrides import parse
from moe_plugin.apps.study.arms import Arm, Study
from moe_plugin.errors import ConfigError

_OWN = {"seed", "count_only", "hydra.run.dir"}
"""What the study itself sets for each run."""


def words_of(study: Study, arm: Arm, changes: Sequence[str]) -> list[str]:
    """Return the words of `moe-train` for the runs of an arm.

    Args:
        study: The study.
        arm: The arm.
        changes: What to change for every run.
    """
    return [f"experiment={study.experiment}", *arm.overrides, *changes]


def check_runs(studies: Iterable[Study], changes: Sequence[str]) -> None:
    """Check what every arm will be trained with; nothing is created but the cache of its text.

    Args:
        studies: The studies.
        changes: What to change for every run.

    Raises:
        ConfigError: A value is not allowed; it names the full key, and the arm if it is the arm's fault.
    """
    for override in parse(changes):
        if override.key_or_group in _OWN:
            rule = "must not change what the study sets for each run"
            raise ConfigError("--change", rule, override.input_line)
    for study in studies:
        for arm in study.arms:
            _check_arm(study, arm, changes)


def _check_arm(study: Study, arm: Arm, changes: Sequence[str]) -> None:
    words = [quote_option(word) for word in words_of(study, arm, changes)]
    try:
        check_jobs(list(compose_jobs(words, multirun=False)))
    except ConfigError as error:
        fix = f"{error.fix} It is in arm {arm.name!r} of study {study.name!r}.".strip()
        raise ConfigError(error.name, error.rule, error.value, fix) from error
