"""Auxiliary-loss-free balancing as one line in ``callbacks=[...]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.attach.settings import (
    DEFAULT_RULE,
    AuxLoss,
    BalanceSettings,
    Experts,
    FrozenRouters,
    Rules,
    Sites,
)
from moe_plugin.attach.steering.carries_biases import KEY, saved_biases
from moe_plugin.attach.warm_start import check_solvable
from moe_plugin.balancing.rules import AnyRule
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.callbacks.attachment import Attachment
from moe_plugin.callbacks.averaged_weights import averaged_biases, refuse_averages, with_biases_of
from moe_plugin.callbacks.calibration import Calibration
from moe_plugin.callbacks.launched_processes import refuse_to_lose_biases, send_biases_back_
from moe_plugin.errors import BalanceWarning, ConfigError


class LossFreeBalancing(Attachment):
    """Balances the experts of any LightningModule without an auxiliary loss (arXiv 2408.15664).

    Finds the routers of the module, adds a bias per expert to their selection only, and moves it after each
    optimizer step that took place: down for overloaded experts, up for idle ones. Gate weights stay unbiased. The
    biases are saved in Lightning's checkpoints, and in the model's own if it owns the tensor.

    Examples:
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
        bias_in_state_dict: bool = False,
        aux_loss: AuxLoss = "warn",
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
            bias_in_state_dict: Whether biases that the model does not own are in its ``state_dict`` too; Lightning's
                checkpoints, also those of weights only, hold them in any case.
            aux_loss: What to do with a load-balancing loss that the model adds by itself: 'warn' that two things
                balance it, switch it 'off' until ``balanced.remove()``, or 'keep' it.
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
                bias_in_state_dict=bias_in_state_dict,
                aux_loss=aux_loss,
            )
        )
        self._calibration = calibration

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach before the strategy wraps the model.

        Raises:
            AttachError: If no router is found, or experts are to be fused and some cannot.
            ConfigError: If the strategy would bring no bias back to this module.
        """
        was_balanced = find_balanced(pl_module) is not None
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            owns_all = self._balanced is not None and not self._balanced.ours()
            refuse_to_lose_biases(trainer, names_are_known=was_balanced or owns_all)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the biases come back from a process that ends now.

        Args:
            trainer: The trainer.
            pl_module: The balanced module.
            stage: What ends.
        """
        if stage == "fit":
            send_biases_back_(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizer, and find out when training ends.

        Raises:
            ConfigError: If the biases are to be calibrated for weights that averaged ones replace, or cannot be.
        """
        super().on_train_start(trainer, pl_module)
        if self._calibration is not None:
            refuse_averages(trainer)
            check_solvable(self.balanced, "calibration", "Leave it out (null).")
            self._calibration.start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ignore steps outside of a batch; calibrate after the last one."""
        super().on_train_batch_end(trainer, pl_module)
        if self._calibration is not None:
            self._calibration.take(trainer, pl_module, self.balanced, batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if a model is evaluated whose biases were neither trained nor loaded."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._warn_if_new(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn as for a validation."""
        self._warn_if_new(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn as for a validation."""
        self._warn_if_new(trainer)

    def _warn_if_new(self, trainer: Trainer) -> None:
        biases = [site.bias for site in self.balanced.ours()]
        if trainer.ckpt_path is None and biases and not any(bias.any() for bias in biases):
            rank_zero_warn(
                "All biases are 0: they were neither trained nor loaded here. If the model was trained with balancing, "
                "its experts are now selected in another way: pass ckpt_path=..., or load them by "
                "balance_(module, ...).load(path), which reads Lightning checkpoints too.",
                category=BalanceWarning,
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let averaged biases go with averaged weights, and add the batches that calibration will need."""
        averaged = averaged_biases(trainer)
        if averaged is not None:
            checkpoint[KEY] = with_biases_of(self.state_dict(), averaged)
        if self._calibration is not None:
            self._calibration.save(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give averaged biases to the average; without one, continue from them, as the weights do."""
        averaged, state = averaged_biases(trainer), saved_biases(checkpoint)
        if state is not None and averaged is not None:
            averaged.load_state_dict(state)
        elif state is not None:
            checkpoint["callbacks"][self.state_key] = state
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
