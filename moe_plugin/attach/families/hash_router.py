"""Hash layers (arXiv 2106.04426), as in the first layers of DeepSeek-V4: a table gives each token id its experts."""

from __future__ import annotations

from torch import nn

from moe_plugin.attach.adapter import Adapter


def has_table_of_experts(module: nn.Module) -> bool:
    """Return whether the module looks experts up by token id."""
    return isinstance(getattr(module, "tid2eid", None), nn.Buffer) or type(module).__name__.endswith(
        "HashRouter"
    )


ADAPTER = Adapter(
    block=has_table_of_experts, refused="looks experts up by token id, so that no bias can move its load"
)
