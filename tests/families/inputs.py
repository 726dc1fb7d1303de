"""Inputs for any model: a padded batch, for both sides of an encoder-decoder.

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, PADDING = 3, 8, 5


def inputs_of(model: nn.Module, batch: int = BATCH, length: int = LENGTH) -> dict[str, Any]:
    """Return token ids, and masks with `PADDING` padded tokens (in a decoder behind an encoder: one less).

    Args:
        model: The model.
        batch: B.
        length: S.
    """
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(3, 90, (batch, length), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids_BS, "attention_mask": mask(PADDING, batch, length)}
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids_BS.flip(1)
        if "self_conditioning_mask" not in parameters:  # a diffusion canvas has no padding
            inputs["decoder_attention_mask"] = mask(PADDING - 1, batch, length)
    if any("vision_moe" in name for name, _ in model.named_modules()):
        # Experts of a modality see its tokens only, which no mask describes.
        inputs |= {
            "attention_mask": mask(0, batch, length),
            "moe_mm_token_type_ids": 1 - mask(PADDING, batch, length),
        }
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def mask(padding: int, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Return a mask (B, S) with this many padded tokens at the end of the last sequence; see `inputs_of`."""
    mask_BS = torch.ones(batch, length, dtype=torch.long)
    mask_BS[-1, length - padding :] = 0
    return mask_BS


def tokens_at(site: str, inputs: dict[str, Any]) -> int:
    """Return how many tokens a site must count."""
    if "moe_mm_token_type_ids" in inputs:
        seen = int(inputs["moe_mm_token_type_ids"].sum())
        return seen if "vision_moe" in site else BATCH * LENGTH - seen
    if "decoder_input_ids" in inputs and "decoder." in site:
        return int(inputs.get("decoder_attention_mask", mask(0)).sum())
    return int(inputs["attention_mask"].sum())
