"""Step every bias by a fixed amount, against the sign of its load error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_plugin.balancing.rate import check_rate


@dataclass(frozen=True)
class Sign:
    """Algorithm 1 of arXiv 2408.15664: ``b_i += rate * sign(mean(c) - c_i)``, by default centred.

    The sign is taken in integers, ``sign(sum(c) - E c_i)``: a floating-point mean gets it wrong at large counts.

    Attributes:
        rate: Step in score units, or 'auto'. The paper uses 0.001 with sigmoid scores.
        centred: Subtract the mean of the signs, so that the biases do not drift together.
    """

    rate: float | str = "auto"
    centred: bool = True

    def __post_init__(self) -> None:
        """Check the rate.

        Raises:
            ConfigError: If it is negative or not a number.
        """
        check_rate(self.rate)

    def direction(self, counts_E: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Signs of the load error, see `Rule.direction`."""
        num_experts = counts_E.shape[-1]
        signs_E = (counts_E.sum(-1, keepdim=True) - num_experts * counts_E).sign().float()
        return signs_E - signs_E.mean(-1, keepdim=True) if self.centred else signs_E
