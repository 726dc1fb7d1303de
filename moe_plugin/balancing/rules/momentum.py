"""Step every bias by a running mean of soft-clamped load errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.balancing.rate import check_rate
from moe_plugin.balancing.rules.load import Load, centred
from moe_plugin.balancing.rules.rule import Memory
from moe_plugin.number_checks import check_fraction, check_positive


@dataclass(frozen=True)
class Momentum:
    """SMEBU, soft-clamped momentum expert bias updates: Arcee Trinity Large, arXiv 2602.17004.

    With the normalised error ``e_i = (mean(c) - c_i) / mean(c)``::

        d_i = rate * tanh(kappa * e_i),  centred over the experts
        m_i = beta * m_i + (1 - beta) * d_i
        b_i += m_i

    It is between the sign rule (kappa large) and the proportional one (kappa small): large errors step by at most the
    rate, small ones in proportion, and the running mean evens out the noise of single batches.

    Attributes:
        rate: Largest step in score units, or 'auto'. Trinity Large uses 0.0005 with sigmoid scores.
        kappa: Steepness of the clamp.
        beta: Share of the last running mean that is kept.
    """

    rate: float | str = "auto"
    kappa: float = 2.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If one is out of its range.
        """
        check_rate(self.rate)
        check_positive("kappa", self.kappa)
        check_fraction("beta", self.beta)

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return the running mean, see `Rule.step`."""
        fresh_E = rate * centred((self.kappa * load.error_E).tanh())
        memory["momentum"] = (
            self.beta * memory.get("momentum", torch.zeros_like(fresh_E)) + (1 - self.beta) * fresh_E
        )
        return memory["momentum"]
