"""The loss that keeps router logits small."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_plugin.losses.auxiliary_loss import LayerLoss
from moe_plugin.losses.statistics import LoadStatistics


@dataclass(frozen=True)
class RouterZLoss(LayerLoss):
    """`coefficient` times the mean over tokens of `logsumexp(logits) ** 2`: ST-MoE, arXiv 2202.08906, equation 5.

    Attributes:
        coefficient: Weight next to the cross-entropy; ST-MoE uses 0.001.
    """

    coefficient: float = 1e-3

    def of_layer(self, layer: LoadStatistics) -> Tensor:
        """Return what a layer gives; a scalar, fp32."""
        return layer.square_log_z_B.mean()
