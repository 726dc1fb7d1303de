"""Lightning callbacks: balancing, and watching the load."""

from moe_plugin.callbacks.load_monitor import LoadMonitor
from moe_plugin.callbacks.loss_free import LossFreeBalancing

__all__ = ["LoadMonitor", "LossFreeBalancing"]
