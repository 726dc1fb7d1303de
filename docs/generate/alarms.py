"""The reference of alarms, from `moe_plugin.metrics.alarms`."""

from __future__ import annotations

import inspect

from moe_plugin.metrics.alarms import CHECKS, Limits

INTRODUCTION = """# Alarms

Made by `make reference` from `moe_plugin/metrics/alarms.py`. [Alarms](../alarms.md) shows how to receive them.

| alarm | what is found | what to do |
|---|---|---|
"""
LIMITS = """
The default limits, in optimizer steps: `Limits(dead_steps={dead_steps}, trend_steps={trend_steps})`. Each alarm is
raised once per router.
"""


def alarms_page() -> str:
    """Return a table of all alarms."""
    rows = (f"| {kind} | {_found(check)} | {cure} |\n" for kind, (check, cure) in CHECKS.items())
    return INTRODUCTION + "".join(rows) + LIMITS.format(**vars(Limits()))


def _found(check: object) -> str:
    """Return what a check finds: its docstring is "Find what is wrong."."""
    return (inspect.getdoc(check) or "").splitlines()[0].removeprefix("Find ").rstrip(".")
