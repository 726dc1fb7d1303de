"""The load-balancing loss of Switch Transformers and GShard."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_plugin.losses.auxiliary_loss import LayerLoss, load_times_probability
from moe_plugin.losses.statistics import LoadStatistics


@dataclass(frozen=True)
class LoadBalancingLoss(LayerLoss):
    """`coefficient * E * sum_e f_e * P_e` for each layer: arXiv 2101.03961, equations 4 to 6.

    f_e is the share of the micro-batch's T * K selections that went to expert e, without gradient, and P_e the mean
    over its tokens of the router's probability for e. Balanced routing gives `coefficient`, all tokens on one expert up
    to `coefficient * E`. Over several layers the losses are added, as Switch does.

    Attributes:
        coefficient: Weight next to the cross-entropy; Switch uses 0.01.
    """

    def of_layer(self, layer: LoadStatistics) -> Tensor:
        """Return what a layer gives; a scalar, fp32."""
        return load_times_probability(layer.counts_BE.sum(0), layer.probability_BE.mean(0))
