"""Makes a LightningModule carry the biases of its routers in its own checkpoints, with and without a callback.

Lightning asks the module, and no callback, what else a checkpoint of weights only is to hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from moe_plugin.attach.steering.class_swap import Mixin, swap_, unswap_
from moe_plugin.errors import BalanceWarning, CheckpointError

KEY = "moe_plugin"
"""The entry of a checkpoint with the biases that belong to the weights in its ``state_dict``."""


class CarriesBiases(Mixin):
    """Mixin that saves and restores the state of a module's `BalancedModel` with the module."""

    _moe_balanced: Any

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the biases to a checkpoint, unless they are only watched and all zero."""
        super().on_save_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        balanced = self._moe_balanced
        if balanced.settings.rule is not None or any(site.bias.any() for site in balanced.ours()):
            checkpoint.setdefault(KEY, balanced.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from the biases of a checkpoint; warn if it has none."""
        super().on_load_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        balanced, state = self._moe_balanced, saved_biases(checkpoint)
        if state is not None and balanced.settings.rule is None:
            _load_watched_(balanced, state)
        elif state is not None:
            balanced.load_state_dict(state)
        elif balanced.settings.rule is not None and not balanced.settings.bias_in_state_dict:
            warn_of_missing_biases(balanced, "The checkpoint")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *given: Any) -> None:
        state = state_dict.pop(prefix + KEY, None)
        if state is not None:
            self._moe_balanced.load_state_dict(state)
        super()._load_from_state_dict(state_dict, prefix, *given)  # pyright: ignore[reportAttributeAccessIssue]


def carry_biases_(model: Any) -> None:
    """Make a balanced model carry its biases if it is a LightningModule, of the new or the old namespace."""
    if hasattr(model, "on_save_checkpoint") and hasattr(model, "on_load_checkpoint"):
        swap_(model, CarriesBiases)


def drop_biases_(model: Any) -> None:
    """Undo `carry_biases_`."""
    if CarriesBiases in type(model).__mro__:
        unswap_(model, CarriesBiases)


def send_biases(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Add the biases to a ``state_dict``, as a hook of it; for a process whose module is thrown away.

    Args:
        module: The balanced module.
        state_dict: What it saves.
        prefix: Of its keys.
    """
    state_dict[prefix + KEY] = module._moe_balanced.state_dict()


def saved_biases(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the `BalancedModel.state_dict` in a Lightning checkpoint: the module's, else a callback's, else None."""
    if KEY in checkpoint:
        return checkpoint[KEY]
    states = (checkpoint.get("callbacks") or {}).values()
    return next((state for state in states if isinstance(state, Mapping) and "sites" in state), None)


def warn_of_missing_biases(balanced: Any, where: str) -> None:
    """Warn that there are no biases to continue from, unless the model owns all of them.

    Args:
        balanced: What `balance_` returned.
        where: What has none, as the beginning of a sentence.
    """
    if balanced.ours():
        warnings.warn(
            f"{where} has no biases, so the {len(balanced.ours())} that the model does not own stay as they are (0 if "
            "new). If that model was trained with balancing, its experts are now selected in another way: load the "
            "biases by balance_(...).load(path), from a sidecar or another checkpoint.",
            BalanceWarning,
            stacklevel=2,
        )


def _load_watched_(balanced: Any, state: Mapping[str, Any]) -> None:
    """Restore the selection of a model that is only watched, perhaps at other sites than it was balanced at."""
    try:
        balanced.load_state_dict(state)
    except CheckpointError as error:
        warnings.warn(f"The biases of the checkpoint are not used. {error}", BalanceWarning, stacklevel=2)
