"""The load-balancing losses that a model adds by itself, and a switch for each."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_plugin.losses.auxiliary_loss import AuxiliaryLoss
from moe_plugin.losses.global_batch import GlobalBatchLoss
from moe_plugin.losses.load_balancing import LoadBalancingLoss
from moe_plugin.losses.total import TotalLoss

COEFFICIENTS = frozenset(
    ["router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha", "moe_aux_loss_coeff", "moe_loss_weight"]
)
"""What transformers, TRL, Megatron and their like call the weight of the loss. A z-loss does not balance."""
_GATE = "output_router_logits"


@dataclass(frozen=True)
class OwnLoss:
    """A load-balancing loss of a model or of its trainer, as a number that can be set to 0.

    Attributes:
        place: What users know it by, such as ``model.router_aux_loss_coef``.
        holder: The object with the attribute.
        attribute: Its name.
        coefficient: The weight it had when it was found.
        is_on: Whether the model adds the loss as it is now; callers of a transformers model may still ask for it.
    """

    place: str
    holder: Any
    attribute: str
    coefficient: float
    is_on: bool = True

    def switch_off_(self) -> None:
        """Set the weight to 0, also of a frozen dataclass."""
        vars(self.holder)[self.attribute] = 0.0

    def restore_(self) -> None:
        """Set the weight to what it was."""
        vars(self.holder)[self.attribute] = self.coefficient


def find_own_losses(model: nn.Module) -> list[OwnLoss]:
    """Return the load-balancing losses of a model: transformers', DeepSeek's gates', and ours.

    A weight counts if a module has it, or reads it from its configuration in ``forward``. Other weights in a
    configuration may have no effect, so they are left alone.
    """
    found: dict[tuple[int, str], OwnLoss] = {}
    for name, module in model.named_modules():
        for loss in (*_of_module(name, module), *_of_ours(name, module)):
            found.setdefault((id(loss.holder), loss.attribute), loss)
    return list(found.values())


def losses_of_trainer(trainer: object) -> list[OwnLoss]:
    """Return the load-balancing loss that a trainer adds by itself, as those of TRL do."""
    is_on = bool(getattr(trainer, "aux_loss_enabled", False))
    return [
        OwnLoss(f"{type(trainer).__name__}.{attribute}", trainer, attribute, weight, is_on)
        for attribute, weight in _weights(trainer, COEFFICIENTS)
    ]


def _of_module(name: str, module: nn.Module) -> Iterator[OwnLoss]:
    configs = list(_configs(module))
    gates = [vars(config)[_GATE] for config in configs if _GATE in vars(config)]
    is_on = any(gates) or not gates
    # The gate of DeepSeek's own code for V2 and V3 calls it 'alpha'; other modules mean other things by that.
    named = COEFFICIENTS | ({"alpha"} if hasattr(module, "seq_aux") else set())
    for attribute, weight in _weights(module, named):
        yield OwnLoss(_joined(name, attribute), module, attribute, weight, is_on)
    read = COEFFICIENTS & _names_in_forward(type(module)) - vars(module).keys()
    for config in configs if gates else ():
        for attribute, weight in _weights(config, read):
            yield OwnLoss(_joined(name, f"config...{attribute}"), config, attribute, weight, is_on)


def _of_ours(name: str, module: nn.Module) -> Iterator[OwnLoss]:
    for attribute, value in vars(module).items():
        for loss in _parts(value):
            if isinstance(loss, (LoadBalancingLoss, GlobalBatchLoss)) and loss.coefficient:
                yield OwnLoss(
                    _joined(name, f"{attribute}.coefficient"), loss, "coefficient", loss.coefficient
                )


def _parts(value: Any) -> Iterable[AuxiliaryLoss]:
    return value.losses.values() if isinstance(value, TotalLoss) else (value,)


def _weights(holder: object, names: Iterable[str]) -> list[tuple[str, float]]:
    """Return the attributes of these names that are numbers but 0."""
    found = {name: vars(holder)[name] for name in sorted(names) if name in vars(holder)}
    return [(name, value) for name, value in found.items() if type(value) in (int, float) and value]


def _configs(module: nn.Module) -> Iterator[Any]:
    """Yield the module's configuration and those in it, if they are of the kind that transformers uses."""
    config = vars(module).get("config")
    if hasattr(config, "to_dict"):
        yield config
        yield from (value for value in vars(config).values() if hasattr(value, "to_dict"))


def _names_in_forward(kind: type[nn.Module]) -> set[str]:
    forward = inspect.getattr_static(kind, "forward", None)  # TorchScript's cannot be asked for on the class
    code = getattr(inspect.unwrap(forward), "__code__", None)  # pyright: ignore[reportArgumentType]
    return set() if code is None else set(code.co_names)


def _joined(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute
