"""How load, bias and the bias's part in the choices change over training; uint8 (3, H, W), RGB. Time runs downwards.

Shape legend: N windows of training steps, E experts, L layers, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from moe_plugin.plots.colors import OCTAVES, amount_colors, load_octaves
from moe_plugin.plots.heatmap import LOAD_BAR, Axis, heatmap, layer_axis


def load_over_time(tokens_NE: np.ndarray, steps: Sequence[int], title: str = "") -> np.ndarray:
    """Draw the load of each expert in each window, as log2 of load over ideal load.

    Args:
        tokens_NE: Tokens per expert of each window; integers.
        steps: The step at each window's end.
        title: A line above the picture.
    """
    octaves_NE = load_octaves(torch.from_numpy(tokens_NE))
    return heatmap(octaves_NE, _steps(steps), _experts(tokens_NE), LOAD_BAR, title, dead="dead")


def bias_over_time(bias_NE: np.ndarray, steps: Sequence[int], title: str = "") -> np.ndarray:
    """Draw the bias of each expert at the end of each window, on a scale that ends at a power of two.

    Args:
        bias_NE: Biases; floating point.
        steps: The step at each window's end.
        title: A line above the picture.
    """
    largest = float(np.abs(bias_NE).max())
    end = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0
    bar = {OCTAVES * part: f"{end * part:+.3g}" if part else "0" for part in (1.0, 0.5, 0.0, -0.5, -1.0)}
    return heatmap(bias_NE / end * OCTAVES, _steps(steps), _experts(bias_NE), bar, title)


def flips_over_time(flips_NL: np.ndarray, steps: Sequence[int], layers: Sequence[str]) -> np.ndarray:
    """Draw the share of the choices that the bias made against the scores.

    Args:
        flips_NL: Shares from 0 to 1, NaN if a layer was not looked at.
        steps: The step at each window's end.
        layers: Names of the routers.
    """
    title = "choices that the bias flips"
    bar = {1.0: "50%", 0.5: "25%", 0.0: "none"}
    return heatmap(2 * flips_NL, _steps(steps), layer_axis(layers), bar, title, colors=amount_colors)


def _steps(steps: Sequence[int]) -> Axis:
    return Axis("step", [str(step) for step in steps])


def _experts(values_NE: np.ndarray) -> Axis:
    return Axis.numbered("expert", values_NE.shape[1])
