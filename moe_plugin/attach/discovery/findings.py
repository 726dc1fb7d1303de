"""All that was found in a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from moe_plugin.attach.discovery.code_names import TOP_K, uses
from moe_plugin.attach.discovery.routing_style import FoundRouter
from moe_plugin.errors import AttachError

_FIX = "Write an Adapter for that block and pass it in 'adapters', or leave it out with 'sites'."


@dataclass
class Findings:
    """What a survey found, by module name.

    Attributes:
        routers: Routers that can be balanced.
        refused: Routers that cannot, and why.
        strangers: Modules with experts whose routing was not understood, and why.
    """

    routers: dict[str, FoundRouter] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    strangers: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all of them."""
        return [*self.routers, *self.refused, *self.strangers]

    def only(self, wanted: Callable[[str], bool]) -> Findings:
        """Return those whose name is wanted."""
        return Findings(
            {name: found for name, found in self.routers.items() if wanted(name)},
            {name: reason for name, reason in self.refused.items() if wanted(name)},
            {name: reason for name, reason in self.strangers.items() if wanted(name)},
        )


def routers_to_balance(findings: Findings, model: nn.Module) -> list[FoundRouter]:
    """Return the routers found.

    Args:
        findings: All or some of what was found.
        model: The model.

    Raises:
        AttachError: If there is no router, or the routing of some experts was not understood.
    """
    kind = type(model).__name__
    if findings.strangers:
        raise AttachError(f"{kind} cannot be balanced as it is: {_listed(findings.strangers)}. {_FIX}")
    if not findings.routers and findings.refused:
        raise AttachError(f"{kind} cannot be balanced: {_listed(findings.refused)}.")
    if not findings.routers:
        seen = [
            f"{name or '(the model itself)'}: {type(module).__name__}"
            for name, module in model.named_modules()
            if uses(type(module), TOP_K)
        ]
        raise AttachError(
            f"No router was found in {kind}: a module that ranks experts, with experts near it. {_FIX} "
            f"Modules that call topk: {', '.join(seen) or 'none'}."
        )
    return list(findings.routers.values())


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
