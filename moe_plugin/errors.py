"""Errors a user can meet; each message names the thing, the rule, the value and the fix."""

from __future__ import annotations


class MoEPluginError(ValueError):
    """Base of every error raised by moe_plugin."""


class ConfigError(MoEPluginError):
    """A setting has a value that is not allowed."""


class RunError(MoEPluginError):
    """A run failed, or jobs of a sweep, for a reason that was told where it happened."""


class AttachError(MoEPluginError):
    """A model's routers cannot be balanced as asked."""


class EffectError(MoEPluginError):
    """Balancing is attached but has no effect on what the model does."""


class CheckpointError(MoEPluginError):
    """Saved balancing state does not fit the model."""


class LoadAlarmError(MoEPluginError):
    """Something is wrong with the load over experts, and LoadMonitor was told to raise."""


class LoadAlarmWarning(UserWarning):
    """Something is wrong with the load over experts."""
