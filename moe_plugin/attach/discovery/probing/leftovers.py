"""Notice fake tensors that outlive a probe: a host keeps them where no restore finds them."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from types import FrameType
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moe_plugin.errors import AttachError

_CONTAINERS = (dict, list, tuple, set)
_MOST_STEPS = 4


class RecordingFakeMode(FakeTensorMode):
    """A mode of fake tensors that knows which ones it made."""

    def __init__(self) -> None:
        """Let real parameters take part in calls with fake inputs."""
        super().__init__(allow_non_fake_inputs=True)
        self._made: list[ref[Tensor]] = []

    @property
    def alive(self) -> list[ref[Tensor]]:
        """Those that something still holds."""
        return [each for each in self._made if each() is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and note its results.

        By itself the mode would let ``counter += 1`` change a real tensor, since it sees no fake one.
        """
        if func._schema.is_mutable:
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._made += [ref(each) for each in tree_leaves(result) if isinstance(each, Tensor)]
        return result

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)


def refuse_leftovers(module: nn.Module, made: Sequence[ref[Tensor]]) -> None:
    """Refuse a module that keeps tensors of a probe.

    Args:
        module: The module that was probed.
        made: The tensors that were alive after the probe.

    Raises:
        AttachError: If one is still alive, after those that only hold each other are freed.
    """
    for generation in range(3):  # young objects first: to collect all takes a third of a second
        if not any(each() is not None for each in made):
            return
        gc.collect(generation)
    kept = [each() for each in made if each() is not None]
    if kept:
        raise AttachError(
            f"The forward of {type(module).__name__} keeps tensors outside of the model{_holder(kept)}, where they "
            "cannot be undone after a trial run on tensors without data. Write an Adapter for that module, pass it "
            "in 'adapters', and start Python again, because those tensors are still there."
        )


def _holder(kept: list[Any]) -> str:
    """Name what holds these tensors, looking through plain containers; not if that is not found."""
    things = kept
    for _ in range(_MOST_STEPS):
        ours = (kept, things)
        holders = [
            each
            for each in gc.get_referrers(*things)
            if not isinstance(each, FrameType) and not any(each is own for own in (ours, *ours))
        ]
        named = [each for each in holders if not isinstance(each, _CONTAINERS)]
        if named:
            return f", in {getattr(named[0], '__name__', type(named[0]).__name__)!r}"
        things = holders
    return ""
