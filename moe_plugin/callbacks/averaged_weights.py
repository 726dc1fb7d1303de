"""Keep biases and averaged weights together: a `WeightAveraging` callback averages our buffers with the weights.

The averaged biases belong to the averaged weights, in validation, after training and in the ``state_dict`` of a
checkpoint. Training continues from the current ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_plugin.attach.balanced_model import BalancedModel, find_balanced
from moe_plugin.errors import ConfigError


def renew_averages_(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let averages copy the module again that did so before it was balanced: they pair buffers by their order.

    Args:
        trainer: Whose callbacks average.
        pl_module: The balanced module.
    """
    for callback in _averaging(trainer):
        if find_balanced(callback._average_model.module) is None:
            callback.setup(trainer, pl_module, "fit")


def averaged_biases(trainer: Trainer) -> BalancedModel | None:
    """Return the sites of the averaged model, if there is one in this training."""
    found = (find_balanced(callback._average_model.module) for callback in _averaging(trainer))
    return next((balanced for balanced in found if balanced is not None), None)


def refuse_averages(trainer: Trainer) -> None:
    """Refuse a calibration of weights that averaged ones replace after training.

    Raises:
        ConfigError: If weights are averaged.
    """
    if next(_averaging(trainer), None) is not None:
        raise ConfigError(
            "calibration",
            "must be null with WeightAveraging, whose weights replace those that it balances",
            fix="Call calibrate() on what balance_() returns after training.",
        )


def with_biases_of(state: Mapping[str, Any], balanced: BalancedModel) -> dict[str, Any]:
    """Return a state of a `BalancedModel` with the biases of another one.

    Args:
        state: The state.
        balanced: The other one, with the same sites.
    """
    sites = {name: saved | {"bias": balanced[name].bias.clone()} for name, saved in state["sites"].items()}
    return {**state, "sites": sites}


def _averaging(trainer: Trainer) -> Iterator[Any]:
    # By name: the old namespace, `pytorch_lightning`, has its own class, and old versions have none.
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        is_one = any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__)
        if is_one and getattr(callback, "_average_model", None) is not None:
            yield callback
