"""How the size of a bias update changes over a run."""

from __future__ import annotations

from dataclasses import dataclass

from moe_plugin.errors import ConfigError


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
        for name in ("warmup_steps", "decay_start", "decay_end", "freeze_after"):
            value = getattr(self, name)
            optional = name != "warmup_steps"
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                allowed = "an integer >= 0" + (" or null" if optional else "")
                raise ConfigError(f"'{name}' must be {allowed}, got {value!r}.")
        if (self.decay_start is None) != (self.decay_end is None):
            raise ConfigError(
                f"'decay_start' and 'decay_end' must be given together, got {self.decay_start} and {self.decay_end}."
            )
        if self.decay_start is not None and self.decay_end is not None and self.decay_end <= self.decay_start:
            raise ConfigError(
                f"'decay_end' must be > decay_start ({self.decay_start}), got {self.decay_end}."
            )

    def __call__(self, step: int) -> float:
        """Return the factor, 0 to 1, for update number ``step`` (the first is 1)."""
        if self.freeze_after is not None and step > self.freeze_after:
            return 0.0
        factor = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay_start is not None and self.decay_end is not None:
            left = (self.decay_end - step) / (self.decay_end - self.decay_start)
            factor *= min(1.0, max(0.0, left))
        return factor
