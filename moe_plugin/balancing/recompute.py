"""Tell a real training forward from a recomputation, an evaluation or a ``no_grad`` pass.

Activation checkpointing runs a block's forward twice. Only the first run may count, and the two kinds of
checkpointing hide it differently:

* both kinds recompute while autograd runs backward, which ``ModuleTracker.is_bw`` reports;
* the reentrant kind runs the *first* forward with gradients off, which ``is_grad_enabled`` cannot distinguish from a
  user's ``no_grad``. The checkpoint's own frame can: it is on the call stack, and its context knows whether any input
  needs a gradient.
"""

from __future__ import annotations

import sys

from torch.utils.checkpoint import CheckpointFunction
from torch.utils.module_tracker import ModuleTracker

_TRACKER = ModuleTracker()
_REENTRANT_FORWARD = CheckpointFunction.forward.__code__


def is_recomputation() -> bool:
    """Return whether autograd runs backward, so a forward repeats an earlier one."""
    return _TRACKER.is_bw


def is_training_forward(grad_enabled: bool) -> bool:
    """Return True in a forward pass that a backward will follow, once per pass whatever the checkpointing.

    Args:
        grad_enabled: The grad mode of the forward as written, which compiled code no longer shows.
    """
    return not is_recomputation() and (grad_enabled or _in_reentrant_checkpoint())


def _in_reentrant_checkpoint() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _REENTRANT_FORWARD:
            return any(frame.f_locals["ctx"].needs_input_grad)
        frame = frame.f_back
    return False
