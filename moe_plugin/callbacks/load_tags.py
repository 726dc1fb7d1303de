"""The names under which load is logged, and how TensorBoard lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from moe_plugin.metrics import LayerLoad

DASHBOARD = {
    "Overview": {
        "loss": ["Multiline", [r"((train|val)[/_])?loss(_step|_epoch)?$"]],
        "MaxVio: (max load - mean load) / mean load": [
            "Multiline",
            [r"(load|val)/max_violation_(batch|global)$"],
        ],
        "entropy of the load (1 = even)": ["Multiline", [r"load/entropy$", r"val/load_entropy$"]],
        "dead experts": ["Multiline", [r"(load|val)/dead_experts$"]],
        "largest bias range": ["Multiline", [r"load/bias_range$"]],
    },
    "Layers": {
        "MaxVio by layer": ["Multiline", [r"load_layers/max_violation/"]],
        "bias range by layer": ["Multiline", [r"load_layers/bias_range/"]],
        "entropy by layer": ["Multiline", [r"load_layers/entropy/"]],
        "dead experts by layer": ["Multiline", [r"load_layers/dead_experts/"]],
    },
}
"""Custom-scalar layout for `SummaryWriter.add_custom_scalars`: charts of tags by regular expression."""


def training_scalars(loads: Mapping[str, LayerLoad], bias_ranges: Mapping[str, float]) -> dict[str, float]:
    """What a window of training steps is logged as.

    `load/*` is the mean over layers, except for dead experts (the sum) and the bias range (the largest);
    `load_layers/*/<site>` is each layer by itself, its violation that of the window's summed counts.
    """
    scalars = {f"load/{name}": value for name, value in _over_layers(loads).items()}
    scalars["load/bias_range"] = max(bias_ranges.values())
    for name, load in loads.items():
        scalars[f"load_layers/max_violation/{name}"] = load.max_violation_global
        scalars[f"load_layers/entropy/{name}"] = load.entropy
        scalars[f"load_layers/dead_experts/{name}"] = load.dead_experts
        scalars[f"load_layers/bias_range/{name}"] = bias_ranges[name]
    return scalars


def validation_scalars(loads: Mapping[str, LayerLoad]) -> dict[str, float]:
    """What a validation run is logged as; means over layers, dead experts are the sum."""
    scalars = _over_layers(loads)
    return {
        "val/max_violation_batch": scalars["max_violation_batch"],
        "val/max_violation_global": scalars["max_violation_global"],
        "val/load_entropy": scalars["entropy"],
        "val/dead_experts": scalars["dead_experts"],
    }


def _over_layers(loads: Mapping[str, LayerLoad]) -> dict[str, float]:
    return {
        "max_violation_batch": fmean(load.max_violation_batch for load in loads.values()),
        "max_violation_global": fmean(load.max_violation_global for load in loads.values()),
        "entropy": fmean(load.entropy for load in loads.values()),
        "dead_experts": sum(load.dead_experts for load in loads.values()),
    }
