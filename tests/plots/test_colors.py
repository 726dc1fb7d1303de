from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from moe_plugin.plots.colors import ABSENT, DEAD, diverging_scale, load_colors, load_octaves


def luminance(color: np.ndarray) -> float:
    return float(np.asarray(color) @ [0.2126, 0.7152, 0.0722])


class TestDivergingScale:
    def test_lightness_falls_from_the_middle_to_both_ends(self):
        lightness = [luminance(color) for color in diverging_scale(255)]
        assert all(a <= b + 1 for a, b in pairwise(lightness[:128]))
        assert all(a >= b - 1 for a, b in pairwise(lightness[127:]))

    def test_below_is_blue_and_above_is_orange(self):
        scale = diverging_scale(255).astype(int)
        assert (scale[:110, 2] > scale[:110, 0]).all()
        assert (scale[145:, 0] > scale[145:, 2]).all()

    def test_no_shade_is_as_dark_as_a_dead_expert(self):
        assert min(luminance(color) for color in diverging_scale()) > luminance(DEAD) + 20


class TestLoadOctaves:
    def test_known_loads_are_log2_of_load_over_ideal(self):
        assert load_octaves(torch.tensor([[4, 1, 2, 1], [16, 0, 0, 0]])).tolist() == [
            [1.0, -1.0, 0.0, -1.0],
            [2.0, -math.inf, -math.inf, -math.inf],
        ]

    def test_layer_with_fewer_experts_is_nan_past_its_last(self):
        octaves = load_octaves(torch.tensor([[1, 1, 2, 4], [3, 3, 0, 9]]), torch.tensor([4, 2]))
        assert octaves[1, :2].tolist() == [0.0, 0.0]
        assert np.isnan(octaves[1, 2:]).all()

    def test_layer_without_tokens_is_all_dead(self):
        assert np.isneginf(load_octaves(torch.zeros(1, 3, dtype=torch.int64))).all()


class TestLoadColors:
    def test_ideal_dead_and_absent_have_their_own_colors(self):
        colors = load_colors(np.array([0.0, -math.inf, math.nan]))
        assert colors.tolist() == [list(diverging_scale()[127]), list(DEAD), list(ABSENT)]

    @pytest.mark.parametrize(("beyond", "end"), [(9.0, -1), (-9.0, 0)])
    def test_loads_beyond_the_scale_have_the_color_of_its_end(self, beyond, end):
        assert load_colors(np.array([beyond]))[0].tolist() == diverging_scale()[end].tolist()
