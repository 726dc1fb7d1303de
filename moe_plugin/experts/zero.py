"""Experts without cost, next to the routed ones: identity, zero and constant (arXiv 2410.07348, section 3.1).

Shape legend: T tokens, D model width, K experts selected per token, C constant experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_plugin.routing import ZeroExpertCounts
from moe_plugin.types import Routing


class ZeroExperts(nn.Module):
    """Experts without cost; their ids from `first` on: identity, then constant, then zero.

    A constant expert mixes its input and a learnt vector v by a learnt gate: ``a x + (1 - a) v`` with
    ``a = softmax(W x)[0]``, arXiv 2410.07348, equation 5.

    Attributes:
        vectors: v of each constant expert, (C, D).
        mixing: W of each constant expert, (C, 2, D).
    """

    def __init__(self, first: int, dim: int, counts: ZeroExpertCounts) -> None:
        """Create the experts.

        Args:
            first: Id of the first of them: the number of routed experts.
            dim: Width of the hidden states.
            counts: Experts of each kind.
        """
        super().__init__()
        self.first = first
        self.counts = counts
        self.vectors = nn.Parameter(torch.empty(counts.constant, dim))
        self.mixing = nn.Parameter(torch.empty(counts.constant, 2, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the vectors to zero, and draw the gates."""
        nn.init.zeros_(self.vectors)
        nn.init.normal_(self.mixing, std=self.mixing.shape[-1] ** -0.5)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return the sum of the picked experts, times their gate weights: (T, D) in the dtype of `x_TD`."""
        ids_TK = routing.expert_ids_TK - self.first
        weights_TK = routing.weights_TK.to(x_TD.dtype)
        is_identity_TK = (ids_TK >= 0) & (ids_TK < self.counts.identity)
        y_TD = x_TD * _total(weights_TK, is_identity_TK)
        for number in range(self.counts.constant):
            picked_T1 = _total(weights_TK, ids_TK == self.counts.identity + number)
            share_T1 = (x_TD @ self.mixing[number].to(x_TD.dtype).T).softmax(-1)[:, :1]
            y_TD = y_TD + picked_T1 * (share_T1 * x_TD + (1 - share_T1) * self.vectors[number].to(x_TD.dtype))
        return y_TD


def _total(weights_TK: Tensor, picked_TK: Tensor) -> Tensor:
    """Return the gate weights of these picks together; (T, 1)."""
    return weights_TK.masked_fill(~picked_TK, 0.0).sum(-1, keepdim=True)
