"""Ends training at a step boundary on all ranks together when any of them has received a signal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from moe_plugin.apps.launch.agreement_interval import AgreementInterval
from moe_plugin.apps.launch.heartbeat import patience
from moe_plugin.apps.launch.last_checkpoint import LastCheckpoint
from moe_plugin.apps.launch.signals import STOPPED, StopSignals, tell
from moe_plugin.apps.launch.step_boundary import is_at_step_boundary
from moe_plugin.apps.report.stopped import write_stopped


class StopAtSignal(Callback):
    """Lets the ranks agree whether to stop: about once a second, after an optimizer step or a validation batch.

    Not after each, because ranks that agree wait for one another and for their devices.

    Stopping itself is Lightning's: its flag `trainer.received_sigterm` makes `LastCheckpoint` save and the loops
    raise `SIGTERMException`. Lightning's own handler would set that flag on one rank alone, run a collective inside
    the signal handler, and take rank 0's word for all.
    """

    def __init__(self, signals: StopSignals) -> None:
        """Take what notes the signals of this process."""
        self.signals = signals
        self._pace = AgreementInterval()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put our handler and our agreement in the place of Lightning's."""
        trainer._signal_connector._sigterm_notifier_fn = self.signals.note
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defer signals: from here on there is something to save."""
        self.signals.patience = patience
        self.signals.deferred = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Agree after an optimizer step."""
        if is_at_step_boundary(trainer):
            self._agree(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree anew on how often: batches of a validation take longer or shorter than steps."""
        self._pace.start()

    on_validation_end = on_validation_start

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Agree after a batch of a validation, which may last longer than the grace period."""
        if self.signals.deferred:
            self._agree(trainer)

    def _agree(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            if not self._pace.is_due():
                return
            mine = [self.signals.received, -self._pace.proposal()]
            largest = torch.tensor(mine, device=trainer.strategy.root_device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            self.signals.received, stride = largest.tolist()
            self._pace.agreed(-stride)
        if self.signals.received:
            trainer._signal_connector.received_sigterm = True


@contextmanager
def told_when_stopped(signals: StopSignals, trainer: Trainer, folder: Path) -> Iterator[None]:
    """Report in one line where a run that a signal stopped can continue; also in ``stopped.txt``.

    Args:
        signals: Noted the signal.
        trainer: The run's, which stops within the block.
        folder: The run's.

    Raises:
        SystemExit: With code `STOPPED` if the last step is saved, with that of the signal if not.
    """
    try:
        yield
    except SIGTERMException:
        saved = [path for path in _saved_last(trainer) if path.exists()]
        where = f"go on with ckpt_path={saved[0]}" if saved else "nothing was saved"
        if trainer.is_global_zero:
            line = f"stopped by {signals.name} after step {trainer.global_step}; {where}"
            write_stopped(folder, line)
            tell(line)
        raise SystemExit(STOPPED if saved else 128 + signals.received) from None


def _saved_last(trainer: Trainer) -> list[Path]:
    """Return where the latest step is saved."""
    return [
        Path(callback.path)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, LastCheckpoint) and callback.saved_step == trainer.global_step
    ]
