"""Auxiliary losses: the baselines that loss-free balancing is compared with, and what may be added to it."""

from moe_plugin.losses.auxiliary_loss import AuxiliaryLoss
from moe_plugin.losses.global_batch import GlobalBatchLoss
from moe_plugin.losses.load_balancing import LoadBalancingLoss
from moe_plugin.losses.router_z import RouterZLoss
from moe_plugin.losses.sequence import SequenceLoss
from moe_plugin.losses.statistics import LoadStatistics, load_statistics
from moe_plugin.losses.total import TotalLoss

__all__ = [
    "AuxiliaryLoss",
    "GlobalBatchLoss",
    "LoadBalancingLoss",
    "LoadStatistics",
    "RouterZLoss",
    "SequenceLoss",
    "TotalLoss",
    "load_statistics",
]
