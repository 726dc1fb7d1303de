"""Puts the config groups that moe_plugin has for any Hydra app on the app's search path, after the app's own.

Hydra imports this file in every app of the environment, so it imports neither moe_plugin nor torch.
"""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUPS = Path(__file__).parent / "moe_plugin_groups"


class MoEPluginSearchPath(SearchPathPlugin):
    """Appends one folder, for your ``callbacks=[default,loss_free]``, ``+balancing=loss_free`` and the rules."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder; groups and options of the app come first."""
        search_path.append("moe_plugin", f"file://{GROUPS}")
