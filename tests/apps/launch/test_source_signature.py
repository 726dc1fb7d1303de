from __future__ import annotations

import importlib
from typing import Any

import pytest

from hydra_plugins.moe_plugin_search_path import GROUPS
from moe_plugin.apps.launch.compose import conf_dir
from moe_plugin.apps.launch.signature import _parameters_of
from moe_plugin.apps.launch.source_signature import parameters_in_source


def targets() -> list[str]:
    """Every class and function that our options name, apart from those of transformers."""
    lines = (
        line
        for folder in (conf_dir(), GROUPS)
        for f in folder.rglob("*.yaml")
        for line in f.read_text().split("\n")
    )
    named = {line.split("_target_:")[1].split("#")[0].strip() for line in lines if "_target_: " in line}
    return sorted(
        name for name in named if name.startswith(("moe_plugin.", "lightning.")) and "{" not in name
    )


@pytest.mark.parametrize("target", targets())
def test_source_says_what_the_imported_class_does(target: str) -> None:
    read = parameters_in_source(target)
    if read is None:
        return
    module, _, name = target.rpartition(".")
    imported = _parameters_of(getattr(importlib.import_module(module), name))
    assert imported is not None
    assert set(read.hints) <= set(imported.hints)
    assert (
        len(set(imported.hints) - set(read.hints)) <= 2 * read.takes_any
    )  # *args and **kwargs, however called
    assert read.takes_any == imported.takes_any
    for each, hint in read.hints.items():
        if hint in (bool, int, float, str):
            assert imported.hints[each] in (hint, Any), each  # Any: named under TYPE_CHECKING


def test_most_of_our_options_can_be_read() -> None:
    assert sum(parameters_in_source(target) is not None for target in targets()) > 0.7 * len(targets())


@pytest.mark.parametrize("target", ["moe_plugin.Nope", "nowhere.Model", "builtins.dict", "name"])
def test_what_the_source_does_not_show_is_not_known(target: str) -> None:
    assert parameters_in_source(target) is None
