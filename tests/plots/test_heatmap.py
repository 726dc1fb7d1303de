from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_plugin.plots import load_heatmap
from moe_plugin.plots.colors import ABSENT, DEAD, amount_colors, load_colors
from moe_plugin.plots.grid import Grid
from moe_plugin.plots.heatmap import Axis, heatmap
from tests.plots.cells import cell_color, cell_colors


def mixed(first: str, second: str, part: float) -> list[int]:
    """A colour between two of the scale's, by Ottosson's OKLab with its published constants, number by number."""
    labs = []
    for color in (first, second):
        srgb = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in srgb)
        long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
        middle = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
        short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
        labs.append(
            (
                0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
                1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
                0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
            )
        )
    lightness, a, b = (x + part * (y - x) for x, y in zip(*labs, strict=True))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return [round(255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055)) for c in linear]


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

    def test_known_load_has_the_published_colors(self):
        image = load_heatmap({"a": torch.tensor([8, 4, 2, 2, 0, 8]), "b": torch.tensor([80, 0, 0, 0])})
        twice, half, over = (
            mixed("fad6ad", "f2a154", 1 / 3),
            mixed("7fb2dc", "c9dfee", 2 / 3),
            mixed("f2a154", "cf6415", 2 / 3),
        )
        ideal, dead, paper = [0xF5, 0xF3, 0xEE], [22, 22, 26], [255, 255, 255]
        expected = [[twice, ideal, half, half, dead, twice], [over, dead, dead, dead, paper, paper]]
        # The scale has 255 shades: the nearest one is at most three steps of a channel away.
        assert np.abs(np.array(cell_colors(image, Grid.fit(2, 6))) - np.array(expected)).max() <= 3

    def test_cells_are_filled_up_to_a_gap_of_paper(self):
        image, grid = load_heatmap({"a": torch.tensor([3, 1]), "b": torch.tensor([2, 2])}), Grid.fit(2, 2)
        (x, y), (width, height) = grid.origin, grid.cell
        for row in range(2):
            for column in range(2):
                cell = image[:, y + row * height :, x + column * width :][:, :height, :width]
                assert (cell[:, :-1, :-1] == cell[:, :1, :1]).all()
                assert (cell[:, -1] == 255).all()
                assert (cell[:, :, -1] == 255).all()


class TestHeatmap:
    def test_bar_runs_through_the_scale_from_its_end_down(self):
        places = np.zeros((1, 1))
        image = heatmap(
            places, Axis("row", ["a"]), Axis("column", ["b"]), {1.0: "all", 0.0: "none"}, colors=amount_colors
        )
        grid = Grid.fit(1, 1)
        x, top = grid.origin[0] + grid.size[0] + 18, grid.origin[1]
        shown = image[:, top : top + 200, x].T.tolist()  # a bar is never shorter
        assert shown == amount_colors(np.linspace(1, 0, 200)).tolist()
