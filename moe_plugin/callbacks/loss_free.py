"""Auxiliary-loss-free balancing as one line in ``callbacks=[...]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balance import DEFAULT_RULE, Rules, Sites, balance_
from moe_plugin.attach.frozen_routers import FrozenRouters, check_frozen_routers
from moe_plugin.attach.fused.fusible import Experts, check_experts
from moe_plugin.attach.warm_start import check_solvable
from moe_plugin.balancing.rules import AnyRule
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.callbacks.attachment import Attachment
from moe_plugin.callbacks.calibration import Calibration
from moe_plugin.errors import ConfigError


class LossFreeBalancing(Callback):
    """Balances the experts of any LightningModule without an auxiliary loss (arXiv 2408.15664).

    Finds the routers of the module, adds a bias per expert to their selection only, and moves it after each
    optimizer step that took place: down for overloaded experts, up for idle ones. Gate weights stay unbiased. The
    biases are saved in Lightning's checkpoints, and in the model's own where it owns the tensor.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[LossFreeBalancing()])  # doctest: +SKIP
    """

    def __init__(
        self,
        # Our rules by name for LightningCLI, which cannot tell a dataclass from a protocol's methods.
        rule: Rules | AnyRule = DEFAULT_RULE,
        schedule: RateSchedule | None = None,
        sites: Sites = None,
        mask: str | None = "attention_mask",
        adapters: Sequence[Adapter] = (),
        frozen_routers: FrozenRouters = "auto",
        calibration: Calibration | None = None,
        experts: Experts = None,
    ) -> None:
        """Choose how to balance; the defaults suit most models.

        Args:
            rule: How biases follow the load, such as ``Sign(rate=0.001)``; a mapping from glob to rule for different
                rules by layer.
            schedule: Factor on the rate by optimizer step; None keeps it constant.
            sites: Which routers to balance: glob, globs or predicate on the module name; None takes all.
            mask: Forward argument that marks real tokens; padding does not count. None counts every token.
            adapters: How blocks route that select experts in a way of their own.
            frozen_routers: What becomes of the bias where the router is frozen, as with LoRA: 'balance' it, 'keep' it,
                or 'auto': keep it where the model owns one that is not zero, balance it elsewhere.
            calibration: Solves for the biases once more in the last step of training; None leaves that out.
            experts: 'fused' computes the model's stacked SwiGLU experts by our own; None leaves them as they are.

        Raises:
            ConfigError: If there is no rule, 'frozen_routers' is none of the three, 'experts' neither of the two, or
                'fused' with kernels that cannot run.
        """
        if rule is None:
            raise ConfigError(
                "'rule' must be an update rule, got None. To only watch the load use LoadMonitor()."
            )
        settings = {
            "rule": rule,
            "schedule": schedule or RateSchedule(),
            "sites": sites,
            "mask": mask,
            "adapters": tuple(adapters),
            "frozen_routers": check_frozen_routers(frozen_routers),
            "experts": check_experts(experts),
        }
        self._attachment = Attachment(lambda pl_module: balance_(pl_module, **settings))
        self._calibration = calibration

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach before the strategy wraps or shards the model.

        Raises:
            AttachError: If no router is found, or experts are to be fused and some cannot.
        """
        self._attachment.setup(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the optimizer, now that the strategy and the checkpoint are in place."""
        self._attachment.start(trainer)
        if self._calibration is not None:
            check_solvable(self._attachment.balanced)
            self._calibration.start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Steps count from here on."""
        self._attachment.batch_starts()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look whether the loss is finite, without waiting for it."""
        self._attachment.backward_starts(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """A step follows, unless the gradient scaler prevents it."""
        self._attachment.step_is_due(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps outside of a batch do not count."""
        self._attachment.batch_ends()
        if self._calibration is not None:
            self._calibration.take(trainer, pl_module, self._attachment.balanced, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizer; the biases stay in the model."""
        self._attachment.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer."""
        self._attachment.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return biases, rule states and the update counter, for Lightning's checkpoint."""
        return self._attachment.balanced.state_dict() if self._attachment.is_attached else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: If it is of other sites or other numbers of experts.
        """
        if state_dict:
            self._attachment.balanced.load_state_dict(state_dict)
