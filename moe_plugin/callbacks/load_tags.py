"""The names under which load is logged, and how TensorBoard lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from moe_plugin.callbacks.router_sample import Decisions
from moe_plugin.metrics import LayerLoad

DASHBOARD = {
    "Overview": {
        "loss": ["Multiline", [r"((train|val)[/_])?loss(_step|_epoch)?$"]],
        "MaxVio: (max load - mean load) / mean load": [
            "Multiline",
            [r"(load|val)/max_violation_(batch|global)$"],
        ],
        "dead experts": ["Multiline", [r"(load|val)/dead_experts$"]],
        "entropy of the load (1 = even)": ["Multiline", [r"load/entropy$", r"val/load_entropy$"]],
        "step time over ideal, by ranks of expert parallelism": ["Multiline", [r"load/slowdown_ep\d+$"]],
        "tokens per second": ["Multiline", [r"load/tokens_per_second$"]],
        "parameters a token uses": ["Multiline", [r"load/active_parameters$"]],
        "router: confidence, and choices the bias flips": [
            "Multiline",
            [r"load/(confidence|flip_rate)$", r"val/kept_choices$"],
        ],
        "largest bias range": ["Multiline", [r"load/bias_range$"]],
        "experts per token": ["Multiline", [r"(load|val)/experts_per_token$"]],
    },
    "Layers": {
        "MaxVio by layer": ["Multiline", [r"load_layers/max_violation/"]],
        "load variation (sd / mean) by layer": ["Multiline", [r"load_layers/variation/"]],
        "bias range by layer": ["Multiline", [r"load_layers/bias_range/"]],
        "router confidence by layer": ["Multiline", [r"load_layers/confidence/"]],
        "choices the bias flips, by layer": ["Multiline", [r"load_layers/flip_rate/"]],
        "entropy by layer": ["Multiline", [r"load_layers/entropy/"]],
        "experts per token by layer": ["Multiline", [r"load_layers/experts_per_token/"]],
        "dead experts by layer": ["Multiline", [r"load_layers/dead_experts/"]],
    },
}
"""Custom-scalar layout for `SummaryWriter.add_custom_scalars`: charts of tags by regular expression."""


def training_scalars(
    loads: Mapping[str, LayerLoad],
    bias_ranges: Mapping[str, float],
    decisions: Mapping[str, Decisions],
    expert_share: float,
) -> dict[str, float]:
    """What a window of training steps is logged as.

    `load/*` is the mean over layers, except for dead experts (the sum) and the bias range (the largest);
    `load_layers/*/<site>` is each layer by itself, its violation that of the window's summed counts.

    Args:
        loads: The load of each layer.
        bias_ranges: The range of each layer's bias.
        decisions: How the routers that were looked at decided.
        expert_share: The share of a balanced step that the experts take.
    """
    scalars = {f"load/{name}": value for name, value in _over_layers(loads).items()}
    scalars["load/bias_range"] = max(bias_ranges.values())
    scalars |= slowdowns(loads, expert_share)
    for name, load in loads.items():
        scalars[f"load_layers/max_violation/{name}"] = load.max_violation_global
        scalars[f"load_layers/variation/{name}"] = load.coefficient_of_variation
        scalars[f"load_layers/entropy/{name}"] = load.entropy
        scalars[f"load_layers/dead_experts/{name}"] = load.dead_experts
        scalars[f"load_layers/bias_range/{name}"] = bias_ranges[name]
    for measure in ("confidence", "flip_rate") if decisions else ():
        by_layer = {name: getattr(seen, measure) for name, seen in decisions.items()}
        scalars[f"load/{measure}"] = fmean(by_layer.values())
        scalars |= {f"load_layers/{measure}/{name}": value for name, value in by_layer.items()}
    return scalars


def slowdowns(loads: Mapping[str, LayerLoad], expert_share: float) -> dict[str, float]:
    """Step time over that of an even load, were the experts spread over 8, 16 or 64 ranks.

    `1 + f * MaxVio` with the MaxVio of a step's tokens per rank, mean over layers: all ranks wait for the fullest.
    Numbers of ranks that divide no layer's experts are left out.
    """
    by_ranks: dict[int, list[float]] = {}
    for load in loads.values():
        for ranks, violation in load.rank_violations.items():
            by_ranks.setdefault(ranks, []).append(violation)
    return {f"load/slowdown_ep{ranks}": 1 + expert_share * fmean(each) for ranks, each in by_ranks.items()}


def budget_scalars(experts_per_token: Mapping[str, float]) -> dict[str, float]:
    """How many experts a token used: `load/experts_per_token` is the mean over layers, and each layer by itself."""
    if not experts_per_token:
        return {}
    layers = {f"load_layers/experts_per_token/{name}": mean for name, mean in experts_per_token.items()}
    return {"load/experts_per_token": fmean(experts_per_token.values()), **layers}


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
