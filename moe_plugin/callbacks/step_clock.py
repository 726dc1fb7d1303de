"""Report when an optimizer step took place.

A step is one of the optimizer that trains the routers, inside a training batch; with several optimizers the steps of
the others do not count. The optimizer's own post-step hook is the one place that fires once per real step: with
accumulation, manual optimization, clipping and LBFGS, and before checkpoints of the step are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from moe_plugin.callbacks.step_hooks import Hook, accumulates, after_steps
from moe_plugin.errors import AttachError


class StepClock:
    """Calls ``on_step`` after each step of one optimizer in a training batch, and ``on_skip`` after a skipped one.

    Attributes:
        idle_batches: Training batches since the last step or skipped one, or since the start.
        has_stepped: Whether there was one since the start.
    """

    def __init__(self, on_step: Callable[[Tensor | None], object], on_skip: Callable[[], object]) -> None:
        """Set what is called.

        Args:
            on_step: Takes the gradient scaler's verdict, a float scalar above zero for a step that the optimizer
                itself left out because of infinite gradients; None without a scaler.
            on_skip: Called for a step that the optimizer was kept from: by the gradient scaler, at the end of the
                batch, or by DeepSpeed, at once.
        """
        self._on_step = on_step
        self._on_skip = on_skip
        self._optimizer: Any = None
        self._hook: Hook | None = None
        self._in_batch = False
        self._awaiting = False
        self.idle_batches = 0
        self.has_stepped = False

    @property
    def followed(self) -> str:
        """The class of the optimizer that is followed."""
        return type(self._optimizer).__name__

    def start_(self, optimizer: Any) -> None:
        """Follow one optimizer.

        Raises:
            AttachError: If it does not report its steps.
        """
        self.stop_()
        self.idle_batches, self.has_stepped = 0, False
        self._optimizer, self._hook = optimizer, after_steps(optimizer, self._after_step)

    def stop_(self) -> None:
        """Stop following it."""
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = self._hook = None
        self._in_batch = self._awaiting = False

    def batch_starts(self) -> None:
        """Count steps from here on; outside of batches, restoring a checkpoint makes steps."""
        self._in_batch = True

    def step_is_due(self, optimizer: Any) -> None:
        """Expect a step if this optimizer is followed: gradients are ready, only the gradient scaler can prevent it."""
        # Wrappers of an optimizer share its groups.
        is_followed = self._hook is not None and optimizer.param_groups is self._optimizer.param_groups
        if is_followed and not accumulates(optimizer):
            self._awaiting = True

    def batch_ends(self) -> None:
        """Ignore steps from here on."""
        self.idle_batches += 1
        if self._awaiting:
            self._steps()
            self._on_skip()
        self._in_batch = self._awaiting = False

    def _after_step(self, optimizer: Any) -> None:
        if not self._in_batch:
            return
        self._awaiting = False
        self._steps()
        if getattr(optimizer, "overflow", False):
            self._on_skip()
        else:
            self._on_step(getattr(optimizer, "found_inf", None))

    def _steps(self) -> None:
        self.idle_batches, self.has_stepped = 0, True


def optimizer_of(parameters: Sequence[torch.nn.Parameter], optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return the optimizer that trains most of the parameters; the first one if none trains any.

    Args:
        parameters: The parameters.
        optimizers: Those of the trainer.

    Raises:
        AttachError: If there is none.
    """
    if not optimizers:
        raise AttachError(
            "Biases move when an optimizer has stepped, but configure_optimizers returned none. Return the one that "
            "trains the routers there, also with manual optimization, and call step() of self.optimizers()."
        )
    wanted = {id(parameter) for parameter in parameters}

    def trained(optimizer: Optimizer) -> int:
        return sum(id(each) in wanted for group in optimizer.param_groups for each in group["params"])

    return max(optimizers, key=trained)
