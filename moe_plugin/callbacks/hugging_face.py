"""Balancing, or watching the load, as one line in ``transformers.Trainer(callbacks=[...])``.

Not imported by ``moe_plugin`` itself: this file needs transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.settings import (
    DEFAULT_RULE,
    AuxLoss,
    BalanceSettings,
    Experts,
    FrozenRouters,
    Rules,
    Sites,
)
from moe_plugin.attach.steering.carries_biases import warn_of_missing_biases
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.callbacks.hugging_face_attachment import TrainerAttachment
from moe_plugin.callbacks.monitor.load_tags import Detail
from moe_plugin.errors import CheckpointError, ConfigError

SIDECAR = "moe_plugin.safetensors"
"""The file next to each checkpoint of the Trainer, with biases, rule states and the update counter."""


class LoadMonitorTrainerCallback(TrainerAttachment):
    """Adds the load over the experts to what a Hugging Face ``Trainer`` logs, and changes nothing.

    Examples:
        >>> trainer = Trainer(model, callbacks=[LoadMonitorTrainerCallback()])  # doctest: +SKIP

    Attributes:
        balanced: The sites of the model, once training has begun.
    """

    def __init__(
        self,
        *,
        sites: Sites = None,
        mask: str | None = "attention_mask",
        adapters: Sequence[Adapter] = (),
        detail: Detail = "brief",
    ) -> None:
        """Choose what to watch.

        Args:
            sites: Which routers: glob, globs or predicate on the module name; None takes all.
            mask: Forward argument that marks real tokens; padding does not count. None counts every token.
            adapters: Adapters for blocks whose routing is not found automatically.
            detail: 'brief' logs scalars over all layers, 'full' also those of each layer.

        Raises:
            ConfigError: If a setting has a value that is not allowed.
        """
        super().__init__(BalanceSettings(None, sites=sites, mask=mask, adapters=adapters), detail)


class LossFreeTrainerCallback(TrainerAttachment):
    """Balances the experts of the model of a Hugging Face ``Trainer`` without an auxiliary loss (arXiv 2408.15664).

    Moves the biases once per optimizer step that took place, and writes them next to each checkpoint. Counts are summed
    over all ranks. The load is in what the Trainer logs, as ``load/*``: in every tool of ``report_to`` and in
    ``trainer.state.log_history``. Works in the trainers of TRL too.

    Examples:
        >>> trainer = Trainer(model, callbacks=[LossFreeTrainerCallback()])  # doctest: +SKIP

    Attributes:
        balanced: The sites of the model, once training has begun.
    """

    def __init__(
        self,
        rule: Rules = DEFAULT_RULE,
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
        detail: Detail = "brief",
        resume_from: str | Path | None = None,
    ) -> None:
        """Choose how to balance; arguments as `moe_plugin.LossFreeBalancing` has them.

        ``aux_loss='off'`` also switches off the loss that a trainer of TRL adds by itself, as it does by default.
        ``detail='full'`` logs scalars of each layer too. ``resume_from`` is the checkpoint folder given to
        ``train(resume_from_checkpoint=...)``, which the Trainer does not pass to its callbacks; it is needed only for a
        checkpoint outside the Trainer's own output folder.

        Raises:
            ConfigError: If there is no rule, or a setting has a value that is not allowed.
        """
        if rule is None:
            fix = "To only watch the load use LoadMonitorTrainerCallback()."
            raise ConfigError("rule", "must be an update rule", None, fix)
        settings = BalanceSettings(
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
        super().__init__(settings, detail)
        self._resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, and continue from the file next to the checkpoint if training is resumed.

        Raises:
            AttachError: If no router is found, or experts are to be fused and some cannot.
            CheckpointError: If the folder that training resumes from is not known.
        """
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step:
            sidecar = self._checkpoint(args, state) / SIDECAR
            if sidecar.exists():
                self.balanced.load(sidecar)
            else:
                warn_of_missing_biases(self.balanced, f"The checkpoint {str(sidecar.parent)!r}")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the biases next to the checkpoint."""
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            self.balanced.save(folder / SIDECAR)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the biases of the best checkpoint if its weights were loaded."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            sidecar = Path(state.best_model_checkpoint, SIDECAR)
            if sidecar.exists():
                self.balanced.load(sidecar)

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        given = self._resume_from or args.resume_from_checkpoint
        folder = Path(given or Path(str(args.output_dir), f"checkpoint-{state.global_step}"))
        if not folder.is_dir():
            raise CheckpointError(
                f"Training resumes at step {state.global_step} from an unknown folder, which holds the biases. "
                "Name it: LossFreeTrainerCallback(resume_from=...)."
            )
        return folder
