"""The names under which load is logged, and how TensorBoard lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Literal, get_args

import numpy as np

from moe_plugin.callbacks.monitor.router_sample import Decisions
from moe_plugin.errors import ConfigError
from moe_plugin.metrics import LayerLoad
from moe_plugin.metrics.router_names import with_short_tags

Detail = Literal["brief", "full"]
"""Which scalars are logged: those over all layers, or also those of each."""

_PERCENTILES = (50, 90, 95)
_DASHBOARD = {
    "Overview": {
        "loss": [r"((train|val)[/_])?loss(_step|_epoch)?$"],
        "MaxVio: (max load - mean load) / mean load": [r"(load|val)/max_violation_(batch|global)$"],
        "MaxVio over layers: median, p90, p95, worst": [r"load/max_violation_(p\d+|worst)$"],
        "dead experts": [r"(load|val)/dead_experts$"],
        "entropy of the load (1 = even)": [r"load/entropy$", r"val/load_entropy$"],
        "step time over ideal, by ranks of expert parallelism": [r"load/slowdown_ep\d+$"],
        "tokens per second": [r"load/tokens_per_second$"],
        "parameters a token uses": [r"load/active_parameters$"],
        "router: confidence, and choices the bias flips": [
            r"load/(confidence|flip_rate)$",
            r"val/kept_choices$",
        ],
        "largest bias range": [r"load/bias_range$"],
    },
    "Layers": {
        "MaxVio by layer": [r"load_layers/max_violation/"],
        "load variation (sd / mean) by layer": [r"load_layers/variation/"],
        "bias range by layer": [r"load_layers/bias_range/"],
        "router confidence by layer": [r"load_layers/confidence/"],
        "choices the bias flips, by layer": [r"load_layers/flip_rate/"],
        "entropy by layer": [r"load_layers/entropy/"],
        "dead experts by layer": [r"load_layers/dead_experts/"],
    },
}
_EXPERTS_PER_TOKEN = {
    "Experts per token": {
        "experts per token": [r"(load|val)/experts_per_token$"],
        "budget error: experts per token over target, less 1": [r"load/budget_error$"],
        "experts per token by layer": [r"load_layers/experts_per_token/"],
        "budget error by layer": [r"load_layers/budget_error/"],
        "rank correlation of a token's experts with its loss": [r"val/loss_correlation"],
        "the same by layer": [r"val_layers/loss_correlation/"],
    },
}


def check_detail(detail: str) -> None:
    """Check which scalars are asked for.

    Raises:
        ConfigError: If it is neither 'brief' nor 'full'.
    """
    if detail not in get_args(Detail):
        raise ConfigError("detail", "must be 'brief' or 'full'", detail)


def dashboard(*, experts_vary: bool, detail: Detail) -> dict[str, dict[str, list]]:
    """Return the layout for `SummaryWriter.add_custom_scalars`: charts of tags by regular expression.

    Args:
        experts_vary: Whether tokens use different numbers of experts.
        detail: Which scalars are logged; charts of others are left out.
    """
    charts = _DASHBOARD | (_EXPERTS_PER_TOKEN if experts_vary else {})
    layout = {
        category: {title: ["Multiline", tags] for title, tags in titles.items() if _is_at(detail, tags[0])}
        for category, titles in charts.items()
    }
    return {category: titles for category, titles in layout.items() if titles}


def _is_at(detail: Detail, tag: str) -> bool:
    return detail == "full" or not tag.partition("/")[0].endswith("_layers")


def training_scalars(
    loads: Mapping[str, LayerLoad],
    bias_ranges: Mapping[str, float],
    decisions: Mapping[str, Decisions],
    expert_share: float,
) -> dict[str, float]:
    """Return the scalars of a window of training steps.

    `load/*` is the mean over layers, except for dead experts (the sum), the bias range (the largest), and
    `load/max_violation_*` (percentiles over layers and the worst one); `load_layers/*/<site>` is one layer. Both have
    the violation of the window's summed counts.

    Args:
        loads: The load of each layer.
        bias_ranges: The range of each layer's bias.
        decisions: How the routers that were looked at decided.
        expert_share: The share of a balanced step that the experts take.
    """
    scalars = {f"load/{name}": value for name, value in _over_layers(loads).items()}
    scalars |= _spread_over_layers(loads)
    scalars["load/bias_range"] = max(bias_ranges.values())
    scalars |= _slowdowns(loads, expert_share)
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


def shown(scalars: Mapping[str, float], short: Mapping[str, str], detail: Detail) -> dict[str, float]:
    """Return the scalars that are logged, under short names of routers.

    Args:
        scalars: All of them.
        short: See `short_names`.
        detail: 'brief' leaves out those of single layers.
    """
    return {tag: value for tag, value in with_short_tags(scalars, short).items() if _is_at(detail, tag)}


def _spread_over_layers(loads: Mapping[str, LayerLoad]) -> dict[str, float]:
    violations = [load.max_violation_global for load in loads.values()]
    percentiles = zip(_PERCENTILES, np.percentile(violations, _PERCENTILES).tolist(), strict=True)
    scalars = {f"load/max_violation_p{percent}": value for percent, value in percentiles}
    return scalars | {"load/max_violation_worst": max(violations)}


def _slowdowns(loads: Mapping[str, LayerLoad], expert_share: float) -> dict[str, float]:
    """Return the step time over that of an even load, if the experts were spread over 8, 16 or 64 ranks.

    It is `1 + f * MaxVio` with the MaxVio of a step's tokens per rank, mean over layers: all ranks wait for the
    fullest. Numbers of ranks that divide no layer's experts are left out, and all of them if f is not known (0).
    """
    if not expert_share:
        return {}
    by_ranks: dict[int, list[float]] = {}
    for load in loads.values():
        for ranks, violation in load.rank_violations.items():
            by_ranks.setdefault(ranks, []).append(violation)
    return {f"load/slowdown_ep{ranks}": 1 + expert_share * fmean(each) for ranks, each in by_ranks.items()}


def budget_scalars(experts_per_token: Mapping[str, float], targets: Mapping[str, float]) -> dict[str, float]:
    """Return how many experts a token used, and how far from the target that is, if their number varies.

    `load/experts_per_token` is the mean over layers and `load/budget_error` its ratio to the mean target, less 1;
    `load_layers/*` is one layer.

    Args:
        experts_per_token: The mean of each layer; those without a target are left out.
        targets: The mean that each layer should have.
    """
    means = {name: mean for name, mean in experts_per_token.items() if name in targets}
    if not means:
        return {}
    mean, target = fmean(means.values()), fmean(targets[name] for name in means)
    scalars = {"load/experts_per_token": mean, "load/budget_error": mean / target - 1}
    for name, used in means.items():
        scalars[f"load_layers/experts_per_token/{name}"] = used
        scalars[f"load_layers/budget_error/{name}"] = used / targets[name] - 1
    return scalars


def validation_scalars(loads: Mapping[str, LayerLoad]) -> dict[str, float]:
    """Return the scalars of a validation run: means over layers, and the sum of dead experts."""
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
