"""Lets a resumed run continue with other settings of the optimizer than those in its checkpoint."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from moe_plugin.errors import ConfigError


class OverrideOptimizer(Callback):
    """Puts the module's present settings in the place of those restored; running means and steps stay."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the settings from an optimizer and a schedule that the module makes anew.

        Raises:
            ConfigError: If the schedule is not a function of the step, which alone tells today's learning rate.
        """
        made: Any = pl_module.configure_optimizers()
        fresh = made["lr_scheduler"]["scheduler"]
        (restored,) = (config.scheduler for config in trainer.lr_scheduler_configs)
        if not isinstance(restored, LambdaLR):
            rule = "must be false for a schedule other than LambdaLR"
            raise ConfigError("override_optimizer", rule, fix="Set the checkpoint's learning rate.")
        restored.base_lrs = fresh.base_lrs
        factors = [factor(restored.last_epoch) for factor in restored.lr_lambdas]
        rates = [rate * factor for rate, factor in zip(fresh.base_lrs, factors, strict=True)]
        for group, new, rate in zip(
            restored.optimizer.param_groups, made["optimizer"].param_groups, rates, strict=True
        ):
            group.update({key: value for key, value in new.items() if key != "params"} | {"lr": rate})
        restored._last_lr = rates
