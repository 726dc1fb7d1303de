"""A factor on every expert's score instead of a summand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moe_plugin.balancing.rate import check_rate
from moe_plugin.balancing.rules.load import Load, centred
from moe_plugin.balancing.rules.rule import Memory

LEAST_FACTOR = 0.5
"""One step at most halves a factor, which must stay positive."""


@dataclass(frozen=True)
class Multiplicative:
    """The multiplicative variant of arXiv 2408.15664, section 4.3: select by ``m_i * s_i``, ``m_i`` starting at 1.

    ``m_i += rate * sign(mean(c) - c_i)``, as in Algorithm 1. Selection adds its bias to what the router ranks, so the
    bias is ``log m_i``. It is a factor if the router ranks the logarithm of its scores: routers that take the softmax
    after the top-k (``router=mixtral``) or rank log-sigmoids (``router=log_sigmoid_top_k``). With others it is a sign
    rule whose step shrinks as a bias grows. A common factor changes no selection: their geometric mean is kept at 1.

    Attributes:
        rate: Step of a factor, or 'auto'. The paper uses 0.001.
    """

    auto_fraction: ClassVar[float] = 0.01

    rate: float | str = "auto"

    def __post_init__(self) -> None:
        """Check the rate.

        Raises:
            ConfigError: If it is negative or not a number.
        """
        check_rate(self.rate)

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return the change of the logarithms of the factors, see `Rule.step`."""
        growth_E = 1 + rate * load.signs_E.double() / load.bias_E.double().exp()
        return centred(growth_E.clamp(min=LEAST_FACTOR).log())
