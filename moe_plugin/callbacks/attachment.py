"""When to attach to a LightningModule and when to update, for all callbacks that count."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from moe_plugin.attach.balance import balance_as_set_
from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.attach.settings import BalanceSettings
from moe_plugin.attach.steering.bias import show_in_state_dict_
from moe_plugin.callbacks.averaged_weights import renew_averages_
from moe_plugin.callbacks.idle_alarm import IdleAlarm
from moe_plugin.callbacks.step_clock import StepClock, optimizer_of


class Attachment(Callback):
    """Attaches before the strategy wraps the model, and updates once per optimizer step that took place."""

    def __init__(self, settings: BalanceSettings) -> None:
        """Take how to balance."""
        self._settings = settings
        self._balanced: BalancedModel | None = None
        self._clock = StepClock(self._update, self._discard)
        self._idle_alarm = IdleAlarm(self._clock)

    @property
    def balanced(self) -> BalancedModel:
        """The sites of the module, once attached."""
        assert self._balanced is not None, "not attached yet"
        return self._balanced

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach now, or right after ``configure_model`` if the module builds its blocks there.

        Raises:
            AttachError: If no router is found, or experts are to be fused and some cannot.
        """
        if not builds_itself(pl_module):
            self._attach_(trainer, pl_module)
            return
        configure = pl_module.configure_model

        def configure_and_attach() -> None:
            del pl_module.__dict__["configure_model"]
            configure()
            self._attach_(trainer, pl_module)

        pl_module.__dict__["configure_model"] = configure_and_attach

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the ranks to sum over and the optimizer to follow, after strategy and checkpoint are set up.

        Raises:
            AttachError: If there is no optimizer, or it does not report its steps.
        """
        self.balanced.process_group = _data_parallel_group(trainer)
        self.balanced.discard_counts_()
        self._show_biases_(True)
        routers = [parameter for site in self.balanced.values() for parameter in site.router.parameters()]
        self._clock.start_(optimizer_of(routers, trainer.optimizers))
        self._idle_alarm.start_()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count steps from here on."""
        self._clock.batch_starts()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Reject the step if the loss is NaN or infinite, without waiting for it."""
        self.balanced.reject_if_(~loss.detach().isfinite().all())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Expect a step if this is the routers' optimizer, unless the gradient scaler prevents it."""
        self._clock.step_is_due(optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Ignore steps outside of a batch; warn if none comes."""
        self._clock.batch_ends()
        self._idle_alarm.batch_ends(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop following the optimizer; the biases stay in the model."""
        self._idle_alarm.training_ends(pl_module)
        self._clock.stop_()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop following the optimizer."""
        self._clock.stop_()

    def _attach_(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._balanced = balance_as_set_(pl_module, self._settings)
        # Sharding strategies load by the model's keys before a module can take part: older checkpoints lack this one.
        self._show_biases_(not trainer.strategy.restore_checkpoint_after_setup)
        renew_averages_(trainer, pl_module)

    def _show_biases_(self, shown: bool) -> None:
        for site in self.balanced.ours() if self._settings.bias_in_state_dict else ():
            show_in_state_dict_(site.bias_place.owner, shown=shown)

    def _discard(self) -> None:
        self.balanced.discard_counts_()

    def _update(self, found_inf: Any) -> None:
        if found_inf is not None:
            self.balanced.reject_if_(found_inf > 0)
        self.balanced.update()


def builds_itself(pl_module: LightningModule) -> bool:
    """Return whether the module, of the new or the old namespace, overrides ``configure_model``."""
    owner = next(kind for kind in type(pl_module).__mro__ if "configure_model" in vars(kind))
    return owner.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")


def _data_parallel_group(trainer: Trainer) -> dist.ProcessGroup | None:
    """Return the ranks that see different tokens; None for all of them.

    With tensor parallelism the world would count each token once per shard.
    """
    # By name: the old namespace, `pytorch_lightning`, has its own class.
    if any(kind.__name__ == "ModelParallelStrategy" for kind in type(trainer.strategy).__mro__):
        return trainer.strategy.device_mesh["data_parallel"].get_group()  # pyright: ignore[reportAttributeAccessIssue]
    return None
