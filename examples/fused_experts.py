"""A Qwen3-MoE whose experts our kernels compute, on the same parameters: experts="fused".

Run it: python examples/fused_experts.py

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

from collections import deque

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_plugin import balance_
from moe_plugin.metrics import max_violation

VOCABULARY = 64


def new_model() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
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
    )


def batch(size: int = 16, length: int = 32) -> dict[str, torch.Tensor]:
    """Draw sequences in which half of the tokens follow from the one before; the others are uneven."""
    weights = 1 / torch.arange(1.0, VOCABULARY + 1)
    tokens_BS = torch.multinomial(weights, size * length, replacement=True).view(size, length)
    for position in range(1, length):
        follows_B = torch.rand(size) < 0.5
        next_B = (3 * tokens_BS[:, position - 1] + 1) % VOCABULARY
        tokens_BS[:, position] = torch.where(follows_B, next_B, tokens_BS[:, position])
    return {"input_ids": tokens_BS, "labels": tokens_BS}


def main(balanced: bool = True, steps: int = 120, seed: int = 0) -> dict[str, float]:
    """Train, and return the last loss, and MaxVio of the last 20 steps together."""
    torch.manual_seed(seed)
    model = new_model()
    # The control is only watched, and keeps its own code for the experts.
    experts = balance_(model, experts="fused") if balanced else balance_(model, rule=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    counts = deque(maxlen=20)
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(torch.stack(list(experts.update().counts.values())))
    if balanced:
        print("computed by our kernels:", *experts.fused)
    return {
        "loss": loss.item(),
        "max_violation": max_violation(torch.stack(list(counts)).sum(0)).mean().item(),
    }


if __name__ == "__main__":
    print("balanced:", main(balanced=True))
    print("control: ", main(balanced=False))
