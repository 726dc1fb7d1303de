"""LoRA on a pretrained Mixtral: the router stays frozen, and only its bias moves. Balanced from the first step on.

Run it: pip install peft && python examples/pretrained_lora.py

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import tempfile
from collections import deque

import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from moe_plugin import balance_
from moe_plugin.metrics import max_violation

VOCABULARY = 64


def pretrained(folder: str) -> MixtralForCausalLM:
    """Return a small random model that takes the place of a pretrained one."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return MixtralForCausalLM.from_pretrained(folder)


def batch(random: torch.Generator, size: int = 16, length: int = 32) -> dict[str, torch.Tensor]:
    weights = 1 / torch.arange(1.0, VOCABULARY + 1)
    tokens_BS = torch.multinomial(weights, size * length, replacement=True, generator=random)
    tokens_BS = tokens_BS.view(size, length)
    return {"input_ids": tokens_BS, "labels": tokens_BS}


def main(balanced: bool = True, steps: int = 60, seed: int = 0) -> dict[str, float]:
    """Train, and return the last loss, and MaxVio of the last 20 steps together."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(pretrained(folder), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        # rule=None only watches, for the comparison.
        experts = balance_(model) if balanced else balance_(model, rule=None)
        if balanced:  # the bias that evens out the load of these batches, before the first step
            experts.warm_start([batch(random) for _ in range(8)])
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        counts = deque(maxlen=20)
        for _ in range(steps):
            loss = model(**batch(random)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            counts.append(torch.stack(list(experts.update().counts.values())))
        merged = model.merge_and_unload()  # pyright: ignore[reportCallIssue]
        assert isinstance(merged, MixtralForCausalLM)
        merged.save_pretrained(folder)
        # Mixtral has no place for the bias, so it goes into a file next to the weights.
        experts.export(merged, f"{folder}/bias.safetensors")
    return {
        "loss": loss.item(),
        "max_violation": max_violation(torch.stack(list(counts)).sum(0)).mean().item(),
    }


if __name__ == "__main__":
    print("balanced:", main(balanced=True))
    print("control: ", main(balanced=False))
