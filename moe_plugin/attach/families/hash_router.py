"""Hash layers (arXiv 2106.04426), as in the first layers of DeepSeek-V4: a table gives each token id its experts."""

from __future__ import annotations

from torch import nn

from moe_plugin.attach.adapter import Adapter


def _has_table_of_experts(module: nn.Module) -> bool:
    has_table = isinstance(getattr(module, "tid2eid", None), nn.Buffer)
    return has_table or type(module).__name__.endswith("HashRouter")


ADAPTER = Adapter(
    block=_has_table_of_experts, refused="looks experts up by token id, so no bias can move its load"
)
