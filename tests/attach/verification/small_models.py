"""A small right model for the battery, and models in which a check does not apply.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.hosts import Block, SoftmaxRouter

T, D, E, K = 48, 8, 4, 2


class Layers(nn.Module):
    """Two MoE layers over hidden states."""

    def __init__(self, router: type = SoftmaxRouter, num_experts: int = E, top_k: int = K):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(router(D, num_experts, top_k), D) for _ in range(2))
        with torch.no_grad():
            for layer in self.layers:
                layer.router.weight.div_(D**0.5)

    def forward(self, x_TD, attention_mask=None):
        for layer in self.layers:
            x_TD = layer(x_TD)
        return x_TD


X_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)) + 0.5


def run(model: nn.Module):
    return model(X_TD.to(next(model.parameters()).device))


class Top1Router(SoftmaxRouter):
    """Switch style: the weight is the largest probability."""

    def forward(self, x_TD):
        probabilities_TE = (x_TD @ self.weight.T).softmax(-1)
        weights_T, ids_T = probabilities_TE.max(-1)
        return weights_T.unsqueeze(-1), ids_T.unsqueeze(-1)


class SortingRouter(SoftmaxRouter):
    """Takes the last K of an ascending sort."""

    def forward(self, x_TD):
        scores_TE = (x_TD @ self.weight.T).softmax(-1)
        values_TE, ids_TE = scores_TE.sort(-1)
        return values_TE[:, -self.top_k :], ids_TE[:, -self.top_k :]


class AmaxGateRouter(SoftmaxRouter):
    """Takes the weight of the likeliest expert, which is not the one that a bias selects."""

    def forward(self, x_TD):
        logits_TE = x_TD @ self.weight.T
        return logits_TE.softmax(-1).amax(-1, keepdim=True), logits_TE.topk(1).indices


class SortedGatesRouter(SoftmaxRouter):
    """The same with two experts."""

    def forward(self, x_TD):
        logits_TE = x_TD @ self.weight.T
        weights_TE = logits_TE.softmax(-1).sort(-1, descending=True).values
        return weights_TE[:, : self.top_k], logits_TE.topk(self.top_k).indices
