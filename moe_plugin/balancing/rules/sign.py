"""Step every bias by a fixed amount, against the sign of its load error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moe_plugin.balancing.rate import check_rate
from moe_plugin.balancing.rules.load import Load, centred
from moe_plugin.balancing.rules.rule import Memory


@dataclass(frozen=True)
class Sign:
    """Algorithm 1 of arXiv 2408.15664: ``b_i += rate * sign(mean(c) - c_i)``, by default centred.

    Centred it is torchtitan's update, otherwise that of the paper, Megatron-LM (``get_updated_expert_bias``) and
    OLMo-core (``bias_gamma``). The sign is taken in integers, ``sign(sum(c) - E c_i)``: a floating-point mean gets it
    wrong at large counts.

    Attributes:
        rate: Step in score units, or 'auto'. The paper uses 0.001 with sigmoid scores.
        centred: Subtract the mean of the signs, which keeps the biases from drifting together.
    """

    auto_fraction: ClassVar[float] = 0.01

    rate: float | str = "auto"
    centred: bool = True

    def __post_init__(self) -> None:
        """Check the rate.

        Raises:
            ConfigError: If it is negative or not a number.
        """
        check_rate(self.rate)

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return the rate times the sign of the load error, see `Rule.step`."""
        return rate * (centred(load.signs_E) if self.centred else load.signs_E.double())
