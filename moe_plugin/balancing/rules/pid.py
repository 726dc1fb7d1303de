"""Step every bias by its load error, by the sum of errors, and by their change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.balancing.rate import check_rate
from moe_plugin.balancing.rules.load import Load, centred
from moe_plugin.balancing.rules.rule import Memory
from moe_plugin.number_checks import check_not_negative, check_positive


@dataclass(frozen=True)
class PID:
    """A controller on the load error, as in LongCat-Flash, arXiv 2509.01322.

    With the normalised error ``e_i = (mean(c) - c_i) / mean(c)`` and its sum over the steps ``s_i``, limited to
    ``windup_limit``, as an error that cannot be corrected at once would pile up::

        b_i += rate * (e_i + integral * s_i + derivative * (e_i - last e_i)),  centred over the experts

    The increment of LongCat-Flash, ``mu * (1 / E - c_i / sum(c))`` if no expert is idle by design, is the first term
    alone. The integral removes the lag behind a load that drifts steadily. The derivative is off by default: it raises
    the noise of batches, and damped nothing in the simulations of docs/rules.md.

    Attributes:
        rate: Step in score units for an expert without tokens, or 'auto'.
        integral: Weight of the summed error.
        derivative: Weight of the change of the error.
        windup_limit: Largest summed error that counts.
    """

    rate: float | str = "auto"
    integral: float = 0.05
    derivative: float = 0.0
    windup_limit: float = 10.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If one is out of its range.
        """
        check_rate(self.rate)
        check_not_negative("integral", self.integral)
        check_not_negative("derivative", self.derivative)
        check_positive("windup_limit", self.windup_limit)

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return the rate times the three terms, see `Rule.step`."""
        error_E = load.error_E
        none_E = torch.zeros_like(error_E)
        change_E = error_E - memory.get("last_error", none_E)
        sum_E = (memory.get("error_sum", none_E) + error_E).clamp(-self.windup_limit, self.windup_limit)
        memory |= {"last_error": error_E, "error_sum": sum_E}
        return rate * centred(error_E + self.integral * sum_E + self.derivative * change_E)
