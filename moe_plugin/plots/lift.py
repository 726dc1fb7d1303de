"""How much more often than by chance experts take a kind of token, or work together; pictures are uint8 (3, H, W), RGB.

Shape legend: G kinds of tokens (such as domains), E experts, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moe_plugin.plots.colors import OCTAVES
from moe_plugin.plots.heatmap import LOAD_BAR, Axis, heatmap, layer_axis

LIFT_BAR = LOAD_BAR | {0.0: "chance"}


def lift(counts_GE: np.ndarray) -> np.ndarray:
    """Return log2 of an expert's share of a kind's choices over its share of all choices; -inf without choices.

    Args:
        counts_GE: How often tokens of each kind chose each expert; integers.

    Returns:
        float64 (G, E); NaN for a kind without tokens or an expert without any.
    """
    total = max(counts_GE.sum(), 1)
    expected_GE = counts_GE.sum(1, keepdims=True) * counts_GE.sum(0, keepdims=True) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected_GE > 0, np.log2(counts_GE / expected_GE), np.nan)


def lift_heatmap(counts: Mapping[str, np.ndarray], kinds: Sequence[str], title: str = "") -> np.ndarray:
    """Draw the lift of each expert for each kind of token, layer under layer.

    Args:
        counts: By layer, how often tokens of each kind chose each expert; integers (G, E), E may differ.
        kinds: Names of the kinds.
        title: A line above the picture.
    """
    width = max(table.shape[1] for table in counts.values())
    rows = [
        np.pad(lift(table), ((0, 0), (0, width - table.shape[1])), constant_values=np.nan)
        for table in counts.values()
    ]
    names = [f"{layer}  {kind}" for layer in layer_axis(counts).names for kind in kinds]
    columns = Axis.numbered("expert", width)
    return heatmap(np.concatenate(rows), Axis("layer", names), columns, LIFT_BAR, title)


def coactivation_heatmap(pairs_EE: np.ndarray, title: str = "") -> np.ndarray:
    """Draw how much more often than by chance two experts are chosen for the same token.

    Args:
        pairs_EE: How often tokens chose both; integers. The diagonal does not count.
        title: A line above the picture.
    """
    off_diagonal = pairs_EE * ~np.eye(len(pairs_EE), dtype=bool)
    places_EE = np.maximum(lift(off_diagonal), -OCTAVES)
    np.fill_diagonal(places_EE, np.nan)
    axis = Axis.numbered("expert", len(pairs_EE))
    return heatmap(places_EE, axis, axis, LIFT_BAR, title)
