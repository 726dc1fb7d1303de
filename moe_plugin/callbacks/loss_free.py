"""Auxiliary-loss-free balancing as one line in ``callbacks=[...]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.settings import DEFAULT_RULE, BalanceSettings, Experts, FrozenRouters, Rules, Sites
from moe_plugin.attach.warm_start import check_solvable
from moe_plugin.balancing.rules import AnyRule
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.callbacks.attachment import Attachment
from moe_plugin.callbacks.calibration import Calibration
from moe_plugin.errors import ConfigError


class LossFreeBalancing(Attachment):
    """Balances the experts of any LightningModule without an auxiliary loss (arXiv 2408.15664).

    Finds the routers of the module, adds a bias per expert to their selection only, and moves it after each
    optimizer step that took place: down for overloaded experts, up for idle ones. Gate weights stay unbiased. The
    biases are saved in Lightning's checkpoints, and in the model's own if it owns the tensor.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[LossFreeBalancing()])  # doctest: +SKIP
    """

    def __init__(
        self,
        # Our rules by name for LightningCLI, which cannot tell a dataclass from a protocol's methods.
        rule: Rules | AnyRule = DEFAULT_RULE,
        *,
        sites: Sites = None,
        schedule: RateSchedule | None = None,
        mask: str | None = "attention_mask",
        adapters: Sequence[Adapter] = (),
        frozen_routers: FrozenRouters = "auto",
        experts: Experts = None,
        verify: bool = True,
        calibration: Calibration | None = None,
    ) -> None:
        """Choose how to balance; the defaults suit most models.

        Args:
            rule: How biases follow the load, such as ``Sign(rate=0.001)``; a mapping from glob to rule for different
                rules by layer.
            sites: Which routers to balance: glob, globs or predicate on the module name; None takes all.
            schedule: Factor on the rate by optimizer step; None keeps it constant.
            mask: Forward argument that marks real tokens; padding does not count. None counts every token.
            adapters: Adapters for blocks whose routing is not found automatically.
            frozen_routers: What to do with the bias of a frozen router, as with LoRA: 'balance' it, 'keep' it, or
                'auto': keep it if the model owns one that is not zero, balance it otherwise.
            experts: 'fused' computes the model's stacked SwiGLU experts by our kernels; None keeps its own code.
            verify: Whether the first training forward of each router proves, by running it a few times more, that a
                bias moves its selection and nothing else.
            calibration: Solves for the biases once more in the last step of training; None does not.

        Raises:
            ConfigError: If there is no rule, or a setting has a value that is not allowed.
        """
        if rule is None:
            raise ConfigError(
                "rule", "must be an update rule", None, "To only watch the load use LoadMonitor()."
            )
        super().__init__(
            BalanceSettings(
                rule,
                sites=sites,
                schedule=schedule,
                mask=mask,
                adapters=adapters,
                frozen_routers=frozen_routers,
                experts=experts,
                verify=verify,
            )
        )
        self._calibration = calibration

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizer, and find out when training ends."""
        super().on_train_start(trainer, pl_module)
        if self._calibration is not None:
            check_solvable(self.balanced, "calibration", "Leave it out (null).")
            self._calibration.start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ignore steps outside of a batch; calibrate after the last one."""
        super().on_train_batch_end(trainer, pl_module)
        if self._calibration is not None:
            self._calibration.take(trainer, pl_module, self.balanced, batch)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the batches that calibration will need."""
        if self._calibration is not None:
            self._calibration.save(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue with the batches that calibration will need."""
        if self._calibration is not None:
            self._calibration.load(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Return biases, rule states and the update counter, for Lightning's checkpoint."""
        return {} if self._balanced is None else self._balanced.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: If it has other sites or other numbers of experts.
        """
        if state_dict:
            self.balanced.load_state_dict(state_dict)
