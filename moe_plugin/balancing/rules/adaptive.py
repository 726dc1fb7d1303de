"""Step every bias in proportion to its load error, by a gain that each expert finds by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_plugin.balancing.rate import check_rate
from moe_plugin.balancing.rules.load import Load, centred
from moe_plugin.balancing.rules.rule import Memory
from moe_plugin.number_checks import check_positive

_FORGETS, _LEARNS = 0.1, 0.1
_SMALLEST_GAIN, _FIRST_GAIN = 0.002, 0.05


@dataclass(frozen=True)
class Adaptive:
    """A gain per expert that makes successive load errors uncorrelated, so there is no rate to choose.

    Errors that keep their sign show that the gain is too small, and errors that alternate that it is too large. This is
    incremental delta-bar-delta (Sutton, AAAI 1992), normalised, on the dual variable of "every expert gets its share".
    With the normalised error ``e_i = (mean(c) - c_i) / mean(c)``, limited and centred, for each expert::

        p = 0.9 p + 0.1 e**2                                        the first time e**2
        g = clip(g exp(0.1 clip(e h / sqrt(p q), -1, 1)), 0.002, largest_gain)      g starts at 0.05
        h = (1 - g) h + e
        q = 0.9 q + 0.1 h**2
        b_i += rate * g e,                                          centred over the experts

    ``h``, the derivative of the bias by log g, sums past errors as far as the steps since have not undone them.

    Attributes:
        rate: Step in score units of a gain of 1 for an expert without tokens; 'auto' is the spread of the scores.
        limit: Largest error that counts. An expert with the load of thirty would move beyond all others in one step,
            and all tokens would leave it at once.
        largest_gain: Largest g.
    """

    auto_fraction: ClassVar[float] = 1.0

    rate: float | str = "auto"
    limit: float = 2.0
    largest_gain: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If one is out of its range.
        """
        check_rate(self.rate)
        check_positive("limit", self.limit)
        check_positive("largest_gain", self.largest_gain)

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return the rate times the gains times the load error, see `Rule.step`."""
        error_E = centred(load.error_E.clamp(-self.limit, self.limit))
        return rate * centred(self._gains(error_E, memory) * error_E)

    def _gains(self, error_E: Tensor, memory: Memory) -> Tensor:
        zero_E = torch.zeros_like(error_E)
        power_E, trace_E = memory.get("power", zero_E), memory.get("trace", zero_E)
        trace_power_E, gain_E = memory.get("trace_power", zero_E), memory.get("gain", zero_E)
        power_E = torch.where(power_E > 0, _mixed(power_E, error_E), error_E.square())
        gain_E = torch.where(gain_E > 0, gain_E, _FIRST_GAIN)
        size_E = (power_E * trace_power_E).sqrt()
        alike_E = torch.where(size_E > 0, error_E * trace_E / size_E, 0.0).clamp(-1, 1)
        least = min(_SMALLEST_GAIN, self.largest_gain)
        gain_E = (gain_E * (_LEARNS * alike_E).exp()).clamp(least, self.largest_gain)
        trace_E = (1 - gain_E) * trace_E + error_E
        memory["power"], memory["trace"] = power_E, trace_E
        memory["trace_power"], memory["gain"] = _mixed(trace_power_E, trace_E), gain_E
        return gain_E


def _mixed(mean_E: Tensor, fresh_E: Tensor) -> Tensor:
    """Return the running mean of squares after one more."""
    return (1 - _FORGETS) * mean_E + _FORGETS * fresh_E.square()
