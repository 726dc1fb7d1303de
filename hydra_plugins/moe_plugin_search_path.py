"""Puts moe_plugin's config groups on the search path of every Hydra app, after the app's own.

Hydra imports this file in every app of the environment, so it imports neither moe_plugin nor torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class MoEPluginSearchPath(SearchPathPlugin):
    """Appends our folders, for a user's ``callbacks=[default,loss_free]`` or ``+balancing=loss_free``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends what is for other apps, and our groups; the app's own groups come first, which ours are for us."""
        search_path.append("moe_plugin", f"file://{conf_dir() / 'apps'}")
        search_path.append("moe_plugin", f"file://{conf_dir()}")


def conf_dir() -> Path:
    """Returns ``moe_plugin/conf`` of an installed wheel, or ``conf`` beside the package in a checkout."""
    spec = find_spec("moe_plugin")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
