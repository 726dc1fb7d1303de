"""Auxiliary balancing losses: the baseline that loss-free balancing is compared with."""

from __future__ import annotations

from moe_plugin.losses.load_balancing import LoadBalancingLoss

__all__ = ["LoadBalancingLoss"]
