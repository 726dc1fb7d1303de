"""Cells of heatmaps, found in the pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_plugin.plots import heatmap
from moe_plugin.plots.grid import Grid
from moe_plugin.plots.heatmap import Axis


def grid_of(rows: int, columns: int, names: Sequence[str] = ()) -> Grid:
    """The grid of a picture; `names` label its rows."""
    labels = Axis("", names) if names else Axis.numbered("", rows)
    return heatmap.grid_of(labels, Axis.numbered("", columns))


def cell_color(image: np.ndarray, grid: Grid, row: int, column: int) -> list[int]:
    """A pixel near the upper left corner of a cell, off the cross of dead experts and off any text."""
    x, y = (
        start + place * size + min(1, size - 1)
        for start, place, size in zip(grid.origin, (column, row), grid.cell, strict=True)
    )
    return image[:, y, x].tolist()


def cell_colors(image: np.ndarray, grid: Grid) -> list[list[list[int]]]:
    """The colours of all cells, row by row."""
    return [
        [cell_color(image, grid, row, column) for column in range(grid.columns)] for row in range(grid.rows)
    ]
