"""The experts with most and fewest tokens, by name, as text: a heatmap of 60 x 256 experts does not show numbers."""

from __future__ import annotations

from collections.abc import Mapping

from moe_plugin.metrics import LayerLoad
from moe_plugin.metrics.router_names import short_names

LAYERS, EXPERTS = 8, 4
"""Layers that are named, those with the largest MaxVio, and experts at each end of them."""


def extreme_experts(loads: Mapping[str, LayerLoad]) -> str:
    """Return a Markdown table of the least balanced layers, with the load of an expert over the mean load."""
    short = short_names(loads)
    worst = sorted(loads.items(), key=lambda item: -item[1].max_violation_global)[:LAYERS]
    rows = [
        f"| `{short[name]}` | {load.max_violation_global:.2f} | {' · '.join(most)} | {' · '.join(least)} |"
        for name, load in worst
        for most, least in [_ends(load.tokens_per_expert)]
    ]
    return "\n".join(["| layer | MaxVio | most loaded | least loaded |", "|---|---|---|---|", *rows])


def _ends(tokens: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """Return the experts at both ends, each the most extreme first; none is in both."""
    mean = sum(tokens) / len(tokens) or 1.0
    ordered = sorted(range(len(tokens)), key=lambda expert: (-tokens[expert], expert))
    named = [f"{expert} ({tokens[expert] / mean:.2f})" for expert in ordered]
    size = min(EXPERTS, len(named) // 2)
    return named[:size], named[::-1][:size]
