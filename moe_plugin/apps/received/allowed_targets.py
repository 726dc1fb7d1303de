"""What a received configuration may make: decided from the name alone, before anything that it names is imported."""

from __future__ import annotations

import importlib

from moe_plugin.apps.received.own_targets import own_targets

_FRAMEWORKS = {
    "trainer": {"lightning.pytorch": "Trainer"},
    "trainer.profiler": {"lightning.pytorch.profilers": "Profiler"},
    "callbacks": {"lightning.pytorch.callbacks": "Callback"},
    "logger": {"lightning.pytorch.loggers": "Logger"},
    "strategy": {"lightning.pytorch.strategies": "Strategy"},
    "model": {"torch.optim": "Optimizer", "torch.optim.lr_scheduler": "LRScheduler"},
}
"""By place in the configuration: the packages whose classes may be there, and the class that they derive from."""


def is_allowed(target: object, key: str) -> bool:
    """Return whether a received configuration may name this ``_target_``.

    Args:
        target: The full name of a class or function.
        key: The full key of the node that has it.
    """
    if not isinstance(target, str):
        return False
    package, _, name = target.rpartition(".")
    return target in own_targets() or any(
        _is_class_of(package, name, base)
        for place, packages in _FRAMEWORKS.items()
        if f"{key}.".startswith(f"{place}.") and (base := packages.get(package)) is not None
    )


def _is_class_of(package: str, name: str, base: str) -> bool:
    """Return whether one of the packages above exports a class of its own by this name that derives from the base."""
    exported = importlib.import_module(package)
    kind = vars(exported).get(name)
    if not isinstance(kind, type) or not f"{kind.__module__}.".startswith(f"{package}."):
        return False
    return issubclass(kind, getattr(exported, base))
