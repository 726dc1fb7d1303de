"""Records passed between the layers.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Routing(NamedTuple):
    """What a router decided for each token.

    Attributes:
        weights_TK: Gate weights, computed from the unbiased scores; fp32.
        expert_ids_TK: Selected experts; int64.
        scores_TE: Unbiased scores of all experts; fp32.
        logits_TE: What the scores were made from; fp32. None if no router computed them.
        used_TK: Which of the selected experts the token uses; bool. None for all of them.
        slack_TK: If tokens use different numbers of experts, how far the router's level may fall before the token no
            longer uses the expert; fp32, positive if used.
    """

    weights_TK: Tensor
    expert_ids_TK: Tensor
    scores_TE: Tensor
    logits_TE: Tensor | None = None
    used_TK: Tensor | None = None
    slack_TK: Tensor | None = None


@dataclass(frozen=True)
class LoadRecord:
    """The load of one optimizer step, by routing site.

    Attributes:
        step: Number of updates so far, this one included.
        counts: Tokens per routed expert over all ranks and micro-batches of the step; int64 (E,).
        tokens: Tokens of the step; int64 scalar.
        bias: The selection bias after the update; fp32 (E,). The live tensor, not a copy.
    """

    step: int
    counts: Mapping[str, Tensor]
    tokens: Mapping[str, Tensor]
    bias: Mapping[str, Tensor]


class Allocation(NamedTuple):
    """How a router allocates experts to tokens that use different numbers of them.

    Attributes:
        target_k: Experts that a token should use on average.
        num_routed: How many experts compute something; these are the first ones.
        load_shares_E: The share of all selections that each expert should get; None for equal shares.
        level: A fp32 scalar that a step of balancing moves so the target is met; None if the bias alone meets it.
    """

    target_k: float
    num_routed: int
    load_shares_E: Sequence[float] | None = None
    level: Tensor | None = None


@runtime_checkable
class AllocatesExperts(Protocol):
    """A router whose tokens use different numbers of experts, with a target for the average.

    Its `Routing` has ``used_TK``, the selected experts that a token uses, and ``slack_TK``, how far the router's level,
    if it has one, may fall before the token no longer uses them.
    """

    def allocation(self) -> Allocation:
        """Return the numbers that hold now; the level is the live tensor."""
        ...
