"""A training step on fake tensors: shapes and lifetimes, no numbers and no memory.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.nn import functional

from moe_plugin.apps.plan.fake_kernels import fused_kernels
from moe_plugin.apps.plan.live_bytes import LiveBytes
from moe_plugin.apps.plan.timeline import Timeline
from moe_plugin.errors import ConfigError


def trace(
    model: nn.Module,
    token_shape_BS: tuple[int, int],
    units: Sequence[nn.Module] = (),
    *,
    autocast: torch.dtype | None = None,
) -> Timeline:
    """Run a forward and backward of cross-entropy over the next token, and note what is alive when.

    Attention is taken to be a fused kernel, which keeps queries, keys, values, outputs and one number per row.

    Args:
        model: A causal language model on the meta device; it cannot be used afterwards.
        token_shape_BS: Sequences and their length.
        units: Parts of the model to be marked in the timeline, outer ones first; the model itself if there are none.
        autocast: Dtype of the autocast that it trains under; None for none.

    Raises:
        ConfigError: The model cannot run without values, such as experts that loop over those that were hit.
    """
    autocasting = torch.autocast("cpu", autocast) if autocast else nullcontext()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), fused_kernels(), autocasting:
            _make_fake_(model)
            tokens_BS = torch.zeros(token_shape_BS, dtype=torch.long)
            with LiveBytes(model, units or [model], _vocab_size(model)) as live:
                next_token_loss(model, tokens_BS).backward()
    except DynamicOutputShapeException as error:
        fix = f"Its {error.func} makes shapes from values: choose experts by grouped_mm."
        raise ConfigError(
            "model", "must run without values to be planned", type(model).__name__, fix
        ) from error
    return live.timeline()


def _vocab_size(model: nn.Module) -> int:
    """Return the rows of the largest embedding."""
    return max(module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding))


def next_token_loss(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Return the cross-entropy in fp32; the targets are the tokens themselves.

    Args:
        model: A model of this package or of transformers.
        tokens_BS: Tokens.
    """
    cacheless = {"use_cache": False} if hasattr(model, "config") else {}
    output = model(tokens_BS, **cacheless)
    logits_BSV = getattr(output, "logits", output)
    return functional.cross_entropy(logits_BSV.flatten(0, 1).float(), tokens_BS.flatten())


def _make_fake_(model: nn.Module) -> None:
    """Give all parameters and buffers fake storage on the CPU; shared tensors stay shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    tensors[name] = made.setdefault(id(old), _fake_like(old))  # pyright: ignore[reportArgumentType]


def _fake_like(old: Tensor) -> Tensor:
    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
