"""Errors a user can meet; each message names the thing, the rule, the value and the fix."""

from __future__ import annotations

from enum import Enum


class MoEPluginError(ValueError):
    """Base of every error raised by moe_plugin."""


class Value(Enum):
    """Stands for a value in an error that has none to show."""

    NOT_SHOWN = "not shown"


class ConfigError(MoEPluginError):
    """A setting has a value that is not allowed.

    Examples:
        >>> print(ConfigError("top_k", "must be <= num_experts (8)", 9))
        'top_k' must be <= num_experts (8), got 9.

    Attributes:
        name: The setting. A library class names its own parameter; an application adds the key that holds it.
        rule: What must hold, such as "must be <= num_experts (8)".
        value: What was given; `Value.NOT_SHOWN` if the rule says enough.
        fix: What to do, in whole sentences; "" if the rule says so.
    """

    def __init__(self, name: str, rule: str, value: object = Value.NOT_SHOWN, fix: str = "") -> None:
        """Take the parts of the message."""
        super().__init__(name, rule, value, fix)  # what unpickling calls the class with
        self.name = name
        self.rule = rule
        self.value = value
        self.fix = fix

    def __str__(self) -> str:
        """Return the message in one line."""
        got = "" if self.value is Value.NOT_SHOWN else f", got {self.value!r}"
        return f"'{self.name}' {self.rule}{got}.{' ' if self.fix else ''}{self.fix}"

    def renamed(self, name: str) -> ConfigError:
        """Return the same error about a setting of another name, such as the full key of a configuration."""
        return ConfigError(name, self.rule, self.value, self.fix)


class RunError(MoEPluginError):
    """A run or sweep job failed; the cause has already been reported."""


class AttachError(MoEPluginError):
    """A model's routers cannot be balanced as asked."""


class EffectError(MoEPluginError):
    """Balancing is attached but has no effect on what the model does."""


class CheckpointError(MoEPluginError):
    """Saved balancing state does not fit the model."""


class LoadAlarmError(MoEPluginError):
    """Something is wrong with the load over experts, and LoadMonitor is set to raise."""


class LoadAlarmWarning(UserWarning):
    """Something is wrong with the load over experts."""


class BalanceWarning(UserWarning):
    """Balancing does not do what it should: biases are missing, never move, or a loss balances too."""
