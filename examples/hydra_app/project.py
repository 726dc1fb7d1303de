"""The model and the data of the project: nothing in it knows of moe_plugin.

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import OlmoeConfig, OlmoeForCausalLM

VOCABULARY = 64


class Project(lightning.LightningModule):
    def __init__(self, num_experts: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        config = OlmoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=num_experts,
            num_experts_per_tok=2,
            eos_token_id=None,
        )
        self.model = OlmoeForCausalLM(config)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        (tokens_BS,) = batch
        loss = self.model(input_ids=tokens_BS, labels=tokens_BS).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Walks(lightning.LightningDataModule):
    """Sequences in which half of the tokens follow from the one before."""

    def __init__(self, size: int, length: int, batch_size: int) -> None:
        super().__init__()
        self.size, self.length, self.batch_size = size, length, batch_size

    def train_dataloader(self) -> DataLoader:
        weights = 1 / torch.arange(1.0, VOCABULARY + 1)
        tokens_BS = torch.multinomial(weights, self.size * self.length, replacement=True)
        tokens_BS = tokens_BS.view(self.size, self.length)
        for position in range(1, self.length):
            follows_B = torch.rand(self.size) < 0.5
            next_B = (3 * tokens_BS[:, position - 1] + 1) % VOCABULARY
            tokens_BS[:, position] = torch.where(follows_B, next_B, tokens_BS[:, position])
        return DataLoader(TensorDataset(tokens_BS), batch_size=self.batch_size)
