"""When to attach to a LightningModule, and when to update: shared by the callbacks that need counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from moe_plugin.attach.balance import BalancedModel
from moe_plugin.callbacks.step_clock import StepClock, optimizer_of


class Attachment:
    """Attaches before the strategy wraps the model, and updates once per optimizer step that took place."""

    def __init__(self, attach: Callable[[LightningModule], BalancedModel]) -> None:
        """Set how to attach.

        Args:
            attach: Calls `balance_` on the module.
        """
        self._attach = attach
        self._balanced: BalancedModel | None = None
        self._clock = StepClock(self._update, self._skip)

    @property
    def balanced(self) -> BalancedModel:
        """The sites of the module, once attached."""
        assert self._balanced is not None, "not attached yet"
        return self._balanced

    @property
    def is_attached(self) -> bool:
        """Whether the module's routers have been found."""
        return self._balanced is not None

    def setup(self, pl_module: LightningModule) -> None:
        """Attach now, or right after ``configure_model`` if the module builds its blocks there."""
        if not builds_itself(pl_module):
            self._balanced = self._attach(pl_module)
            return
        configure = pl_module.configure_model

        def configure_and_attach() -> None:
            del pl_module.__dict__["configure_model"]
            configure()
            self._balanced = self._attach(pl_module)

        pl_module.__dict__["configure_model"] = configure_and_attach

    def start(self, trainer: Trainer) -> None:
        """Choose the ranks to sum over and the optimizer to listen to."""
        self.balanced.process_group = data_parallel_group(trainer)
        self.balanced.discard_counts_()
        routers = [parameter for site in self.balanced.values() for parameter in site.router.parameters()]
        self._clock.start_(optimizer_of(routers, trainer.optimizers))

    def stop(self) -> None:
        """Listen no longer; the model stays balanced."""
        self._clock.stop_()

    def batch_starts(self) -> None:
        """A training batch begins."""
        self._clock.batch_starts()

    def batch_ends(self) -> None:
        """A training batch is over."""
        self._clock.batch_ends()

    def backward_starts(self, loss: Tensor) -> None:
        """A NaN or infinite loss must not move a bias."""
        self.balanced.reject_if_(~loss.detach().isfinite().all())

    def step_is_due(self, optimizer: Optimizer) -> None:
        """Gradients are ready."""
        self._clock.step_is_due(optimizer)

    def _update(self, found_inf: Any) -> None:
        if found_inf is not None:
            self.balanced.reject_if_(found_inf > 0)
        self.balanced.update()

    def _skip(self) -> None:
        self.balanced.discard_counts_()


def builds_itself(pl_module: LightningModule) -> bool:
    """Whether the module overrides ``configure_model``; it may be of the old namespace, `pytorch_lightning`, too."""
    owner = next(kind for kind in type(pl_module).__mro__ if "configure_model" in vars(kind))
    return owner.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")


def data_parallel_group(trainer: Trainer) -> dist.ProcessGroup | None:
    """Return the ranks that see different tokens; None for all of them.

    With tensor parallelism the world would count each token once per shard.
    """
    # By name: the old namespace, `pytorch_lightning`, has a class of its own.
    if any(kind.__name__ == "ModelParallelStrategy" for kind in type(trainer.strategy).__mro__):
        return trainer.strategy.device_mesh["data_parallel"].get_group()  # pyright: ignore[reportAttributeAccessIssue]
    return None
