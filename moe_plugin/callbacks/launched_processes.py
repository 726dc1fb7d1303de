"""Bring biases back from processes that were forked or spawned from the one that holds the user's module.

From ``ddp_notebook``, ``ddp_fork`` and ``ddp_spawn`` Lightning brings back the ``state_dict`` of the module, and of no
callback.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from moe_plugin.attach.steering.carries_biases import send_biases
from moe_plugin.errors import ConfigError


def refuse_to_lose_biases(trainer: Trainer, *, names_are_known: bool) -> None:
    """Refuse to train in such processes while the module of the user's process has no place for the biases.

    Args:
        trainer: The trainer, in one of the processes.
        names_are_known: Whether the module was balanced in the user's process, or owns all of its biases.

    Raises:
        ConfigError: If the biases would be lost.
    """
    launcher = _launcher(trainer)
    if launcher is None or names_are_known:
        return
    raise ConfigError(
        "strategy",
        "must not fork or spawn its processes while the module is not balanced, because then no bias comes back",
        f"{type(trainer.strategy).__name__}(start_method={launcher._start_method!r})",
        "Call moe_plugin.balance_(module, ...) with the callback's settings before trainer.fit, and the biases come "
        "back with the weights; or run a script with strategy='ddp'.",
    )


def send_biases_back_(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let the ``state_dict`` that Lightning takes at the end of such a process bring the biases along.

    Args:
        trainer: The trainer, in one of the processes.
        pl_module: The balanced module.
    """
    if _launcher(trainer) is not None:
        pl_module.register_state_dict_post_hook(send_biases)


def _launcher(trainer: Trainer) -> Any:
    launcher = trainer.strategy.launcher
    is_one = any(kind.__name__ == "_MultiProcessingLauncher" for kind in type(launcher).__mro__)
    return launcher if is_one else None
