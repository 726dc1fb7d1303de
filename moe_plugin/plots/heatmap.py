"""A layer x expert picture of the load, drawn without matplotlib: cheap enough for a training loop.

Shape legend: L MoE layers, E experts (of the layer that has most), H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_plugin.metrics import stack_layers
from moe_plugin.plots.colors import DEAD, OCTAVES, load_colors, load_octaves

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

INK = (52, 52, 60)
FAINT = (130, 130, 140)
PAPER = (255, 255, 255)
FONT_PIXELS = 13
_BAR_LABELS = {3: "8x", 2: "4x", 1: "2x", 0: "ideal", -1: "1/2", -2: "1/4", -3: "1/8"}


@dataclass(frozen=True)
class Grid:
    """Where the cells of a heatmap lie, in pixels.

    Attributes:
        layers: L.
        experts: E.
        cell: Width and height of a cell, the gap to the next one included.
        origin: x and y of the first cell.
    """

    layers: int
    experts: int
    cell: tuple[int, int]
    origin: tuple[int, int] = (52, 30)

    @classmethod
    def fit(cls, layers: int, experts: int) -> Grid:
        """The largest cells with which the picture stays near 800 x 500, and never too small to see."""
        return cls(layers, experts, cell=(_within(800 // experts, 4, 44), _within(480 // layers, 8, 36)))

    @property
    def gap(self) -> int:
        """Pixels of paper between cells: none where they are too narrow to spare one."""
        return 1 if min(self.cell) >= 8 else 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of all cells together."""
        return self.experts * self.cell[0], self.layers * self.cell[1]

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height of the picture with its labels and colour bar."""
        (x, y), (width, height) = self.origin, self.size
        return max(x + width + 92, 380), max(y + height, 190) + 40

    def center(self, layer: int, expert: int) -> tuple[int, int]:
        """The middle of a cell, x and y."""
        return (
            self.origin[0] + expert * self.cell[0] + (self.cell[0] - self.gap) // 2,
            self.origin[1] + layer * self.cell[1] + (self.cell[1] - self.gap) // 2,
        )


def load_heatmap(counts: Mapping[str, Tensor], title: str = "") -> np.ndarray:
    """Draw the load of each expert of each layer as log2 of load over ideal load.

    White is the ideal, blue below, orange above, up to eight-fold; a black cell is an expert without tokens.
    Layers run downwards from 0 in the order of the mapping.

    Args:
        counts: Tokens per expert of each layer; int64 (E,), E may differ.
        title: A line above the picture.

    Returns:
        uint8 (3, H, W), RGB.
    """
    from PIL import Image, ImageDraw

    sizes_L = torch.tensor([len(count) for count in counts.values()])
    octaves_LE = load_octaves(stack_layers(counts), sizes_L)
    grid = Grid.fit(*octaves_LE.shape)
    pixels = np.full((*reversed(grid.canvas), 3), PAPER, dtype=np.uint8)
    _paint_cells_(pixels, load_colors(octaves_LE), grid)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    _cross_out_(draw, np.isneginf(octaves_LE), grid)
    _label_(draw, grid, title)
    _color_bar_(draw, grid)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _paint_cells_(pixels: np.ndarray, colors_LE3: np.ndarray, grid: Grid) -> None:
    cells = colors_LE3.repeat(grid.cell[1], axis=0).repeat(grid.cell[0], axis=1)
    if grid.gap:
        cells[grid.cell[1] - 1 :: grid.cell[1]] = PAPER
        cells[:, grid.cell[0] - 1 :: grid.cell[0]] = PAPER
    (x, y), (width, height) = grid.origin, grid.size
    pixels[y : y + height, x : x + width] = cells


def _cross_out_(draw: ImageDraw, dead_LE: np.ndarray, grid: Grid) -> None:
    arm = min(grid.cell) // 4
    if arm < 2:
        return
    for layer, expert in np.argwhere(dead_LE).tolist():
        x, y = grid.center(layer, expert)
        draw.line((x - arm, y - arm, x + arm, y + arm), fill=PAPER)
        draw.line((x - arm, y + arm, x + arm, y - arm), fill=PAPER)


def _label_(draw: ImageDraw, grid: Grid, title: str) -> None:
    (x, y), height = grid.origin, grid.size[1]
    font = _font()
    draw.text((x, y - 10), title, fill=INK, font=font, anchor="ls")
    for layer in range(0, grid.layers, _stride(grid.cell[1], 16)):
        draw.text((x - 7, grid.center(layer, 0)[1]), str(layer), fill=INK, font=font, anchor="rm")
    for expert in range(0, grid.experts, _stride(grid.cell[0], 30)):
        draw.text((grid.center(0, expert)[0], y + height + 5), str(expert), fill=INK, font=font, anchor="mt")
    draw.text((x, y + height + 22), "expert", fill=FAINT, font=font, anchor="lt")
    draw.text((x - 7, y - 10), "layer", fill=FAINT, font=font, anchor="rs")


def _color_bar_(draw: ImageDraw, grid: Grid) -> None:
    x, top, height = grid.origin[0] + grid.size[0] + 22, grid.origin[1], max(grid.size[1] - 26, 130)
    ramp = load_colors(np.linspace(OCTAVES, -OCTAVES, height))
    for row, color in enumerate(ramp.tolist()):
        draw.line((x, top + row, x + 13, top + row), fill=tuple(color))
    for octave, label in _BAR_LABELS.items():
        row = top + (OCTAVES - octave) / (2 * OCTAVES) * (height - 1)
        draw.text((x + 20, row), label, fill=INK, font=_font(), anchor="lm")
    below = top + height + 10
    draw.rectangle((x, below, x + 13, below + 13), fill=DEAD)
    draw.text((x + 20, below + 7), "dead", fill=INK, font=_font(), anchor="lm")


@cache
def _font() -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(FONT_PIXELS)


def _stride(cell: int, least: int) -> int:
    """Label every 1st, 2nd, 4th, 8th, ... cell, so that labels are `least` pixels apart."""
    stride = 1
    while stride * cell < least:
        stride *= 2
    return stride


def _within(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
