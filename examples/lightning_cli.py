"""A LightningCLI project: balancing is one argument on the command line, or one entry in the YAML file.

Run it: python examples/lightning_cli.py fit --trainer.max_steps=150 --trainer.callbacks+=moe_plugin.LossFreeBalancing

The same in a configuration file::

    trainer:
      callbacks:
        - class_path: moe_plugin.LossFreeBalancing
          init_args:
            rule:
              class_path: moe_plugin.balancing.rules.Sign
              init_args: {rate: 0.001}

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_plugin import LoadMonitor

VOCABULARY = 64


class Project(lightning.LightningModule):
    def __init__(self, num_experts: int = 8, learning_rate: float = 3e-3) -> None:
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

    def __init__(self, size: int = 2400, length: int = 32, batch_size: int = 16) -> None:
        super().__init__()
        self.size, self.length, self.batch_size = size, length, batch_size

    def train_dataloader(self) -> DataLoader:
        weights = 1 / torch.arange(1.0, VOCABULARY + 1)
        tokens_BS = torch.multinomial(weights, self.size * self.length, replacement=True).view(
            self.size, self.length
        )
        for position in range(1, self.length):
            follows_B = torch.rand(self.size) < 0.5
            next_B = (3 * tokens_BS[:, position - 1] + 1) % VOCABULARY
            tokens_BS[:, position] = torch.where(follows_B, next_B, tokens_BS[:, position])
        return DataLoader(TensorDataset(tokens_BS), batch_size=self.batch_size)


def run(arguments: Sequence[str] | None = None) -> LightningCLI:
    """Run the command line; ``arguments`` are the program's own by default."""
    return LightningCLI(Project, Walks, args=arguments, save_config_callback=None)


def main(balanced: bool = True, steps: int = 150, seed: int = 0) -> dict[str, float]:
    """Train, and return the last loss, and MaxVio of the last 20 steps together."""
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    arguments = [
        "fit",
        f"--seed_everything={seed}",
        f"--trainer.max_steps={steps}",
        "--trainer.accelerator=cpu",
    ]
    arguments += [f"--trainer.{switch}=false" for switch in quiet]
    arguments += ["--trainer.callbacks+=moe_plugin.LoadMonitor", "--trainer.callbacks.every_n_steps=20"]
    if balanced:
        arguments += ["--trainer.callbacks+=moe_plugin.LossFreeBalancing"]  # the one argument
    trainer = run(arguments).trainer
    (monitor,) = [callback for callback in trainer.callbacks if isinstance(callback, LoadMonitor)]  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "loss": trainer.callback_metrics["train/loss"].item(),
        "max_violation": fmean(load.max_violation_global for load in monitor.training_load.values()),
    }


if __name__ == "__main__":
    run()
