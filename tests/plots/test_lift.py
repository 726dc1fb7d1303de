from __future__ import annotations

import math

import numpy as np

from moe_plugin.plots.colors import ABSENT, DEAD, load_colors
from moe_plugin.plots.lift import coactivation_heatmap, lift_heatmap
from tests.plots.cells import cell_colors, grid_of


def color(octave: float) -> list[int]:
    return load_colors(np.array([octave]))[0].tolist()


class TestLiftHeatmap:
    def test_cells_are_shares_of_a_kind_over_shares_of_all(self):
        first, second = [[30, 10], [0, 20], [5, 5]], [[8, 0, 4], [2, 6, 0], [10, 0, 0]]
        kinds = ["code", "prose", "a long name"]
        image = lift_heatmap({"0": np.array(first), "1": np.array(second)}, kinds)
        names = [f"{layer}  {kind}" for layer in (0, 1) for kind in kinds]
        expected = []
        for table in (first, second):
            total = sum(map(sum, table))
            for row in table:
                cells = [
                    tokens / sum(row) / (sum(each[expert] for each in table) / total)
                    for expert, tokens in enumerate(row)
                ]
                colors = [color(math.log2(ratio)) if ratio else list(DEAD) for ratio in cells]
                expected.append(colors + [list(ABSENT)] * (3 - len(row)))
        assert cell_colors(image, grid_of(6, 3, names)) == expected


class TestCoactivation:
    def test_pairs_are_compared_with_chance_and_the_diagonal_is_left_out(self):
        pairs = [[900, 6, 2], [6, 700, 0], [2, 0, 500]]
        image = coactivation_heatmap(np.array(pairs))
        used = [8, 6, 2]  # pairs of each expert with the others, 16 in all
        expected = [
            [
                list(ABSENT)
                if a == b
                else color(math.log2(max(pairs[a][b] * 16 / (used[a] * used[b]), 2**-3)))
                for b in range(3)
            ]
            for a in range(3)
        ]
        assert cell_colors(image, grid_of(3, 3)) == expected
