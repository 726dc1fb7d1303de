from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_plugin.plots import load_heatmap
from moe_plugin.plots.colors import ABSENT, DEAD, load_colors
from moe_plugin.plots.heatmap import Grid


def cell_color(image: np.ndarray, grid: Grid, layer: int, expert: int) -> list[int]:
    """A pixel near the upper left corner of a cell, off the cross of dead experts."""
    x = grid.origin[0] + expert * grid.cell[0] + 1
    y = grid.origin[1] + layer * grid.cell[1] + 1
    return image[:, y, x].tolist()


class TestLoadHeatmap:
    @pytest.mark.parametrize(("layers", "experts"), [(1, 2), (4, 16), (12, 64), (60, 256)])
    def test_each_cell_has_the_color_of_its_load(self, layers, experts):
        counts_LE = torch.randint(0, 9, (layers, experts))
        counts_LE[:, 0] = 1
        image = load_heatmap({f"layer{i}": row for i, row in enumerate(counts_LE)})
        grid = Grid.fit(layers, experts)
        for layer, load in enumerate(counts_LE.tolist()):
            for expert, tokens in enumerate(load):
                octaves = math.log2(tokens * experts / sum(load)) if tokens else -math.inf
                expected = load_colors(np.array([octaves]))[0].astype(int)
                assert np.abs(expected - cell_color(image, grid, layer, expert)).max() <= 3

    def test_picture_is_uint8_channels_first_and_small(self):
        image = load_heatmap({str(layer): torch.ones(256, dtype=torch.int64) for layer in range(60)}, "title")
        assert image.dtype == np.uint8
        assert image.shape[0] == 3
        assert max(image.shape) < 1300

    def test_dead_expert_is_black_and_crossed_out(self):
        image, grid = load_heatmap({"a": torch.tensor([0, 4])}), Grid.fit(1, 2)
        assert cell_color(image, grid, 0, 0) == list(DEAD)
        x, y = grid.center(0, 0)
        assert image[:, y, x].tolist() == [255, 255, 255]

    def test_layers_of_different_size_leave_paper_past_the_last_expert(self):
        image = load_heatmap({"a": torch.ones(4, dtype=torch.int64), "b": torch.ones(2, dtype=torch.int64)})
        grid = Grid.fit(2, 4)
        assert cell_color(image, grid, 1, 1) == cell_color(image, grid, 0, 3)
        assert cell_color(image, grid, 1, 2) == list(ABSENT)
