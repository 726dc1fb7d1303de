"""The classes and functions that our own config files name: what a run's configuration is made of."""

from __future__ import annotations

import re
from functools import cache

from hydra_plugins.moe_plugin_search_path import GROUPS
from moe_plugin.apps.config_folder import conf_dir

_TARGET = re.compile(r"_target_\s*[:=]\s*((?:moe_plugin|transformers)\.[\w.]+)")


@cache
def own_targets() -> frozenset[str]:
    """Return every ``_target_`` of this package and of transformers in our config files, also in comments."""
    files = [file for folder in (conf_dir(), GROUPS) for file in folder.rglob("*.yaml")]
    return frozenset(name for file in files for name in _TARGET.findall(file.read_text(encoding="utf-8")))
