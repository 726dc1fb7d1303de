"""Step every bias in proportion to its load error, by steps that become smaller over the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_plugin.balancing.rate import check_rate
from moe_plugin.balancing.rules.load import Load
from moe_plugin.balancing.rules.rule import Memory
from moe_plugin.number_checks import check_fraction


@dataclass(frozen=True)
class PrimalDual:
    """Balancing as a primal-dual method, one dual step per batch: arXiv 2512.03915.

    The bias is the dual variable of "every expert gets its share"; top-k by score plus bias is the primal step, and
    the load error is the gradient of the dual: ``b_i += rate / n**power * e_i`` in step n. With ``power = 1`` the
    expected regret grows with the logarithm of the number of steps, as the objective is strongly convex in expectation;
    with 0 it is the proportional rule. Routers move while they are trained, and vanishing steps stop following them:
    choose it for a router that moves little, or late in a run.

    Attributes:
        rate: First step in score units for an expert without tokens, or 'auto'.
        power: Speed at which the steps become smaller, 0 to 1.
    """

    auto_fraction: ClassVar[float] = 0.3

    rate: float | str = "auto"
    power: float = 0.5

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If one is out of its range.
        """
        check_rate(self.rate)
        check_fraction("power", self.power, with_one=True)

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return the rate of this step times the load error, see `Rule.step`."""
        error_E = load.error_E
        memory["steps"] = memory.get("steps", torch.zeros_like(error_E[..., :1])) + 1
        return rate * error_E / memory["steps"] ** self.power
