from __future__ import annotations

import math

import numpy as np

from moe_plugin.plots.colors import DEAD, amount_scale, diverging_scale
from moe_plugin.plots.over_time import bias_over_time, flips_over_time, load_over_time
from tests.plots.cells import cell_colors, grid_of

STEPS = [9, 19]


def shade(scale: np.ndarray, part: float) -> list[int]:
    """A colour of a scale of 255 shades by its part of the way from the first to the last."""
    return scale[round(254 * part)].tolist()


class TestLoad:
    def test_each_window_has_its_own_ideal(self):
        image = load_over_time(np.array([[12, 6, 0], [30, 10, 20]]), STEPS)
        octaves = [[math.log2(2), 0.0, None], [math.log2(1.5), -1.0, 0.0]]
        expected = [
            [list(DEAD) if octave is None else shade(diverging_scale(), (octave + 3) / 6) for octave in row]
            for row in octaves
        ]
        assert cell_colors(image, grid_of(2, 3)) == expected


class TestBias:
    def test_scale_ends_at_the_next_power_of_two(self):
        biases = [[0.0, 0.1, -0.3], [0.25, 0.3, 0.2]]  # the scale goes from -0.5 to 0.5
        image = bias_over_time(np.array(biases), STEPS)
        assert cell_colors(image, grid_of(2, 3)) == [
            [shade(diverging_scale(), bias + 0.5) for bias in row] for row in biases
        ]

    def test_no_bias_is_the_middle_of_the_scale(self):
        image = bias_over_time(np.zeros((2, 2)), STEPS)
        assert cell_colors(image, grid_of(2, 2)) == [[shade(diverging_scale(), 0.5)] * 2] * 2


class TestFlips:
    def test_half_of_the_choices_is_the_end_and_a_layer_that_was_not_seen_is_paper(self):
        image = flips_over_time(np.array([[0.0, 0.25], [np.nan, 0.5], [0.7, 0.1]]), [*STEPS, 29], ["0", "4"])
        shades = [[0.0, 0.5], [None, 1.0], [1.0, 0.2]]
        expected = [
            [[255] * 3 if part is None else shade(amount_scale(), part) for part in row] for row in shades
        ]
        assert cell_colors(image, grid_of(3, 2)) == expected
