"""Blocks of experts of other packages, small: LitGPT, torchtitan, and two of lucidrains.

Each `Real` builds the package's own block, and computes its gate weights independently from its parameters.

Shape legend: B batch, S sequence, D model width, E experts, K experts selected per token, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

D, E, K = 16, 8, 2


@dataclass(frozen=True)
class Real:
    """A block of a package.

    Attributes:
        build: Makes it, or skips the test if the package is missing.
        router: Name of the router in the block.
        gates: The router's output, as gate weights of all experts (B, S, E), 0 where not selected.
        expected: The same from the router, its input, and a bias; our bias does not choose the groups.
    """

    build: Callable[[], nn.Module]
    router: str
    gates: Callable[[Any], Tensor]
    expected: Callable[[Any, Tensor, Tensor], Tensor]


def _package(name: str, hint: str) -> Any:
    return pytest.importorskip(name, reason=f"needs {hint}", exc_type=ImportError)


def _litgpt(**settings: Any) -> nn.Module:
    hint = "LitGPT: pip install litgpt"
    config = _package("litgpt.config", hint).Config(
        n_embd=D,
        n_head=2,
        mlp_class_name="LLaMAMoE",
        intermediate_size=D,
        moe_intermediate_size=D,
        n_expert=E,
        n_expert_per_token=K,
        **settings,
    )
    block = _package("litgpt.model", hint).LLaMAMoE(config)
    nn.init.normal_(block.gate.weight, std=0.3)  # grouped gates are made empty
    return block


def _torchtitan(*, has_bias: bool = True, **settings: Any) -> nn.Module:
    hint = "torchtitan: pip install --no-deps torchtitan spmd-types tyro"
    configs = _package("torchtitan.models.common.config_utils", hint)

    def draw(*names: str) -> dict[str, Callable]:
        return dict.fromkeys(names, lambda weight: nn.init.normal_(weight, std=0.3))

    sizes = {"dim": D, "num_experts": E, "top_k": K}
    config = configs.make_moe_config(
        num_experts=E,
        load_balance_coeff=1e-3 if has_bias else None,
        router=configs.make_router_config(
            **sizes, gate_param_init=draw("weight"), route_norm=True, **settings
        ),
        routed_experts=configs.make_routed_experts_config(
            **sizes, hidden_dim=D, param_init=draw("w1_EFD", "w2_EDF", "w3_EFD"), comm_backend="standard"
        ),
    )
    block = config.build()
    block.init_states()
    return block


class FirstOutput(nn.Module):
    """A block that returns losses too."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.block(x_BSD)[0]


def _st_moe() -> nn.Module:
    package = _package("st_moe_pytorch", "pip install st-moe-pytorch")
    return FirstOutput(package.MoE(D, E, gating_top_n=K, threshold_train=1e-9, capacity_factor_train=8.0))


def _mixture_of_experts() -> nn.Module:
    package = _package("mixture_of_experts", "pip install mixture-of-experts")
    return FirstOutput(package.MoE(D, E, second_policy_train="all", capacity_factor_train=8.0))


def selected(scores: Tensor, ranked: Tensor, *, logits: bool = False) -> Tensor:
    """Return gate weights (..., E): the scores of the K largest in ``ranked``, scaled to a sum of 1."""
    ids = ranked.argsort(-1, descending=True)[..., :K]
    chosen = scores.gather(-1, ids)
    chosen = chosen.softmax(-1) if logits else chosen / chosen.sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, ids, chosen)


def closed(ranked: Tensor, by: Tensor) -> Tensor:
    """Return ``ranked`` with -inf outside the two groups (of four) whose two experts have the largest sum in ``by``."""
    sums = by.unflatten(-1, (4, 2)).sum(-1)
    is_open = torch.zeros_like(sums, dtype=torch.bool).scatter(-1, sums.argsort(-1)[..., 2:], True)
    return ranked.masked_fill(~is_open.repeat_interleave(2, -1), -torch.inf)


def spread(output: Any) -> Tensor:
    """Return gate weights and ids as gate weights of all experts."""
    weights, ids = output[:2]
    return weights.new_zeros(*ids.shape[:-1], E).scatter(-1, ids, weights)


def _of_logits(router: Any, x: Tensor, bias_E: Tensor) -> Tensor:
    logits = x @ router.gate.weight.T
    gates = selected(logits, logits + bias_E, logits=True)
    outputs = torch.stack([expert(x) for expert in router.experts], dim=-1)
    return (outputs * gates[..., None, :]).sum(-1)


def _of_titan(router: Any, x: Tensor, bias_E: Tensor) -> Tensor:
    logits = x @ router.gate.weight.T
    scores = logits.sigmoid() if router.score_func == "sigmoid" else logits.softmax(-1)
    ranked = scores + bias_E
    return selected(scores, closed(ranked, by=ranked) if router.num_expert_groups else ranked)


def _of_groups(router: Any, x: Tensor, bias_E: Tensor) -> Tensor:
    scores = (x @ router.weight.T).sigmoid()
    return selected(scores, closed(scores + bias_E, by=scores + bias_E))


def _of_softmax(name: str) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def gates(router: Any, x: Tensor, bias_E: Tensor) -> Tensor:
        weight = router.get_parameter(name)
        scores = (x @ (weight if weight.shape[0] == D else weight.T)).softmax(-1)
        return selected(scores, scores + bias_E)

    return gates


GROUPS: dict[str, Any] = {
    "n_expert_groups": 4,
    "n_topk_groups": 2,
    "n_topk_scores_per_group": 2,
    "norm_topk_prob": True,
}
TITAN_GROUPS: dict[str, Any] = {"num_expert_groups": 4, "num_limited_groups": 2}


def _combined(output: Any) -> Tensor:
    return output[1].sum(-1)  # over the places of an expert


REAL = {
    "litgpt": Real(_litgpt, "", lambda output: output, _of_logits),
    "litgpt with groups": Real(lambda: _litgpt(**GROUPS), "gate", spread, _of_groups),
    "torchtitan": Real(_torchtitan, "router", spread, _of_titan),
    "torchtitan without bias": Real(lambda: _torchtitan(has_bias=False), "router", spread, _of_titan),
    "torchtitan softmax": Real(lambda: _torchtitan(score_func="softmax"), "router", spread, _of_titan),
    "torchtitan with groups": Real(lambda: _torchtitan(**TITAN_GROUPS), "router", spread, _of_titan),
    "st_moe_pytorch": Real(_st_moe, "block.gate", _combined, _of_softmax("to_gates.weight")),
    "mixture_of_experts": Real(_mixture_of_experts, "block.gate", _combined, _of_softmax("w_gating")),
}
