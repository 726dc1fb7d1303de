"""Run a host's code once more than training does, and leave nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from moe_plugin.attach.discovery.probing.host_state import HostState
from moe_plugin.errors import EffectError

_MOST_ENTRIES = 2**22
"""Larger tensors that are not buffers of the host are not copied: experts, tables."""

_OWN_STATE = ("cpu", "mps")
"""Kinds of devices of which `fork_rng` cannot save a single one."""


class ChangedParameterError(EffectError):
    """A forward changed a parameter too large to be copied, so it could not be undone."""


class Snapshot:
    """All that calls of a module can change: state as `HostState` has it, values of tensors, random numbers."""

    def __init__(self, root: nn.Module, *more: object) -> None:
        """Take it.

        Args:
            root: The module.
            more: What it is called with.
        """
        self._root = root
        self._state, buffers = HostState(root, *more), {id(buffer) for buffer in root.buffers()}
        found = (*root.buffers(), *root.parameters(), *self._state.tensors)
        tensors = {id(tensor): tensor for tensor in found}.values()
        kept = [each for each in tensors if id(each) in buffers or each.numel() <= _MOST_ENTRIES]
        large = [each for each in tensors if not (id(each) in buffers or each.numel() <= _MOST_ENTRIES)]
        self._values = [(tensor, tensor.detach().clone()) for tensor in kept]
        self._versions = [(tensor, tensor._version) for tensor in large if not tensor.is_inference()]

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Restore it after the block.

        Raises:
            ChangedParameterError: If a large parameter was changed, of which no copy is kept.
        """
        with same_random_numbers(self._root):
            try:
                yield
            finally:
                self._state.restore_()
                for tensor, value in self._values:
                    tensor.data.copy_(value)  # a plain copy_ would invalidate graphs that hold the tensor
        if any(tensor._version != version for tensor, version in self._versions):
            raise ChangedParameterError(
                f"The forward of {type(self._root).__name__} changes a large parameter, so it can't be tried without a "
                "trace. Write an Adapter for it and pass it in 'adapters', or leave it out with 'sites'."
            )


@contextmanager
def same_random_numbers(root: nn.Module) -> Iterator[None]:
    """Restore the random states of torch on the CPU and on the module's devices, of Python and of NumPy."""
    devices = {tensor.device for tensor in (*root.parameters(), *root.buffers())}
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([]))
            for device in devices:
                if device.type not in _OWN_STATE:
                    stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
