"""A linear layer without bias, with a given initial scale.

Half precision is computed in fp32 on processors without instructions for it, see `moe_plugin.experts.kernels.dtypes`.

Shape legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_plugin.experts.kernels.dtypes import compute_dtype, product_dtype


class Linear(nn.Linear):
    """`nn.Linear` without bias, drawn from a normal distribution of variance `gain**2 / in_features`.

    The gain belongs to the layer, not to an outer `apply`: a layer created on the meta device can be drawn alone.
    """

    def __init__(self, in_features: int, out_features: int, *, gain: float = 1.0) -> None:
        """Create the layer.

        Args:
            in_features: Input width.
            out_features: Output width.
            gain: Standard deviation of the outputs for inputs of unit variance.
        """
        self.gain = gain
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=self.gain * self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product of inputs and weights, as `functional.linear` does without bias."""
    dtype = compute_dtype(x)
    if product_dtype(dtype, x.device) == dtype:
        return functional.linear(x, weight)
    return _WideLinear.apply(x.to(dtype), weight)


class _WideLinear(torch.autograd.Function):
    """The product in fp32 of inputs in half precision; only these are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient, dx, dweight = gradients[0].float(), None, None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (gradient @ weight.float()).to(x.dtype)
            if ctx.needs_input_grad[1]:
                gradient_TO, x_TI = gradient.reshape(-1, len(weight)), x.reshape(-1, weight.shape[1])
                dweight = (gradient_TO.t() @ x_TI.float()).to(weight.dtype)
        return dx, dweight
