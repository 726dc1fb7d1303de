"""How an optimizer reports its steps: by its post-step hook, or by ``step`` itself if DeepSpeed made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from moe_plugin.errors import AttachError


class Hook(Protocol):
    """What `after_steps` returns."""

    def remove(self) -> None:
        """Stop the calls."""
        ...


def after_steps(optimizer: Any, call: Callable[[Any], object]) -> Hook:
    """Call a function with the optimizer after each of its steps.

    Args:
        optimizer: One of the trainer's optimizers.
        call: The function.

    Raises:
        AttachError: If the optimizer does not report its steps.
    """
    if accumulates(optimizer):
        return _WatchedStep(optimizer, call)
    try:
        return optimizer.register_step_post_hook(lambda stepped, args, kwargs: call(stepped))
    except AttributeError as error:
        name = type(optimizer).__name__
        raise AttachError(
            f"Biases move when an optimizer has stepped, but {name} does not report its steps ({error}). Return a "
            "torch.optim.Optimizer itself from configure_optimizers, not a wrapper without its hooks."
        ) from error


def accumulates(optimizer: Any) -> bool:
    """Return whether DeepSpeed made it: no hooks, steps of an inner optimizer per group, and only in some batches."""
    # By name: its import takes seconds and needs its compilers.
    return any(kind.__name__ == "DeepSpeedOptimizer" for kind in type(optimizer).__mro__)


class _WatchedStep:
    """Calls a function after each call of an optimizer's ``step``, which DeepSpeed's engine makes once per step."""

    def __init__(self, optimizer: Any, call: Callable[[Any], object]) -> None:
        self._optimizer = optimizer
        self._call = call
        self._step = optimizer.step
        optimizer.step = self._run

    def remove(self) -> None:
        """Give ``step`` back."""
        del self._optimizer.step

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        result = self._step(*args, **kwargs)
        self._call(self._optimizer)
        return result
