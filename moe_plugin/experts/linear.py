"""A linear layer without bias whose initial scale is given."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """`nn.Linear` without bias, drawn from a normal distribution of variance `gain**2 / in_features`.

    The gain belongs to the layer, not to an outer `apply`, so that a layer created on the meta device can be
    materialised on its own.
    """

    def __init__(self, in_features: int, out_features: int, *, gain: float = 1.0) -> None:
        """Creates the layer.

        Args:
            in_features: Input width.
            out_features: Output width.
            gain: Standard deviation of the outputs for inputs of unit variance.
        """
        self.gain = gain
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draws new weights."""
        nn.init.normal_(self.weight, std=self.gain * self.in_features**-0.5)
