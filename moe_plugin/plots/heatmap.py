"""A grid of coloured cells with labels, drawn without matplotlib to be cheap in a training loop.

Shape legend: R rows, C columns, L MoE layers, E experts (of the layer that has most), H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_plugin.metrics import stack_layers
from moe_plugin.metrics.router_names import short_names
from moe_plugin.plots.colors import DEAD, ink_on, load_colors, load_octaves
from moe_plugin.plots.grid import LEFT, SHORTEST, Grid

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

INK = (52, 52, 60)
FAINT = (130, 130, 140)
PAPER = (255, 255, 255)
FONT_PIXELS = 24
"""Readable at half the size, as TensorBoard shows pictures."""
LINE = FONT_PIXELS + 2
NAMED = 48
"""The most rows whose names are all shown, if they are no numbers."""
LOAD_BAR = {3.0: "8x", 2.0: "4x", 1.0: "2x", 0.0: "ideal", -1.0: "1/2", -2.0: "1/4", -3.0: "1/8"}
"""Labels of the colour bar, by place on the scale of `load_colors`."""


@dataclass(frozen=True)
class Axis:
    """The names of rows or columns: one for all of them, and one for each."""

    title: str
    names: Sequence[str]

    @classmethod
    def numbered(cls, title: str, count: int) -> Axis:
        """Return an axis of `count` numbers from 0; see `Axis`."""
        return cls(title, [str(place) for place in range(count)])


def layer_axis(names: Iterable[str]) -> Axis:
    """Return an axis of routers: the numbers of their layers if they differ in nothing else."""
    short = list(short_names(names).values())
    numbers = [name.rpartition(".")[2] for name in short]
    is_stack = len({name.rpartition(".")[0] for name in short}) == 1 and all(map(str.isdecimal, numbers))
    return Axis("layer", numbers if is_stack else short)


def load_heatmap(counts: Mapping[str, Tensor], title: str = "") -> np.ndarray:
    """Draw the load of each expert of each layer as log2 of load over ideal load.

    White is the ideal, blue is below, orange above, up to eight-fold; a black cell is an expert without tokens.
    Layers run downwards in the order of the mapping.

    Args:
        counts: Tokens per expert of each layer; int64 (E,), E may differ.
        title: A line above the picture.

    Returns:
        uint8 (3, H, W), RGB.
    """
    sizes_L = torch.tensor([len(count) for count in counts.values()])
    octaves_LE = load_octaves(stack_layers(counts), sizes_L)
    rows, columns = layer_axis(counts), Axis.numbered("expert", octaves_LE.shape[1])
    return heatmap(octaves_LE, rows, columns, LOAD_BAR, title, dead="dead")


def heatmap(
    places_RC: np.ndarray,
    rows: Axis,
    columns: Axis,
    bar: Mapping[float, str],
    title: str = "",
    dead: str | None = None,
    colors: Callable[[np.ndarray], np.ndarray] = load_colors,
    texts: Sequence[Sequence[str]] = (),
) -> np.ndarray:
    """Draw cells in the colours of a scale.

    Args:
        places_RC: Places on the scale, with `load_colors` from -3 to 3; -inf is black and crossed out, NaN is empty.
        rows: Names of the rows, from above.
        columns: Names of the columns.
        bar: Labels of the colour bar by place on the scale.
        title: A line above the picture.
        dead: The meaning of a black cell; None if there is none.
        colors: The scale.
        texts: Written into the cells, row by row, if these are large enough.

    Returns:
        uint8 (3, H, W), RGB.
    """
    from PIL import Image, ImageDraw

    grid = grid_of(rows, columns)
    pixels = np.full((*reversed(grid.canvas), 3), PAPER, dtype=np.uint8)
    colors_RC3 = colors(places_RC)
    _paint_cells_(pixels, colors_RC3, grid)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    _cross_out_(draw, np.isneginf(places_RC), grid)
    _write_cells_(draw, texts, ink_on(colors_RC3), grid)
    _label_(draw, grid, rows, columns, title)
    _color_bar_(draw, grid, bar, dead, colors)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def grid_of(rows: Axis, columns: Axis) -> Grid:
    """Return the places of a heatmap's cells; see `heatmap`."""
    names = (*rows.names, rows.title, columns.title)
    left = max(LEFT, 16 + round(max(font().getlength(name) for name in names)))
    are_shown = len(rows.names) <= NAMED and not all(name.isdecimal() for name in rows.names)
    return Grid.fit(len(rows.names), len(columns.names), left, LINE if are_shown else 2)


