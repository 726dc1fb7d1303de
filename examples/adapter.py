"""A block that samples its experts, so no call ranks them: an adapter shows how it routes.

Run it: python examples/adapter.py

Shape legend: T tokens, D model width, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moe_plugin import Adapter, balance_
from moe_plugin.metrics import max_violation

VOCABULARY, DIM, EXPERTS, TOP_K = 64, 32, 8, 2


class SamplingBlock(nn.Module):
    """Draws experts without replacement, each with the probability that its gate gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.k = EXPERTS, TOP_K
        self.gate = nn.Linear(DIM, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def choose(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores_TE = self.gate(x_TD).softmax(-1)
        ids_TK = torch.multinomial(scores_TE, self.k)
        weights_TK = scores_TE.gather(1, ids_TK)
        return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK = self.choose(x_TD)
        gates_TE = torch.zeros(len(x_TD), self.n).scatter(1, ids_TK, weights_TK)
        outputs_TDE = torch.stack([expert(x_TD) for expert in self.experts], -1)
        return x_TD + (gates_TE[:, None] * outputs_TDE).sum(-1)


def route(block: SamplingBlock, select: Callable, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw as the block does: the largest scores over exponential noise are a sample without replacement."""
    scores_TE = block.gate(x_TD).softmax(-1)
    noise_TE = torch.empty_like(scores_TE).exponential_()
    _, ids_TK = select((scores_TE / noise_TE).log(), block.k, scores_TE.log())
    weights_TK = scores_TE.gather(1, ids_TK)
    return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


ADAPTER = Adapter(block=SamplingBlock, method="choose", route=route, num_experts="n", top_k="k")


def main(balanced: bool = True, steps: int = 150, seed: int = 0) -> dict[str, float]:
    """Train, and return the last loss, and MaxVio of the last 20 steps together."""
    torch.manual_seed(seed)
    blocks = [SamplingBlock() for _ in range(2)]
    model = nn.Sequential(nn.Embedding(VOCABULARY, DIM), *blocks, nn.Linear(DIM, VOCABULARY))
    common = 1 / torch.arange(1.0, VOCABULARY + 1)
    # The one argument; rule=None only watches, for the comparison.
    experts = balance_(model, adapters=[ADAPTER]) if balanced else balance_(model, None, adapters=[ADAPTER])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    counts = deque(maxlen=20)
    for _ in range(steps):
        tokens_T, other_T = torch.multinomial(common, 1024, replacement=True).chunk(2)
        next_T = torch.where(torch.rand(512) < 0.5, (3 * tokens_T + 1) % VOCABULARY, other_T)
        loss = cross_entropy(model(tokens_T), next_T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(torch.stack(list(experts.update().counts.values())))
    return {
        "loss": loss.item(),
        "max_violation": max_violation(torch.stack(list(counts)).sum(0)).mean().item(),
    }


if __name__ == "__main__":
    print("balanced:", main(balanced=True))
    print("control: ", main(balanced=False))
