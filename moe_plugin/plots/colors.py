"""The colours of load: a diverging scale centred on the ideal load, and a plain one for amounts.

Blue is below the ideal, orange above, and lightness alone shows how far, so the scale can be read with any
kind of colour blindness and in grey. It is fixed: the same colour means the same load in every picture.

Shape legend: L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from moe_plugin.metrics import experts_per_layer

OCTAVES = 3.0
"""The scale ends at an eighth of the ideal load and at eight times the ideal load."""

DEAD = (22, 22, 26)
"""An expert without tokens: near-black, which is not on the scale."""

ABSENT = (255, 255, 255)
"""Past the last expert of a layer with fewer experts than the others."""

_AMOUNTS = ["f3f6fa", "c9dfee", "7fb2dc", "2f72b8", "123a7c"]
_ANCHORS = ["123a7c", "2f72b8", "7fb2dc", "c9dfee", "f5f3ee", "fad6ad", "f2a154", "cf6415", "7d2a08"]
_SHADES = 255

# Björn Ottosson's OKLab: mixing colours there keeps lightness and hue even along the way.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def diverging_scale(shades: int = _SHADES) -> np.ndarray:
    """Return the scale from an eighth of the ideal load to eight times the ideal; uint8 (shades, 3), RGB."""
    return _mixed(_ANCHORS, shades)


def amount_scale(shades: int = _SHADES) -> np.ndarray:
    """Return the scale from nothing, near white, to all, dark blue; uint8 (shades, 3), RGB."""
    return _mixed(_AMOUNTS, shades)


def amount_colors(shares: np.ndarray) -> np.ndarray:
    """Return the colours of shares from 0 to 1 of any shape, white for NaN; uint8 (..., 3), RGB."""
    colors = _AMOUNT_SCALE[np.rint(np.nan_to_num(shares).clip(0, 1) * (_SHADES - 1)).astype(np.int64)]
    colors[np.isnan(shares)] = ABSENT
    return colors


def ink_on(colors: np.ndarray) -> np.ndarray:
    """Return whether text on each background should be white; bool (...)."""
    return _linear(colors / 255) @ np.array([0.2126, 0.7152, 0.0722]) < 0.19


def load_octaves(tokens_per_expert: Tensor, num_experts: Tensor | None = None) -> np.ndarray:
    """Return how far each expert is from the ideal load, `log2(load / ideal)`.

    Args:
        tokens_per_expert: Counts; integer (L, E). Rows of layers with fewer experts end in any values.
        num_experts: How many experts each layer really has; int64 (L,). E if left out.

    Returns:
        float64 (L, E): -inf for an expert without tokens, NaN past the last expert of a layer.
    """
    experts_L1 = experts_per_layer(tokens_per_expert, num_experts).cpu().numpy()[:, None]
    present_LE = np.arange(tokens_per_expert.shape[-1]) < experts_L1
    tokens_LE = np.where(present_LE, tokens_per_expert.cpu().numpy(), 0)
    ideal_L1 = tokens_LE.sum(-1, keepdims=True) / experts_L1
    with np.errstate(divide="ignore"):
        octaves_LE = np.log2(tokens_LE) - np.log2(np.maximum(ideal_L1, 1 / experts_L1))
    return np.where(present_LE, octaves_LE, np.nan)


def load_colors(octaves: np.ndarray) -> np.ndarray:
    """Return the colours of `load_octaves` of any shape; uint8 (..., 3), RGB."""
    place = (octaves.clip(-OCTAVES, OCTAVES) + OCTAVES) / (2 * OCTAVES) * (_SHADES - 1)
    colors = _SCALE[np.rint(np.nan_to_num(place)).astype(np.int64)]
    colors[np.isneginf(octaves)] = DEAD
    colors[np.isnan(octaves)] = ABSENT
    return colors


def _mixed(hexes: list[str], shades: int) -> np.ndarray:
    anchors = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in hexes])
    lab = np.cbrt(_linear(anchors / 255) @ _TO_CONES.T) @ _TO_LAB.T
    at, known = np.linspace(0, 1, shades), np.linspace(0, 1, len(anchors))
    mixed = np.stack([np.interp(at, known, channel) for channel in lab.T], axis=-1)
    linear = (mixed @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_CONES).T
    return np.rint(255 * _gamma(linear.clip(0, 1))).astype(np.uint8)


def _linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _gamma(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


_SCALE = diverging_scale()
_AMOUNT_SCALE = amount_scale()