def _paint_cells_(pixels: np.ndarray, colors_RC3: np.ndarray, grid: Grid) -> None:
    cells = colors_RC3.repeat(grid.cell[1], axis=0).repeat(grid.cell[0], axis=1)
    if grid.gap:
        cells[grid.cell[1] - 1 :: grid.cell[1]] = PAPER
        cells[:, grid.cell[0] - 1 :: grid.cell[0]] = PAPER
    (x, y), (width, height) = grid.origin, grid.size
    pixels[y : y + height, x : x + width] = cells


def _cross_out_(draw: ImageDraw, dead_RC: np.ndarray, grid: Grid) -> None:
    arm = min(grid.cell) // 4
    if arm < 2:
        return
    for row, column in np.argwhere(dead_RC).tolist():
        x, y = grid.center(row, column)
        draw.line((x - arm, y - arm, x + arm, y + arm), fill=PAPER)
        draw.line((x - arm, y + arm, x + arm, y - arm), fill=PAPER)


def _write_cells_(draw: ImageDraw, texts: Sequence[Sequence[str]], white_RC: np.ndarray, grid: Grid) -> None:
    face, room = font(), (grid.cell[0] - 4, grid.cell[1] - 2)
    for row, line in enumerate(texts if room[1] >= FONT_PIXELS else ()):
        for column, text in enumerate(line):
            if face.getlength(text) <= room[0]:
                fill = PAPER if white_RC[row, column] else INK
                draw.text(grid.center(row, column), text, fill=fill, font=face, anchor="mm")


def _label_(draw: ImageDraw, grid: Grid, rows: Axis, columns: Axis, title: str) -> None:
    (x, y), height = grid.origin, grid.size[1]
    face = font()
    draw.text((x, y - 12), title, fill=INK, font=face, anchor="ls")
    widest = max(round(face.getlength(name)) for name in columns.names) + 16
    for row in range(0, grid.rows, _stride(grid.cell[1], LINE)):
        draw.text((x - 7, grid.center(row, 0)[1]), rows.names[row], fill=INK, font=face, anchor="rm")
    for column in range(0, grid.columns, _stride(grid.cell[0], widest)):
        place = grid.center(0, column)[0], y + height + 8
        draw.text(place, columns.names[column], fill=INK, font=face, anchor="mt")
    draw.text((x - 7, y + height + 8), columns.title, fill=FAINT, font=face, anchor="rt")
    draw.text((x - 7, y - 12), rows.title, fill=FAINT, font=face, anchor="rs")


def _color_bar_(
    draw: ImageDraw,
    grid: Grid,
    bar: Mapping[float, str],
    dead: str | None,
    colors: Callable[[np.ndarray], np.ndarray],
) -> None:
    x, top = grid.origin[0] + grid.size[0] + 18, grid.origin[1]
    height = max(grid.size[1], SHORTEST) - 36
    lowest, highest = min(bar), max(bar)
    for row, color in enumerate(colors(np.linspace(highest, lowest, height)).tolist()):
        draw.line((x, top + row, x + 20, top + row), fill=tuple(color))
    for place, label in bar.items():
        row = top + (highest - place) / (highest - lowest) * (height - 1)
        draw.text((x + 27, row), label, fill=INK, font=font(), anchor="lm")
    if dead is not None:
        below = top + height + 16
        draw.rectangle((x, below, x + 20, below + 20), fill=DEAD)
        draw.text((x + 27, below + 10), dead, fill=INK, font=font(), anchor="lm")


@cache
def font() -> FreeTypeFont | ImageFont:
    """Return the font of pictures drawn without matplotlib."""
    from PIL import ImageFont

    return ImageFont.load_default(FONT_PIXELS)


def _stride(cell: int, least: int) -> int:
    """Return how many cells to go from label to label (1, 2, 4, 8, ...) if these are `least` pixels apart."""
    stride = 1
    while stride * cell < least:
        stride *= 2
    return stride
