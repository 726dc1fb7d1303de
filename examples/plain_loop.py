"""A plain PyTorch training loop over a hand-written MoE model, balanced by two lines.

Run it: python examples/plain_loop.py

Shape legend: B batch, S sequence, T tokens, D model width, E experts, K experts selected per token, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional

from moe_plugin import balance_
from moe_plugin.metrics import max_violation

VOCABULARY = 64


class MoE(nn.Module):
    """A feed-forward network of experts with its gate inside, as many people write it."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
            for _ in range(num_experts)
        )

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_TD = x_BSD.flatten(0, 1)
        scores_TE = self.gate(x_TD).softmax(dim=-1)
        weights_TK, ids_TK = torch.topk(scores_TE, self.top_k, dim=-1)
        y_TD = torch.zeros_like(x_TD)
        for expert_id, expert in enumerate(self.experts):
            token_ids, choice = torch.where(ids_TK == expert_id)
            y_TD = y_TD.index_add(0, token_ids, weights_TK[token_ids, choice, None] * expert(x_TD[token_ids]))
        return x_BSD + y_TD.view_as(x_BSD)


class Model(nn.Module):
    def __init__(self, dim: int = 32, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.mix = nn.GRU(dim, dim, batch_first=True)
        self.layers = nn.ModuleList(MoE(dim, num_experts=8, top_k=2) for _ in range(num_layers))
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        x_BSD = self.mix(self.embedding(tokens_BS))[0]
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return self.head(x_BSD)


def batch(size: int = 16, length: int = 33) -> torch.Tensor:
    """Draw sequences in which half of the tokens follow from the one before; the others are uneven."""
    drawn_BS = torch.multinomial(1 / torch.arange(1.0, VOCABULARY + 1), size * length, replacement=True).view(
        size, length
    )
    tokens = [drawn_BS[:, 0]]
    for drawn_B in drawn_BS[:, 1:].unbind(1):
        follows_B = torch.rand(size) < 0.5
        tokens.append(torch.where(follows_B, (3 * tokens[-1] + 1) % VOCABULARY, drawn_B))
    return torch.stack(tokens, dim=1)


def main(balanced: bool = True, steps: int = 150, seed: int = 0) -> dict[str, float]:
    """Train, and return the loss and MaxVio of the last 20 steps."""
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # rule=None only watches, for the comparison.
    experts = balance_(model) if balanced else balance_(model, rule=None)
    losses, violations = deque(maxlen=20), deque(maxlen=20)
    for _ in range(steps):
        tokens_BS = batch()
        logits_BSV = model(tokens_BS[:, :-1])
        loss = functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        load = experts.update()  # once per optimizer step
        losses.append(loss.item())
        violations.append(fmean(max_violation(counts_E).item() for counts_E in load.counts.values()))
    return {"loss": fmean(losses), "max_violation": fmean(violations)}


if __name__ == "__main__":
    print("balanced:", main(balanced=True))
    print("control: ", main(balanced=False))
