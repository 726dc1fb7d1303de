"""Sum the counts of all layers over the data-parallel ranks in one collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_(counts: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its sum over the ranks of ``group``, with a single packed all-reduce.

    All ranks must call it with the same shapes, also without tokens. Without an initialised process group, or alone
    in it, it does nothing.

    Args:
        counts: int64 tensors on one device, changed in place.
        group: The data-parallel ranks; None is all of them.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    packed = torch.cat([count.reshape(-1) for count in counts])
    dist.all_reduce(packed, group=group)
    for count, summed in zip(counts, packed.split([count.numel() for count in counts]), strict=True):
        count.copy_(summed.view_as(count))
