"""A Lightning project around a Hugging Face Mixtral, balanced by one line in ``callbacks``.

Run it: python examples/lightning_mixtral.py

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

from statistics import fmean

import lightning
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import MixtralConfig, MixtralForCausalLM

from moe_plugin import LoadMonitor, LossFreeBalancing

VOCABULARY, PADDING = 64, 0


class Walks(Dataset):
    """Sentences of different lengths, padded, in which half of the tokens follow from the one before."""

    def __init__(self, size: int, seed: int, length: int = 32) -> None:
        random = torch.Generator().manual_seed(seed)
        weights = 1 / torch.arange(1.0, VOCABULARY)  # token 0 is padding
        drawn_BS = 1 + torch.multinomial(weights, size * length, replacement=True, generator=random).view(
            size, length
        )
        for position in range(1, length):
            follows_B = torch.rand(size, generator=random) < 0.5
            next_B = 1 + (3 * drawn_BS[:, position - 1]) % (VOCABULARY - 1)
            drawn_BS[:, position] = torch.where(follows_B, next_B, drawn_BS[:, position])
        lengths_B = torch.randint(length // 2, length + 1, (size, 1), generator=random)
        self.mask_BS = (torch.arange(length) < lengths_B).long()
        self.tokens_BS = drawn_BS.where(self.mask_BS == 1, PADDING)

    def __len__(self) -> int:
        return len(self.tokens_BS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens_S, mask_S = self.tokens_BS[index], self.mask_BS[index]
        labels_S = tokens_S.where(mask_S == 1, -100)
        return {"input_ids": tokens_S, "attention_mask": mask_S, "labels": labels_S}


class Project(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            pad_token_id=PADDING,
        )
        self.model = MixtralForCausalLM(config)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
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
    trainer.fit(Project(), DataLoader(Walks(16 * steps, seed), batch_size=16))
    loads = monitor.training_load.values()
    return {
        "loss": trainer.callback_metrics["train/loss"].item(),
        "max_violation": fmean(load.max_violation_global for load in loads),
    }


if __name__ == "__main__":
    print("balanced:", main(balanced=True))
    print("control: ", main(balanced=False))
