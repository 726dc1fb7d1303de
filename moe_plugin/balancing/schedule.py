"""The size of a bias update over a run."""

from __future__ import annotations

from dataclasses import dataclass

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_integer


@dataclass(frozen=True)
class RateSchedule:
    """A factor on the rule's rate as a function of the update's number; the default is constant.

    Linear warm-up from zero, a linear decay to zero, and a freeze may be combined. DeepSeek-V3 (arXiv
    2412.19437, section 4.2) kept a constant rate and froze the bias for the last 500B of its 14.8T tokens:
    ``RateSchedule(freeze_after=...)``.

    Attributes:
        warmup_steps: Updates over which the factor rises from 0 to 1.
        decay_start: Update at which the factor starts to fall; None for no decay.
        decay_end: Update from which on it is zero.
        freeze_after: Last update that still moves the bias; None for no freeze.
    """

    warmup_steps: int = 0
    decay_start: int | None = None
    decay_end: int | None = None
    freeze_after: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: On a negative or fractional step, half a decay, or one that ends before it starts.
        """
        check_integer("warmup_steps", self.warmup_steps, least=0)
        for name in ("decay_start", "decay_end", "freeze_after"):
            check_integer(name, getattr(self, name), least=0, or_none=True)
        if (self.decay_start is None) != (self.decay_end is None):
            rule = f"must be given together with decay_start ({self.decay_start})"
            raise ConfigError("decay_end", rule, self.decay_end)
        if self.decay_start is not None and self.decay_end is not None and self.decay_end <= self.decay_start:
            raise ConfigError("decay_end", f"must be > decay_start ({self.decay_start})", self.decay_end)

    def __call__(self, step: int) -> float:
        """Return the factor, 0 to 1, for update number ``step`` (the first is 1)."""
        if self.freeze_after is not None and step > self.freeze_after:
            return 0.0
        factor = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay_start is not None and self.decay_end is not None:
            left = (self.decay_end - step) / (self.decay_end - self.decay_start)
            factor *= min(1.0, max(0.0, left))
        return factor
