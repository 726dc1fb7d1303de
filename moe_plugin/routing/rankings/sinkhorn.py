"""Balanced assignment of each batch by Sinkhorn's algorithm.

Shape legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from moe_plugin.number_checks import check_integer, check_positive


@dataclass(frozen=True)
class Sinkhorn:
    """S-BASE, arXiv 2202.01169, section 3.1, and Megatron-LM's ``sinkhorn`` load balancing.

    In training experts are ranked by the plan that transports one unit from every token and ``T / E`` to every expert
    at the largest score, smoothed by its entropy. In that plan, ``exp(score + a_t + b_e)``, only b matters for the
    order of a token's experts. In evaluation scores alone are ranked, as in Megatron-LM.

    A token's experts depend on all tokens of the batch, later ones too: in training it can see the future.

    Attributes:
        iterations: Rounds of Sinkhorn's algorithm.
        temperature: Weight of the entropy, in units of the scores; small is nearer to the best balanced assignment.
    """

    iterations: int = 20
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: One is not positive.
        """
        check_integer("iterations", self.iterations)
        check_positive("temperature", self.temperature)

    def __call__(self, scores_TE: Tensor, x_TD: Tensor, *, training: bool) -> Tensor:
        """Return the logarithm of the plan times the temperature, up to one number per token; see `Ranking`."""
        if not training or not len(scores_TE):
            return scores_TE
        plan_TE = scores_TE / self.temperature
        share = math.log(plan_TE.shape[0] / plan_TE.shape[1])
        bias_E = plan_TE.new_zeros(plan_TE.shape[1])
        for _ in range(self.iterations):
            of_token_T1 = (plan_TE + bias_E).logsumexp(1, keepdim=True)
            bias_E = share - (plan_TE - of_token_T1).logsumexp(0)
        return scores_TE + self.temperature * bias_E
