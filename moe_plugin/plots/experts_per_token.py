"""Pictures of how many experts tokens use if their number varies; uint8 (3, H, W), RGB.

Shape legend: L layers, U numbers of experts used, G kinds of tokens, Q parts of the tokens by their loss,
H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_plugin.plots.colors import OCTAVES, amount_colors
from moe_plugin.plots.heatmap import Axis, heatmap

RATIO_BAR = {3.0: "2x", 1.5: "1.4x", 0.0: "mean", -1.5: "1/1.4", -3.0: "1/2"}
"""Labels of the colour bar if a cell is a mean number of experts over its layer's."""
_SHARE_BAR = {1.0: "all", 0.75: "75%", 0.5: "50%", 0.25: "25%", 0.0: "none"}


def distribution(tokens_LU: Sequence[Sequence[int]]) -> np.ndarray:
    """Draw the share of each layer's tokens that use each number of experts."""
    counts_LU = np.array(tokens_LU)
    shares_LU = counts_LU / counts_LU.sum(1, keepdims=True)
    texts = [[f"{100 * share:.0f}%" for share in row] for row in shares_LU.tolist()]
    layers, numbers = shares_LU.shape
    return heatmap(
        shares_LU,
        Axis.numbered("layer", layers),
        Axis.numbered("experts", numbers),
        _SHARE_BAR,
        "share of the tokens",
        colors=amount_colors,
        texts=texts,
    )


def by_kind(table: Mapping[str, Any], means_L: Sequence[float], kind: str) -> np.ndarray:
    """Draw the mean number of experts of each kind of token, over the layer's.

    Args:
        table: `names` of the kinds (G), and their `means` (L, G).
        means_L: The mean of each layer.
        kind: A word for the kinds, such as 'domain'.
    """
    return _ratios(
        np.array(table["means"]).T, means_L, Axis(kind, table["names"]), f"experts per token by {kind}"
    )


def by_loss(table: Mapping[str, Any], means_L: Sequence[float]) -> np.ndarray:
    """Draw the mean number of experts of tokens from the easiest to the hardest, over the layer's.

    Args:
        table: The mean `losses` of parts of the tokens (Q), and their `means` (L, Q).
        means_L: The mean of each layer.
    """
    names = [f"loss {loss:.2g}" for loss in table["losses"]]
    return _ratios(np.array(table["means"]).T, means_L, Axis("tokens", names), "experts per token by loss")


def ratio_places(means: np.ndarray, means_L: Sequence[float]) -> np.ndarray:
    """Return places on the load scale, which ends at half and twice the layer's mean.

    Args:
        means: Mean numbers of experts (..., L).
        means_L: The mean of each layer.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        places = OCTAVES * np.log2(means / np.array(means_L))
    return np.maximum(places, -OCTAVES)


def _ratios(means_GL: np.ndarray, means_L: Sequence[float], rows: Axis, title: str) -> np.ndarray:
    texts = [[f"{mean:.2f}" for mean in row] for row in means_GL.tolist()]
    columns = Axis.numbered("layer", means_GL.shape[1])
    return heatmap(ratio_places(means_GL, means_L), rows, columns, RATIO_BAR, title, texts=texts)
