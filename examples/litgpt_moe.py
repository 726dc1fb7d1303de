"""LitGPT's own mixture of experts (``LLaMAMoE``) in a Lightning project, balanced by one line in ``callbacks``.

Run it: pip install litgpt && python examples/litgpt_moe.py

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from statistics import fmean

import lightning
import torch
from litgpt.config import Config  # pyright: ignore[reportMissingImports]
from litgpt.model import GPT  # pyright: ignore[reportMissingImports]
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


class Project(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = Config(
            block_size=32,
            n_layer=2,
            n_embd=32,
            n_head=2,
            vocab_size=VOCABULARY,
            padded_vocab_size=VOCABULARY,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMoE",
            intermediate_size=32,
            moe_intermediate_size=32,
            n_expert=8,
            n_expert_per_token=2,
        )
        self.model = GPT(config)

    def training_step(self, tokens_BS: torch.Tensor, batch_idx: int) -> torch.Tensor:
        logits_BSV = self.model(tokens_BS[:, :-1])
        loss = functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(balanced: bool = True, steps: int = 150, seed: int = 0) -> dict[str, float]:
    """Train, and return the last loss, and MaxVio of the last 20 steps together."""
    lightning.seed_everything(seed, verbose=False)
    monitor = LoadMonitor(every_n_steps=20)  # alone it only watches
    callbacks: list[lightning.Callback] = [monitor]
    if balanced:
        callbacks.append(LossFreeBalancing())  # the one line
    trainer = lightning.Trainer(
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
