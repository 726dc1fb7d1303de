"""What a study compares: the files of ``conf/study/``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_plugin.apps.config_folder import conf_dir
from moe_plugin.apps.received.yaml_file import read_yaml
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_integer

_KEYS = {"experiment", "seeds", "reference", "arms"}
_OPTIONAL_KEYS = {"fewer_seeds"}


@dataclass(frozen=True)
class Arm:
    """One of the things that a study compares.

    Attributes:
        name: Its name in tables; also its folder.
        overrides: What it changes in the study's experiment.
        seeds: It runs with seeds 0 to this - 1.
    """

    name: str
    overrides: tuple[str, ...]
    seeds: int


@dataclass(frozen=True)
class Study:
    """Arms that differ in one thing each, all with the same seeds.

    Attributes:
        name: The file's name.
        experiment: The option of ``conf/experiment`` that all arms change.
        reference: The arm that the others are compared with, seed by seed.
        arms: In the order in which they run.
    """

    name: str
    experiment: str
    reference: str
    arms: tuple[Arm, ...]

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Yield all arms with the first seed, then all with the next, so runs can be compared at any time."""
        for seed in range(max(arm.seeds for arm in self.arms)):
            yield from ((arm, seed) for arm in self.arms if seed < arm.seeds)


def study_folder() -> Path:
    """Return where the studies that come with the package are."""
    return conf_dir() / "study"


def read_study(name: str) -> Study:
    """Read a study.

    Args:
        name: One of ``conf/study``, or the path of a YAML file of the same form.

    Raises:
        ConfigError: There is no such study, or its file has other keys than a study has.
    """
    path = Path(name) if name.endswith(".yaml") else study_folder() / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in study_folder().glob("*.yaml")))
        raise ConfigError("study", f"must be one of {known}, or a YAML file", name)
    read = read_yaml(path, "study")
    if (
        not isinstance(read, dict)
        or set(read) - _OPTIONAL_KEYS != _KEYS
        or not isinstance(read["arms"], dict)
    ):
        rule = f"must have the keys {', '.join(sorted(_KEYS))}, and 'arms' by name"
        raise ConfigError("study", rule, list(read or ()), f"See {path}.")
    try:
        return _study(path.stem, **read)
    except ConfigError as error:
        raise ConfigError(error.name, error.rule, error.value, f"See {path}.") from error


def _study(
    name: str, *, experiment: Any, seeds: Any, reference: Any, arms: dict[Any, Any], fewer_seeds: Any = None
) -> Study:
    """Return the study with these keys, once each is checked."""
    if not arms:
        raise ConfigError("arms", "must have at least one", arms)
    fewer = {} if fewer_seeds is None else fewer_seeds
    check_integer("seeds", seeds)
    if not isinstance(fewer, dict):
        raise ConfigError("fewer_seeds", "must give a number of seeds by arm", fewer)
    for arm, number in fewer.items():
        check_integer(f"fewer_seeds.{arm}", number)
    for arm, overrides in arms.items():
        _check_arm(arm, overrides)
    for key, names in (("reference", [reference]), ("fewer_seeds", fewer)):
        if unknown := [each for each in names if each not in arms]:
            raise ConfigError(key, f"must name arms ({', '.join(arms)})", unknown[0])
    made = tuple(Arm(arm, tuple(overrides), fewer.get(arm, seeds)) for arm, overrides in arms.items())
    return Study(name, str(experiment), reference, made)


def _check_arm(name: Any, overrides: Any) -> None:
    """Check that an arm's name can be that of a folder, and what it changes can be words of a command line."""
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ConfigError("arms", "must have names that can be those of folders", name)
    if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
        raise ConfigError(f"arms.{name}", "must be a list of key=value", overrides)
