"""What a study compares: the files of ``conf/study/``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from moe_plugin.apps.launch.compose import conf_dir
from moe_plugin.errors import ConfigError

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
    read = OmegaConf.to_container(OmegaConf.load(path))
    if (
        not isinstance(read, dict)
        or set(read) - _OPTIONAL_KEYS != _KEYS
        or not isinstance(read["arms"], dict)
    ):
        raise ConfigError(
            "study",
            f"must have the keys {', '.join(sorted(_KEYS))}, and 'arms' by name",
            list(read or ()),
            f"See {path}.",
        )
    fewer = read.get("fewer_seeds", {})
    for key, names in (("reference", {read["reference"]}), ("fewer_seeds", set(fewer))):
        if unknown := sorted(names - set(read["arms"])):
            raise ConfigError(key, f"must name arms ({', '.join(read['arms'])})", unknown[0], f"See {path}.")
    arms = tuple(
        Arm(name, tuple(overrides), fewer.get(name, read["seeds"]))
        for name, overrides in read["arms"].items()
    )
    return Study(path.stem, read["experiment"], read["reference"], arms)
