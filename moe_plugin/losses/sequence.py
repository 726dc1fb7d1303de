"""DeepSeek's loss against imbalance within single sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_plugin.losses.auxiliary_loss import LayerLoss, load_times_probability
from moe_plugin.losses.statistics import LoadStatistics


@dataclass(frozen=True)
class SequenceLoss(LayerLoss):
    """`coefficient * sum_e f_e * P_e` of each sequence, mean over sequences: DeepSeek-V3, arXiv 2412.19437.

    Equations 17 to 20, with `f_e = E / (K S) * selections of e in the sequence` and P_e the mean over its tokens of the
    normalised scores. DeepSeek-V3 adds it with a very small coefficient to the bias, which balances over batches but
    lets single sequences be uneven; with a large one it is the sequence-wise baseline of section 4.5.3.

    Attributes:
        coefficient: Weight next to the cross-entropy; DeepSeek-V3 uses 0.0001.
    """

    coefficient: float = 1e-4

    def of_layer(self, layer: LoadStatistics) -> Tensor:
        """Return what a layer gives; a scalar, fp32."""
        return load_times_probability(layer.counts_BE, layer.probability_BE).mean()
