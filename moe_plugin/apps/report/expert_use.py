"""What experts specialise in and how many each token uses, as the page shows it.

Shape legend: L layers, U numbers of experts used, G kinds of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moe_plugin.apps.received.regular_file import read_json
from moe_plugin.apps.report.cells import number_cell
from moe_plugin.apps.report.svg_charts import COLORS, Line, line_chart
from moe_plugin.metrics.router_names import short_names
from moe_plugin.plots.colors import amount_scale, ink_on, load_colors
from moe_plugin.plots.experts_per_token import ratio_places
from moe_plugin.plots.run_data import EXPERT_USE_FILE
from moe_plugin.plots.token_strip import LEVELS, Scale, TokenStrip

PROFILES = 512
"""The most experts described on a page, shared evenly by its runs, so it stays small."""
_INKS = ("#1c1c22", "#fff")
_DARK = ("1d2430", "223449", "284868", "31608f", "4a80b4", "74a6d2", "a5cbe9", "dcedfa")


@dataclass(frozen=True)
class Cell:
    """A number on a coloured background."""

    text: str
    style: str


@dataclass(frozen=True)
class UsedView:
    """How many experts the tokens of a run use.

    Attributes:
        bars: Share of each layer's tokens in percent, the number of experts they use, and the level of the background.
        measures: Target, mean, and the rank correlations with the loss, for each layer.
        tables: By kind of token, its kinds with a cell for each layer.
        chart: Mean number by the loss of the tokens, a line for each layer; empty without losses.
        legend: The number in the middle of each background level.
        texts: Title, and each token's level of background, text, and text on hovering.
    """

    bars: list[list[tuple[float, int, int]]]
    measures: list[list[str]]
    tables: dict[str, list[tuple[str, list[Cell]]]]
    chart: str
    legend: list[str]
    texts: list[tuple[str, list[tuple[int, str, str]]]]


def read_expert_use(folder: Path) -> dict[str, Any]:
    """Return the run's last record; empty without one."""
    files = sorted(folder.rglob(EXPERT_USE_FILE))
    return read_json(files[-1], EXPERT_USE_FILE) if files else {}


def used_view(use: Mapping[str, Any]) -> UsedView | None:
    """Return how many experts tokens use; None if their number never varies."""
    record = use.get("experts_per_token")
    if not record:
        return None
    strips = [TokenStrip.from_json(fields) for fields in record["text"]]
    scale = Scale.of(strips) if strips else Scale(0, 0)
    ends = scale.ends()
    return UsedView(
        bars=[_bar(tokens_U) for tokens_U in record["tokens"]],
        measures=_measures(record),
        tables={kind: _rows(table, record["means"]) for kind, table in record["by_kind"].items()},
        chart=_chart(record["by_loss"]),
        legend=[f"{(low + high) / 2:.1f}" for low, high in pairwise(ends)],
        texts=[(_title(strip), _tokens(strip, scale)) for strip in strips],
    )


def profiles(uses: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the layers of each run with their experts, at most `PROFILES` in all."""
    room = PROFILES // max(len(uses), 1)
    shown = []
    for use in uses:
        layers = use.get("experts") or []
        each = max(1, room // max(len(layers), 1))
        short = short_names(layer["layer"] for layer in layers)
        shown.append(
            [{"layer": short[layer["layer"]], "experts": layer["experts"][:each]} for layer in layers]
        )
    return shown


def ground_rules() -> str:
    """Return the CSS of the text's backgrounds and inks, for light and dark pages."""
    dark = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in _DARK])
    light_rule, dark_rule = (f":root{{{_variables(colors)}}}" for colors in (amount_scale(LEVELS), dark))
    return f"{light_rule}\n@media (prefers-color-scheme: dark) {{ {dark_rule} }}"


def _variables(colors: np.ndarray) -> str:
    return "".join(
        f"--g{level}:rgb{tuple(color.tolist())};--i{level}:{_INKS[white]};"
        for level, (color, white) in enumerate(zip(colors, ink_on(colors).astype(int), strict=True))
    )


def _bar(tokens_U: Sequence[int]) -> list[tuple[float, int, int]]:
    total, most = sum(tokens_U), len(tokens_U) - 1
    return [
        (round(100 * tokens / total, 2), number, min(LEVELS - 1, LEVELS * number // max(most, 1)))
        for number, tokens in enumerate(tokens_U)
        if tokens
    ]


def _measures(record: Mapping[str, Any]) -> list[list[str]]:
    losses = record["by_loss"] or {}
    columns = [
        record["target"],
        record["means"],
        losses.get("correlation"),
        losses.get("correlation_in_place"),
    ]
    layers = len(record["layers"])
    return [
        [number_cell(None if column is None else column[layer], ".2f") for column in columns]
        for layer in range(layers)
    ]


def _rows(table: Mapping[str, Any], means_L: Sequence[float]) -> list[tuple[str, list[Cell]]]:
    means_GL = np.array(table["means"]).T
    colors = load_colors(ratio_places(means_GL, means_L))
    inks = ink_on(colors).astype(int)
    return [
        (
            f"{name} ({tokens:,} tokens)",
            [
                Cell(f"{mean:.2f}", f"background:rgb{tuple(color.tolist())};color:{_INKS[ink]}")
                for mean, color, ink in zip(*of_kind, strict=True)
            ],
        )
        for name, tokens, *of_kind in zip(
            table["names"], table["tokens"], means_GL.tolist(), colors, inks, strict=True
        )
    ]


def _chart(by_loss: Mapping[str, Any] | None) -> str:
    if by_loss is None:
        return ""
    lines = [
        Line(f"layer {layer}", by_loss["losses"], means_Q, color=layer % COLORS)
        for layer, means_Q in enumerate(by_loss["means"])
    ]
    return line_chart(lines, "loss of the token, nats: the mean of each tenth of the tokens")


def _title(strip: TokenStrip) -> str:
    means = strip.means()
    return f"{strip.title}: {sum(means) / len(means):.2f} experts per token".lstrip(": ")


def _tokens(strip: TokenStrip, scale: Scale) -> list[tuple[int, str, str]]:
    losses = strip.losses or [None] * len(strip.pieces)
    return [
        (
            scale.level(mean),
            piece.replace("\n", "↵\n").replace("\0", "·"),
            f"{mean:.2f} experts" + ("" if loss is None else f", loss {loss:.2f}"),
        )
        for piece, mean, loss in zip(strip.pieces, strip.means(), losses, strict=True)
    ]
