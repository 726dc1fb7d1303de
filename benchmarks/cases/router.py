"""The router compared with transformers' DeepSeek-V3 router, and its share of an expert layer.

Forward and backward with the gradients of hidden states and weights, in fp32, as routers compute; fresh hidden states
in each round. Equal experts and gate weights are checked. Shape legend: T tokens, D model width, E experts, K experts
selected per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from benchmarks.row import Row
from benchmarks.turns import take_turns
from moe_plugin.experts import GroupedExperts, MoEBlock
from moe_plugin.routing import Router, Sigmoid

D = 256
PEER = "DeepseekV3TopkRouter"


class Sizes(NamedTuple):
    """Of a layer: experts, experts per token, hidden width, groups of experts and those a token may choose from."""

    experts: int
    top_k: int
    hidden: int
    groups: int
    top_k_groups: int


SIZES = (Sizes(8, 2, 512, 1, 1), Sizes(64, 8, 128, 1, 1), Sizes(256, 8, 64, 1, 1), Sizes(256, 8, 64, 8, 4))


def rows(rounds: int = 40, tokens: int = 4096) -> Iterator[Row]:
    """Yield the router over its peer, and over the layer around it."""
    for sizes in SIZES:
        block, peer = layer(sizes), transformers_router(sizes)
        peer.weight.data.copy_(block.router.weight)  # pyright: ignore[reportArgumentType, reportCallIssue]
        sides = {
            "router": step(block.router, lambda routing: (routing.expert_ids_TK, routing.weights_TK)),
            PEER: step(peer, lambda output: (output[2], output[1])),
            "layer": step(block, lambda y_TD: (None, y_TD)),
        }
        turns = take_turns(sides, rounds, fresh=lambda: torch.randn(tokens, D), agree=select_the_same)
        grouped = f", {sizes.top_k_groups} of {sizes.groups} groups" if sizes.groups > 1 else ""
        name = f"{sizes.experts} experts, top {sizes.top_k}{grouped}, {tokens} tokens"
        yield turns.row(name, "router", PEER)
        yield turns.row(f"{name}: share", "router", "layer", note="the whole layer, fp32")


def layer(sizes: Sizes) -> MoEBlock:
    """Return our layer."""
    router = Router(
        D,
        sizes.experts,
        sizes.top_k,
        score=Sigmoid(),
        normalize=True,
        num_groups=sizes.groups,
        top_k_groups=sizes.top_k_groups,
    )
    return MoEBlock(router, GroupedExperts(sizes.experts, D, sizes.hidden))


def transformers_router(sizes: Sizes) -> DeepseekV3TopkRouter:
    """Return the peer."""
    config = DeepseekV3Config(
        hidden_size=D,
        n_routed_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        n_group=sizes.groups,
        topk_group=sizes.top_k_groups,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    return DeepseekV3TopkRouter(config)


def step(module: nn.Module, read: Callable) -> Callable[[Tensor], tuple[Tensor | None, Tensor]]:
    """Return both passes of a module; `read` takes expert ids and what is differentiated from its output."""

    def run(x_TD: Tensor) -> tuple[Tensor | None, Tensor]:
        module.zero_grad()
        ids_TK, y = read(module(x_TD.detach().requires_grad_()))
        y.backward(y.detach())
        return ids_TK, y.detach()

    return run


def select_the_same(results: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    """Return whether both routers chose the same experts with the same weights, in any order."""
    (ids, weights), (peer_ids, peer_weights) = results["router"], results[PEER]
    sorted_ids, order = ids.sort(dim=-1)
    peer_sorted_ids, peer_order = peer_ids.sort(dim=-1)
    same_weights = torch.allclose(weights.gather(-1, order), peer_weights.gather(-1, peer_order), atol=1e-6)
    return torch.equal(sorted_ids, peer_sorted_ids) and same_weights
