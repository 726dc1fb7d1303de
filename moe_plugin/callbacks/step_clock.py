"""Report when an optimizer step took place.

The optimizer's own post-step hook is the one place that fires once per real step: with accumulation, manual
optimization, clipping and LBFGS, and before checkpoints of the step are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepClock:
    """Calls ``on_step`` after each optimizer step inside a training batch, and ``on_skip`` after a skipped one."""

    def __init__(self, on_step: Callable[[Tensor | None], object], on_skip: Callable[[], object]) -> None:
        """Set what is called.

        Args:
            on_step: Takes the gradient scaler's verdict, a float scalar above zero for a step that the optimizer
                itself left out because of infinite gradients; None without a scaler.
            on_skip: Called at the end of a batch whose step the scaler kept from the optimizer.
        """
        self._on_step = on_step
        self._on_skip = on_skip
        self._handle: RemovableHandle | None = None
        self._in_batch = False
        self._awaiting = False

    def start_(self, optimizer: Optimizer) -> None:
        """Follow one optimizer."""
        self.stop_()
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def stop_(self) -> None:
        """Stop following it."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._in_batch = self._awaiting = False

    def batch_starts(self) -> None:
        """Count steps from here on; outside of batches, restoring a checkpoint makes steps."""
        self._in_batch = True

    def step_is_due(self) -> None:
        """Expect a step: gradients are ready, and only the gradient scaler can prevent it."""
        self._awaiting = self._handle is not None

    def batch_ends(self) -> None:
        """Ignore steps from here on."""
        if self._awaiting:
            self._on_skip()
        self._in_batch = self._awaiting = False

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self._in_batch:
            self._awaiting = False
            self._on_step(getattr(optimizer, "found_inf", None))


def optimizer_of(parameters: Sequence[torch.nn.Parameter], optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return the optimizer that trains most of the parameters; the first one if none trains any.

    Args:
        parameters: The parameters.
        optimizers: At least one.
    """
    wanted = {id(parameter) for parameter in parameters}

    def trained(optimizer: Optimizer) -> int:
        return sum(id(each) in wanted for group in optimizer.param_groups for each in group["params"])

    return max(optimizers, key=trained)
