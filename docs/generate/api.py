"""The reference of the Python API: what users import, by what it is for. mkdocstrings fills it in."""

from __future__ import annotations

import moe_plugin

INTRODUCTION = """# Python API

```python
from moe_plugin import LossFreeBalancing, LoadMonitor, balance_
```

Made by `make reference` from the docstrings. A name without its module in front is imported from `moe_plugin` itself.
"""
SECTIONS = {
    "Balancing a model": ["LossFreeBalancing", "balance_", "moe_plugin.attach.balanced_model.BalancedModel"],
    "Watching the load": [
        "LoadMonitor",
        "moe_plugin.metrics.alarms.Limits",
        "moe_plugin.metrics.alarms.Alarm",
    ],
    "Update rules": [
        "Proportional",
        "Sign",
        "Multiplicative",
        "Momentum",
        "PID",
        "Quantile",
        "PrimalDual",
        "Adaptive",
        "moe_plugin.balancing.rules.Rule",
    ],
    "Rates and calibration": ["RateSchedule", "Calibration"],
    "Blocks that route in unusual ways": ["Adapter"],
    "Sharding and checkpoints": ["shard_", "VerifiedCheckpointIO"],
    "Hugging Face Trainer": ["moe_plugin.callbacks.hugging_face.LossFreeTrainerCallback"],
    "Verification": ["moe_plugin.attach.verification.battery.verify_model"],
    "Records": ["moe_plugin.types.LoadRecord", "moe_plugin.types.Routing"],
    "Errors": ["moe_plugin.errors"],
}


def api_page() -> str:
    """Return the page; every name that `moe_plugin` exports must be in it.

    Raises:
        ValueError: If one is missing.
    """
    listed = {name for names in SECTIONS.values() for name in names}
    if missing := set(moe_plugin.__all__) - listed:
        raise ValueError(f"SECTIONS in docs/generate/api.py must list {sorted(missing)}.")
    sections = (f"\n## {title}\n\n" + "\n".join(map(_entry, names)) for title, names in SECTIONS.items())
    return INTRODUCTION + "".join(sections)


def _entry(name: str) -> str:
    found = getattr(moe_plugin, name, None) if "." not in name else None
    if found is None:
        return f"::: {name}\n    options: {{show_root_full_path: true}}\n"
    return f"::: {found.__module__}.{name}\n"
