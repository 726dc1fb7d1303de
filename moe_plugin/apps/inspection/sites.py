"""The routing sites of a model, found without training or running it; the meta device is enough.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType

from torch import Tensor, nn

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balanced_model import BalancedModel, find_balanced
from moe_plugin.attach.discovery.code_names import uses
from moe_plugin.attach.discovery.routing_style import BiasPlace, FoundRouter
from moe_plugin.attach.discovery.surroundings import Surroundings
from moe_plugin.attach.discovery.survey import survey
from moe_plugin.attach.discovery.understand import GROUP_COUNT_NAMES

_SCORES = ("sigmoid", "softmax", "softplus")
_SCORE_NAMES = ("scoring_func", "score_func", "score_function", "router_score_function")


@dataclass(frozen=True)
class BiasStatistics:
    """The values of a selection bias.

    Attributes:
        lowest: Smallest value.
        highest: Largest value.
        deviation: Standard deviation over the experts.
    """

    lowest: float
    highest: float
    deviation: float

    @classmethod
    def of(cls, bias_E: Tensor) -> BiasStatistics:
        """Measure a bias."""
        bias_E = bias_E.detach().float().cpu()
        return cls(bias_E.min().item(), bias_E.max().item(), bias_E.std(correction=0).item())


@dataclass(frozen=True)
class RoutingSite:
    """One router, and how it would be balanced.

    Attributes:
        name: Its module name.
        router: Its class.
        num_experts: E.
        top_k: Experts per token.
        score: The function that makes scores, as its code or settings show.
        groups: Groups that limit a token's choice; 1 for none.
        driven: How the bias reaches the selection.
        bias_key: The `state_dict` key of the bias that the model owns; None if it would get our bias.
        is_proven: Whether this was seen in a run on tensors without data; otherwise it was read from names.
        bias: Its values; None if there are none, as on the meta device.
    """

    name: str
    router: str
    num_experts: int
    top_k: int
    score: str
    groups: int
    driven: str
    bias_key: str | None
    is_proven: bool
    bias: BiasStatistics | None


@dataclass(frozen=True)
class Inspection:
    """What was found in a model.

    Attributes:
        model: Its class.
        sites: The routers that can be balanced, in the order of the modules.
        refused: The routers that cannot be balanced, and why.
        strangers: Experts whose routing was not understood, and why.
    """

    model: str
    sites: tuple[RoutingSite, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    strangers: Mapping[str, str] = field(default_factory=dict)

    def fitting(self, biases: Mapping[str, object]) -> dict[str, Tensor]:
        """Return those of the biases that a router of this model can have: a value for each expert."""
        sizes = {site.name: (site.num_experts,) for site in self.sites}
        return {
            name: bias
            for name, bias in biases.items()
            if isinstance(bias, Tensor) and tuple(bias.shape) == sizes.get(name)
        }

    def with_biases(self, biases: Mapping[str, Tensor]) -> Inspection:
        """Return the same with the statistics of these biases, by router name."""
        sites = (
            replace(site, bias=BiasStatistics.of(biases[site.name])) if site.name in biases else site
            for site in self.sites
        )
        return replace(self, sites=tuple(sites))


def inspect_model(model: nn.Module, adapters: Sequence[Adapter] = ()) -> Inspection:
    """Find the routers of a model and how each would be driven; the model stays unchanged.

    Args:
        model: Any model, on any device, even meta, balanced or not.
        adapters: Descriptions of blocks that select experts in their own way.
    """
    balanced = find_balanced(model)
    if balanced is not None:
        return Inspection(type(model).__name__, _attached(model, balanced), dict(balanced.refused))
    findings = survey(model, adapters)
    return Inspection(
        type(model).__name__,
        tuple(_found(model, found) for found in findings.routers.values()),
        findings.refused,
        findings.strangers,
    )


def _found(model: nn.Module, found: FoundRouter) -> RoutingSite:
    place, style = found.bias, found.style
    bias_E = None if place is None else place.tensor()
    if style.adapter is not None:
        driven = "our bias, by its adapter"
    elif place is not None:
        driven = f"its own {place.name}"
    else:
        driven = f"our bias, at {style.kind}"
    return RoutingSite(
        name=found.name,
        router=type(found.module).__name__,
        num_experts=style.num_experts,
        top_k=style.top_k,
        score=_score_of(found.module),
        groups=_groups_of(model, found.name),
        driven=driven,
        bias_key=None if place is None else _key(model, place),
        is_proven=style.proven,
        bias=None if bias_E is None or bias_E.is_meta else BiasStatistics.of(bias_E),
    )


def _attached(model: nn.Module, balanced: BalancedModel) -> tuple[RoutingSite, ...]:
    return tuple(
        RoutingSite(
            name=name,
            router=type(site.router).__name__,
            num_experts=site.num_experts,
            top_k=site.top_k,
            score=_score_of(site.router),
            groups=_groups_of(model, name),
            driven=f"its own {site.bias_place.name}, balanced now"
            if site.host_owns_bias
            else "our bias, balanced now",
            bias_key=_key(model, site.bias_place) if site.host_owns_bias else None,
            is_proven=site.style.proven or bool(site.plans),
            bias=None if site.bias.is_meta else BiasStatistics.of(site.bias),
        )
        for name, site in balanced.items()
    )


def _score_of(router: nn.Module) -> str:
    """Return the function that makes a router's scores: as declared, or else those that its code names."""
    score = getattr(router, "score", None)
    if score is not None and hasattr(score, "probabilities"):
        return type(score).__name__
    for holder in (router, getattr(router, "config", None)):
        for name in _SCORE_NAMES:
            if isinstance(getattr(holder, name, None), str):
                return getattr(holder, name)
    forwards = [vars(kind).get("forward") for kind in type(router).__mro__]
    codes = [set(forward.__code__.co_names) for forward in forwards if isinstance(forward, FunctionType)]
    own = next((names for names in codes if names & set(_SCORES)), set())
    named = [name for name in _SCORES if name in own] or [
        name for name in _SCORES if uses(type(router), frozenset({name}))
    ]
    return " or ".join(named) or "logits"


def _groups_of(model: nn.Module, name: str) -> int:
    return Surroundings.of(model, name).number(GROUP_COUNT_NAMES) or 1


def _key(model: nn.Module, place: BiasPlace) -> str:
    path = next(path for path, module in model.named_modules() if module is place.owner)
    return f"{path}.{place.name}" if path else place.name
