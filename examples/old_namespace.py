"""A project of the old namespace, ``pytorch_lightning``, with a hand-written MoE, balanced by the same line.

Run it: python examples/old_namespace.py

Shape legend: B batch, S sequence, T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from moe_plugin import LoadMonitor, LossFreeBalancing

VOCABULARY = 64


def walks(size: int, seed: int, length: int = 33) -> torch.Tensor:
    """Draw sequences in which half of the tokens follow from the one before; int64 (B, S + 1)."""
    random = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1.0, VOCABULARY + 1)
    tokens_BS = torch.multinomial(weights, size * length, replacement=True, generator=random).view(
        size, length
    )
    for position in range(1, length):
        follows_B = torch.rand(size, generator=random) < 0.5
        next_B = (3 * tokens_BS[:, position - 1] + 1) % VOCABULARY
        tokens_BS[:, position] = torch.where(follows_B, next_B, tokens_BS[:, position])
    return tokens_BS


class Gate(nn.Module):
    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.projection = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights_TK, ids_TK = self.projection(x_TD).sigmoid().topk(self.top_k)
        return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


class MoE(nn.Module):
    def __init__(self, dim: int, num_experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.gate = Gate(dim, num_experts, top_k)
        self.up_EDD = nn.Parameter(torch.randn(num_experts, dim, dim) * dim**-0.5)
        self.down_EDD = nn.Parameter(torch.randn(num_experts, dim, dim) * dim**-0.5)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_TD = x_BSD.flatten(0, 1)
        weights_TK, ids_TK = self.gate(x_TD)
        y_TKD = (x_TD[:, None, None] @ self.up_EDD[ids_TK]).relu() @ self.down_EDD[ids_TK]
        return x_BSD + (weights_TK[..., None] * y_TKD.squeeze(2)).sum(1).view_as(x_BSD)


class Project(pl.LightningModule):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.mix = nn.GRU(dim, dim, batch_first=True)
        self.layers = nn.Sequential(MoE(dim), MoE(dim))
        self.head = nn.Linear(dim, VOCABULARY)

    def training_step(self, tokens_BS: torch.Tensor, batch_idx: int) -> torch.Tensor:
        x_BSD = self.mix(self.embedding(tokens_BS[:, :-1]))[0]
        logits_BSV = self.head(self.layers(x_BSD))
        loss = functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(balanced: bool = True, steps: int = 150, seed: int = 0) -> dict[str, float]:
    """Train, and return the last loss, and MaxVio of the last 20 steps together."""
    pl.seed_everything(seed, verbose=False)
    monitor = LoadMonitor(every_n_steps=20)  # alone it only watches
    # Our callbacks are of the new namespace; a trainer of the old one calls their hooks too. Pass a list: it does not
    # recognise a bare callback.
    callbacks: list[Any] = [monitor]
    if balanced:
        callbacks.append(LossFreeBalancing())  # the one line
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Project(), DataLoader(walks(16 * steps, seed), batch_size=16))  # pyright: ignore[reportArgumentType]
    return {
        "loss": trainer.callback_metrics["train/loss"].item(),
        "max_violation": fmean(load.max_violation_global for load in monitor.training_load.values()),
    }


if __name__ == "__main__":
    print("balanced:", main(balanced=True))
    print("control: ", main(balanced=False))
