"""From hidden states to each token's experts and gate weights."""

from moe_plugin.routing.cuts import Cut, Threshold, TopP
from moe_plugin.routing.dynamic import DynamicRouter
from moe_plugin.routing.expert_choice import ExpertChoiceRouter
from moe_plugin.routing.router import Router
from moe_plugin.routing.scores import (
    LogSigmoid,
    Score,
    Sigmoid,
    SoftmaxAfterTopK,
    SoftmaxBeforeTopK,
    SqrtSoftplus,
)
from moe_plugin.routing.selection import limit_to_groups, select_top_k
from moe_plugin.routing.zero_experts import ZeroExpertCounts, ZeroExpertRouter

__all__ = [
    "Cut",
    "DynamicRouter",
    "ExpertChoiceRouter",
    "LogSigmoid",
    "Router",
    "Score",
    "Sigmoid",
    "SoftmaxAfterTopK",
    "SoftmaxBeforeTopK",
    "SqrtSoftplus",
    "Threshold",
    "TopP",
    "ZeroExpertCounts",
    "ZeroExpertRouter",
    "limit_to_groups",
    "select_top_k",
]
