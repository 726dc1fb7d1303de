"""How a router selects: found once, and passed to its site and to the interception."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from torch import Tensor, nn

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.discovery.probing.example import Example
from moe_plugin.attach.discovery.probing.ranking_calls import Use


class Role(Enum):
    """What a call that ranks the experts is for.

    It selects them; repeats a selection, on the same scores or others; or is for something else.
    """

    SELECTS = "selects"
    REPEATS = "repeats"
    OTHER = "other"


class Plan(NamedTuple):
    """What each call in a forward that ranks the experts is for.

    Attributes:
        roles: One per call, in order; empty if each call selects for some of the tokens.
        kind: The kind of call that takes part, ``"any"`` if several do; None for that of the style.
        certain: Whether the forward was seen to its end, and whatever repeats a selection was seen to do so.
    """

    roles: tuple[Role, ...] = ()
    kind: str | None = None
    certain: bool = False

    @property
    def repeats(self) -> bool:
        """Whether a call repeats a selection."""
        return Role.REPEATS in self.roles


@dataclass(frozen=True)
class RoutingStyle:
    """How a router selects experts.

    Attributes:
        num_experts: E.
        top_k: K, the most experts of a token if their number varies.
        kind: The kind of call that selects, see `moe_plugin.attach.discovery.probing.ranking_calls.Call`; or 'adapter'.
        use: How the result of that call is used.
        bias: Key in `Surroundings.tensors` of the model's own selection bias; None if it has none.
        zeros_masked: Whether groups of experts are ranked first, so an exact zero may mean a closed group.
        proven: Whether the above was seen in a run instead of read from names.
        adapter: Routes instead of the router's own method, for kind 'adapter'.
        plans: What each ranking in its forward is for, in evaluation and in training mode.
        tokens_per_entry: T, divided by the size of the first tensor in a call of the router; 0 if unknown.
        example: What it was called with when that was seen.
    """

    num_experts: int
    top_k: int
    kind: str = "topk"
    use: Use = field(default_factory=Use)
    bias: str | None = None
    zeros_masked: bool = False
    proven: bool = False
    adapter: Adapter | None = None
    plans: tuple[Plan, Plan] = (Plan(), Plan())
    tokens_per_entry: float = 0.0
    example: Example | None = None


@dataclass(frozen=True)
class NoStyle:
    """Why a module that selects something like experts cannot be balanced.

    Attributes:
        reason: What it does.
        adaptable: Whether an adapter could help.
    """

    reason: str
    adaptable: bool


class BiasPlace(NamedTuple):
    """Where a selection bias is: a tensor of a module, buffer or parameter."""

    owner: nn.Module
    name: str

    def tensor(self) -> Tensor:
        """Return the tensor that is there now, in the shape it has there."""
        buffer = self.owner._buffers.get(self.name)  # its __getattr__ takes longer
        return getattr(self.owner, self.name) if buffer is None else buffer


@dataclass(frozen=True)
class FoundRouter:
    """A router found in a model.

    Attributes:
        name: Its module name.
        module: The module itself.
        style: How it selects.
        bias: Where the model's own selection bias is; None if it has none.
    """

    name: str
    module: nn.Module
    style: RoutingStyle
    bias: BiasPlace | None = None
