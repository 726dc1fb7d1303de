"""How balanced the load over experts is: MaxVio, entropy and dead experts."""

from moe_plugin.metrics.accumulated import DeadExperts, LoadEntropy, MaxViolationBatch, MaxViolationGlobal
from moe_plugin.metrics.dead import dead_experts
from moe_plugin.metrics.entropy import load_entropy
from moe_plugin.metrics.layers import experts_per_layer, stack_layers
from moe_plugin.metrics.violation import max_violation
from moe_plugin.metrics.window import LayerLoad, LoadWindow, layer_loads

__all__ = [
    "DeadExperts",
    "LayerLoad",
    "LoadEntropy",
    "LoadWindow",
    "MaxViolationBatch",
    "MaxViolationGlobal",
    "dead_experts",
    "experts_per_layer",
    "layer_loads",
    "load_entropy",
    "max_violation",
    "stack_layers",
]
