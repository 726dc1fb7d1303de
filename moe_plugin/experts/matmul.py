"""One matrix product per expert over rows sorted by expert.

Shape legend: P rows (token-expert pairs), E experts, I input width, O output width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_ALIGNMENT_BYTES = 16  # What grouped_mm asks of every stride.
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expert_matmul(rows_PI: Tensor, weights_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """Multiplies each expert's rows by that expert's weights.

    The backward writes a gradient for all of `weights_EIO`, zero for experts without rows, so that
    data-parallel training never waits for a gradient.

    Args:
        rows_PI: Rows sorted by expert, fp64, fp32, bf16 or fp16.
        weights_EIO: Weights of the same dtype.
        offsets_E: End of each expert's rows, int32, the last one P.

    Returns:
        The products, (P, O).
    """
    if _can_group(rows_PI, weights_EIO):
        grouped = _grouped if rows_PI.dtype == torch.bfloat16 else _grouped_untraced
        return grouped(rows_PI, weights_EIO, offsets_E)  # pyright: ignore[reportCallIssue]
    return _matmul_loop(rows_PI, weights_EIO, offsets_E)


def _grouped(rows_PI: Tensor, weights_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    return _DenseGradient.apply(functional.grouped_mm(rows_PI, weights_EIO, offs=offsets_E))


# torch.compile takes grouped_mm in bf16 only: a graph ends here in any other dtype.
_grouped_untraced = torch.compiler.disable(_grouped)


def _can_group(rows_PI: Tensor, weights_EIO: Tensor) -> bool:
    """Whether grouped_mm takes the dtype, and the strides of inputs, outputs and gradients are aligned."""
    widths = weights_EIO.shape[1:]
    aligned = all(width * rows_PI.element_size() % _ALIGNMENT_BYTES == 0 for width in widths)
    return aligned and rows_PI.dtype in _GROUPED_DTYPES


def _matmul_loop(rows_PI: Tensor, weights_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    sizes = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()
    # unbind, since indexing `weights[e]` would allocate a full zero gradient for each expert.
    pairs = zip(rows_PI.split(sizes), weights_EIO.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in pairs])


class _DenseGradient(torch.autograd.Function):
    """Identity whose incoming gradient is made contiguous: grouped_mm's backward rejects expanded ones."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()
