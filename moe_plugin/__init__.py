"""Auxiliary-loss-free load balancing for mixture-of-experts training."""

from moe_plugin.balance import balance_
from moe_plugin.callbacks.load_monitor import LoadMonitor
from moe_plugin.callbacks.loss_free import LossFreeBalancing

__all__ = ["LoadMonitor", "LossFreeBalancing", "balance_"]
__version__ = "0.1.0"
