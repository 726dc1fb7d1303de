"""An inspection as a table for the terminal; layers that are alike share a line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_plugin.apps.inspection.sites import BiasStatistics, Inspection, RoutingSite
from moe_plugin.apps.received.printable import printable


def inspection_table(inspection: Inspection, *, every_layer: bool = False) -> Group:
    """Return what was found; print it with a `rich.console.Console`.

    Args:
        inspection: What to show.
        every_layer: Show a line for each router; by default layers that are alike share one.
    """
    parts: list[RenderableType] = []
    if inspection.sites:
        parts.append(_sites(inspection, every_layer))
    for title, reasons, style in (
        ("Refused", inspection.refused, "yellow"),
        ("Not understood", inspection.strangers, "red"),
    ):
        parts += [
            Text.assemble(
                (f"{title}: ", f"bold {style}"), printable(f"{name or '(the model itself)'}: {reason}.")
            )
            for name, reason in reasons.items()
        ]
    parts.append(Text(_verdict(inspection), style="bold"))
    return Group(*parts)


def _verdict(inspection: Inspection) -> str:
    """Return what balancing would do with the model, in a sentence."""
    if inspection.strangers:
        return "balance_() refuses this model: write an Adapter for what is not understood, or name 'sites' without it."
    if not inspection.sites:
        return "No router that can be balanced was found."
    owned = sum(site.bias_key is not None for site in inspection.sites)
    where = {0: "a sidecar file, since none is the model's own", len(inspection.sites): "its own checkpoint"}
    kept = where.get(owned, f"its own checkpoint for {owned} of them, a sidecar file for the rest")
    return f"balance_() would drive {len(inspection.sites)} routers; the biases live in {kept}."


def _sites(inspection: Inspection, every_layer: bool) -> Table:
    table = Table(
        title=Text(f"Routing sites of {printable(inspection.model)}"),
        title_justify="left",
        title_style="bold",
    )
    table.add_column("router", overflow="fold")
    table.add_column("class", overflow="fold")
    for heading in ("experts", "k", "groups"):
        table.add_column(heading, justify="right")
    table.add_column("score")
    table.add_column("driven by")
    table.add_column("bias", justify="right")
    for sites in [[site] for site in inspection.sites] if every_layer else _alike(inspection.sites):
        first = sites[0]
        driven = first.driven if first.is_proven else f"{first.driven} (read from names)"
        groups = str(first.groups) if first.groups > 1 else "–"  # noqa: RUF001
        numbers = (str(first.num_experts), str(first.top_k), groups)
        cells = (_names(sites), first.router, *numbers, first.score, driven, _biases(sites))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _alike(sites: Sequence[RoutingSite]) -> list[list[RoutingSite]]:
    """Return groups of neighbouring routers that differ only in their layer and the values of their bias."""
    return [list(group) for _, group in groupby(sites, _kind)]


def _kind(site: RoutingSite) -> RoutingSite:
    key = site.bias_key and re.sub(r"\d+", "#", site.bias_key)
    return replace(site, name=re.sub(r"\d+", "#", site.name), bias_key=key, bias=None)


def _names(sites: Sequence[RoutingSite]) -> str:
    first, last = sites[0].name, sites[-1].name
    if len(sites) == 1:
        return first or "(the model itself)"
    pairs = zip(re.split(r"(\d+)", first), re.split(r"(\d+)", last), strict=True)
    name = "".join(a if a == b else f"{{{a}..{b}}}" for a, b in pairs)
    return f"{name}  ×{len(sites)}"  # noqa: RUF001


def _biases(sites: Sequence[RoutingSite]) -> str:
    known: list[BiasStatistics] = [site.bias for site in sites if site.bias is not None]
    if not known:
        return "–"  # noqa: RUF001
    lowest, highest = min(bias.lowest for bias in known), max(bias.highest for bias in known)
    deviation = sum(bias.deviation for bias in known) / len(known)
    return f"{lowest:.3g} to {highest:.3g}, sd {deviation:.2g}" if lowest != highest else f"all {lowest:.3g}"
