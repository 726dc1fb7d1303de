"""One shape of routed experts in every implementation that is compared: see the case `layer`.

Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per token, N rows of an expert,
P = T * K pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_plugin.experts import GroupedExperts
from moe_plugin.types import Routing

D = 256
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""How far outputs may differ, of their norm."""


class Shape(NamedTuple):
    """Of a layer: experts, experts per token, hidden width, model width."""

    experts: int
    top_k: int
    hidden: int
    dim: int = D


SHAPES = {"A": Shape(8, 2, 512), "B": Shape(64, 8, 128), "C": Shape(256, 8, 64)}
LOOPED = {"A", "B"}
"""Shapes that a loop over experts finishes in reasonable time."""
LIMITS = frozenset({"dense", "equal groups"})
"""Sides that compute something else, in as many operations."""


class Layer:
    """One shape with its weights in every layout, and hidden states."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype = torch.float32) -> None:
        """Draw weights and hidden states, all in this dtype."""
        self.shape, self.dtype, dim = shape, dtype, shape.dim
        self.experts = GroupedExperts(shape.experts, dim, shape.hidden).to(dtype)
        self.x_TD = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
        self.gradient_TD = torch.randn(tokens, dim, dtype=dtype)
        self.dense = nn.ParameterList(
            [
                torch.randn(dim, 2 * shape.hidden) / dim**0.5,
                torch.randn(shape.hidden, dim) / shape.hidden**0.5,
            ]
        ).to(dtype)
        self.x_PD = torch.randn(tokens * shape.top_k, dim, dtype=dtype, requires_grad=True)

    def routing(self, pull_E: Tensor | float = 0.0) -> Routing:
        """Return random routing, drawn towards experts with a pull."""
        scores_TE = torch.rand(len(self.x_TD), self.shape.experts)
        ids_TK = (scores_TE + pull_E).topk(self.shape.top_k).indices
        weights_TK = scores_TE.gather(1, ids_TK).to(self.dtype).requires_grad_()
        return Routing(weights_TK, ids_TK, scores_TE)

    def sides(self, *, loops: bool) -> dict[str, Callable[[Routing], Tensor]]:
        """Return what is timed, by name."""
        sides = {"ours": self.ours, "dense": self.dense_limit, "equal groups": self.equal_groups}
        for implementation in ("grouped_mm", *(("eager",) if loops else ())):
            sides[implementation] = self.transformers(implementation)
        if loops:
            sides["loop"] = self.loop
        return sides

    def ours(self, routing: Routing) -> Tensor:
        """Run our experts."""
        return self._step(
            self.experts(self.x_TD, routing), [self.x_TD, routing.weights_TK, *self.experts.parameters()]
        )

    def dense_limit(self, _: Routing) -> Tensor:
        """Run one SwiGLU over as many rows."""
        gate_PH, up_PH = (self.x_PD @ self.dense[0]).chunk(2, -1)
        y_PD = (functional.silu(gate_PH) * up_PH) @ self.dense[1]
        y_PD.backward(self.gradient_TD.repeat_interleave(self.shape.top_k, 0))
        self._forget([self.x_PD, *self.dense])
        return y_PD.detach()

    def equal_groups(self, _: Routing) -> Tensor:
        """Run one batched product over experts with equally many rows, already sorted."""
        x_END = self.x_PD.view(self.shape.experts, -1, self.shape.dim)
        gate_ENH, up_ENH = torch.bmm(x_END, self.experts.gate_up).chunk(2, -1)
        y_END = torch.bmm(functional.silu(gate_ENH) * up_ENH, self.experts.down)
        y_END.backward(self.gradient_TD.repeat_interleave(self.shape.top_k, 0).view_as(y_END))
        self._forget([self.x_PD, *self.experts.parameters()])
        return y_END.detach()

    def loop(self, routing: Routing) -> Tensor:
        """Run expert by expert, on the tokens that chose it."""
        y_TD = torch.zeros_like(self.x_TD, dtype=torch.float32)
        projections = zip(self.experts.gate_up.unbind(0), self.experts.down.unbind(0), strict=True)
        for expert, (gate_up, down) in enumerate(projections):
            tokens_N, slots_N = (routing.expert_ids_TK == expert).nonzero(as_tuple=True)
            gate_NH, up_NH = (self.x_TD[tokens_N] @ gate_up).chunk(2, -1)
            y_ND = (functional.silu(gate_NH) * up_NH) @ down
            y_ND = y_ND * routing.weights_TK[tokens_N, slots_N, None]
            y_TD = y_TD.index_add(0, tokens_N, y_ND.to(y_TD.dtype))
        return self._step(y_TD.to(self.dtype), [self.x_TD, routing.weights_TK, *self.experts.parameters()])

    def transformers(self, implementation: str) -> Callable[[Routing], Tensor]:
        """Return Qwen3-MoE's experts on the same weights."""
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        shape = self.shape
        config = Qwen3MoeConfig(
            hidden_size=shape.dim,
            num_experts=shape.experts,
            moe_intermediate_size=shape.hidden,
            hidden_act="silu",
        )
        config._experts_implementation = implementation
        experts = Qwen3MoeExperts(config).to(self.dtype)
        with torch.no_grad():
            experts.get_parameter("gate_up_proj").copy_(self.experts.gate_up.mT)
            experts.get_parameter("down_proj").copy_(self.experts.down.mT)

        def run(routing: Routing) -> Tensor:
            y_TD = experts(self.x_TD, routing.expert_ids_TK, routing.weights_TK)
            return self._step(y_TD, [self.x_TD, routing.weights_TK, *experts.parameters()])

        return run

    def _step(self, y_TD: Tensor, trained: list[Tensor]) -> Tensor:
        y_TD.backward(self.gradient_TD)
        self._forget(trained)
        return y_TD.detach()

    @staticmethod
    def _forget(trained: list[Tensor]) -> None:
        for tensor in trained:
            tensor.grad = None

    def give_the_same(self, results: Mapping[str, Tensor]) -> bool:
        """Return whether all that compute the routed sum agree to rounding."""
        ours = results["ours"].float()
        others = [y for name, y in results.items() if name not in LIMITS]
        return all((y - ours).norm() < TOLERANCE[self.dtype] * ours.norm() for y in others)
