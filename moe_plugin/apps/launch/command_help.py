"""The help of a Hydra command: its own config groups, without those of our other commands."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template

from omegaconf import DictConfig, OmegaConf

from hydra_plugins.moe_plugin_search_path import GROUPS
from moe_plugin.apps.config_folder import conf_dir


def help_text(config: DictConfig, config_name: str, folders: Sequence[Path]) -> str:
    """Return the text of ``hydra.help.template`` with the groups and keys of the command.

    Args:
        config: As composed, with the ``hydra`` node.
        config_name: The file of `conf_dir` that was composed.
        folders: A user's own folders of groups.
    """
    keys = OmegaConf.masked_copy(config, [key for key in map(str, config) if key != "hydra"])
    return Template(config.hydra.help.template).substitute(
        APP_CONFIG_GROUPS="\n".join(_group_lines(config, [*folders, conf_dir(), GROUPS])),
        OWN_KEYS=_own_keys(conf_dir() / f"{config_name}.yaml"),
        CONFIG=OmegaConf.to_yaml(keys),
    )


def _group_lines(config: DictConfig, folders: Sequence[Path]) -> Iterator[str]:
    """Yield the options of each group that the configuration chooses from, and of the groups below it."""
    options: defaultdict[str, set[str]] = defaultdict(set)
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            options[path.parent.relative_to(folder).as_posix()].add(path.stem)
    chosen = {re.split("[@/]", key)[0] for key in config.hydra.runtime.choices} - {"hydra"}
    for group in sorted(options):
        if group.partition("/")[0] in chosen:
            yield f"  {group}: {', '.join(sorted(options[group]))}"


def _own_keys(path: Path) -> str:
    """Return what a file says after its list of groups, comments included."""
    if not path.is_file():
        return ""
    return path.read_text().partition("\n\n")[2]
