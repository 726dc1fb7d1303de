from __future__ import annotations

import numpy as np

from moe_plugin.plots.colors import amount_scale, diverging_scale
from moe_plugin.plots.experts_per_token import by_kind, by_loss, distribution
from tests.plots.cells import cell_colors, grid_of

BELOW, MIDDLE, ABOVE = (diverging_scale()[shade].tolist() for shade in (0, 127, 254))


class TestDistribution:
    def test_cells_are_shares_of_a_layers_tokens(self):
        image = distribution([[0, 30, 10], [5, 5, 0]])
        shares = [[0.0, 0.75, 0.25], [0.5, 0.5, 0.0]]
        expected = [[amount_scale()[round(254 * share)].tolist() for share in row] for row in shares]
        assert cell_colors(image, grid_of(2, 3)) == expected


class TestRatios:
    def test_scale_ends_at_half_and_twice_the_layers_mean(self):
        table = {"names": ["a kind with a long name", "b", "c"], "means": [[2.0, 4.0, 1.0], [0.5, 0.0, 3.0]]}
        image = by_kind(table, [2.0, 0.5], "domain")
        expected = [[MIDDLE, MIDDLE], [ABOVE, BELOW], [BELOW, ABOVE]]
        assert cell_colors(image, grid_of(3, 2, table["names"])) == expected

    def test_losses_name_the_rows(self):
        table = {"losses": [0.5, 2.0], "means": [[1.0, 3.0]]}
        grid = grid_of(2, 1, ["loss 0.5", "loss 2"])
        # log2(1.5) octaves from the mean, where the scale ends at one.
        shade = diverging_scale()[round(127 + 127 * np.log2(1.5))].tolist()
        assert cell_colors(by_loss(table, [2.0]), grid) == [[BELOW], [shade]]
