"""Auxiliary-loss-free balancing as one line in ``transformers.Trainer(callbacks=[...])``.

Not imported by ``moe_plugin`` itself: this file needs transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balance import balance_as_set_
from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.attach.settings import DEFAULT_RULE, BalanceSettings, Experts, FrozenRouters, Rules, Sites
from moe_plugin.attach.steering.carries_biases import warn_of_missing_biases
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.errors import CheckpointError

SIDECAR = "moe_plugin.safetensors"
"""The file next to each checkpoint of the Trainer, with biases, rule states and the update counter."""


class LossFreeTrainerCallback(TrainerCallback):
    """Balances the experts of the model of a Hugging Face ``Trainer`` without an auxiliary loss (arXiv 2408.15664).

    Moves the biases once per optimizer step that took place, and writes them next to each checkpoint. Turn the model's
    own auxiliary loss off (``output_router_logits=False``, the default). Counts are summed over all ranks.

    Examples:
        >>> trainer = Trainer(model, callbacks=[LossFreeTrainerCallback()])  # doctest: +SKIP

    Attributes:
        balanced: The sites of the model, once training has begun.
    """

    balanced: BalancedModel

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
        resume_from: str | Path | None = None,
    ) -> None:
        """Choose how to balance; arguments as `moe_plugin.LossFreeBalancing` has them.

        With ``rule=None`` it only watches the load, in ``balanced.record``. ``resume_from`` is the checkpoint folder
        given to ``train(resume_from_checkpoint=...)``, which the Trainer does not pass to its callbacks; it is needed
        only for a checkpoint outside the Trainer's own output folder.

        Raises:
            ConfigError: If a setting has a value that is not allowed.
        """
        self._settings = BalanceSettings(
            rule,
            sites=sites,
            schedule=schedule,
            mask=mask,
            adapters=adapters,
            frozen_routers=frozen_routers,
            experts=experts,
            verify=verify,
            bias_in_state_dict=bias_in_state_dict,
        )
        self._resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, and continue from the file next to the checkpoint if training is resumed.

        Raises:
            AttachError: If no router is found, or experts are to be fused and some cannot.
            CheckpointError: If the folder that training resumes from is not known.
        """
        model: nn.Module = kwargs["model"]
        self.balanced = balance_as_set_(model, self._settings)
        self.balanced.discard_counts_()
        if state.global_step:
            sidecar = self._checkpoint(args, state) / SIDECAR
            if sidecar.exists():
                self.balanced.load(sidecar)
            elif self._settings.rule is not None:
                warn_of_missing_biases(self.balanced, f"The checkpoint {str(sidecar.parent)!r}")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the biases, unless the gradient scaler skipped the step."""
        optimizer: Optimizer = kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):
            self.balanced.discard_counts_()
        else:
            self.balanced.update()

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
