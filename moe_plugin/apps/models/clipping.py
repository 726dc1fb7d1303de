"""Gradient clipping for parameters on several device meshes, as with expert or tensor parallelism."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down until their norm over all parameters and ranks is at most `max_norm`.

    `torch.nn.utils.clip_grad_norm_` does the same, but refuses gradients of different meshes. In your LightningModule:

    Examples:
        >>> def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        ...     clip_gradients_(self.parameters(), gradient_clip_val)  # doctest: +SKIP

    Args:
        parameters: Those of the optimizer, the same on all ranks; those without a gradient are skipped.
        max_norm: The largest L2 norm.

    Returns:
        The norm before, a scalar.
    """
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh[getattr(parameter.grad, "device_mesh", None)].append(parameter)
    norms = [_norm(group) for group in by_mesh.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([torch.zeros(()), *norms]))
    for group in by_mesh.values():
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
