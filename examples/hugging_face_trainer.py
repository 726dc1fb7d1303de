"""The Hugging Face Trainer with a Qwen3-MoE, balanced by one callback.

Run it: python examples/hugging_face_trainer.py

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import tempfile
from collections import deque
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from moe_plugin.callbacks.hugging_face import LoadMonitorTrainerCallback, LossFreeTrainerCallback
from moe_plugin.metrics import max_violation

VOCABULARY = 64


class Walks(Dataset):
    """Sequences in which half of the tokens follow from the one before."""

    def __init__(self, size: int, seed: int, length: int = 32) -> None:
        random = torch.Generator().manual_seed(seed)
        weights = 1 / torch.arange(1.0, VOCABULARY + 1)
        tokens_BS = torch.multinomial(weights, size * length, replacement=True, generator=random).view(
            size, length
        )
        for position in range(1, length):
            follows_B = torch.rand(size, generator=random) < 0.5
            next_B = (3 * tokens_BS[:, position - 1] + 1) % VOCABULARY
            tokens_BS[:, position] = torch.where(follows_B, next_B, tokens_BS[:, position])
        self.tokens_BS = tokens_BS

    def __len__(self) -> int:
        return len(self.tokens_BS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens_BS[index], "labels": self.tokens_BS[index]}


def new_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config)


class LastLoads(TrainerCallback):
    """Keeps the load of the last 20 steps, for the comparison."""

    def __init__(self, balancing: LossFreeTrainerCallback | LoadMonitorTrainerCallback) -> None:
        self.balancing = balancing
        self.loads = deque(maxlen=20)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        record = self.balancing.balanced.record
        assert record is not None
        self.loads.append(torch.stack(list(record.counts.values())))


def main(balanced: bool = True, steps: int = 200, seed: int = 0) -> dict[str, float]:
    """Train, and return the loss of the training, and MaxVio of the last 20 steps together."""
    set_seed(seed)
    # The one line; the control is only watched.
    balancing = LossFreeTrainerCallback() if balanced else LoadMonitorTrainerCallback()
    last = LastLoads(balancing)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            new_model(), arguments, train_dataset=Walks(16 * steps, seed), callbacks=[balancing, last]
        )
        loss = trainer.train().training_loss
    return {"loss": loss, "max_violation": max_violation(torch.stack(list(last.loads)).sum(0)).mean().item()}


if __name__ == "__main__":
    print("balanced:", main(balanced=True))
    print("control: ", main(balanced=False))
