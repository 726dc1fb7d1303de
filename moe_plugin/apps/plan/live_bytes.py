"""Which bytes are alive while a model runs, and what its units do meanwhile."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_plugin.apps.plan.timeline import Kind, Mark, Timeline


class _Storage(NamedTuple):
    size: int
    is_logits: bool


class _Event(NamedTuple):
    kind: Kind | None  # None: a storage is made (sign 1) or freed (sign -1).
    number: int  # Of the storage, or of the unit.
    sign: int = 0


class LiveBytes(TorchDispatchMode):
    """A watch on storages, from the operation that makes them until they are freed."""

    def __init__(self, model: nn.Module, units: Sequence[nn.Module], vocab_size: int) -> None:
        """Register hooks in the model.

        Args:
            model: Its parameters and buffers are not counted, and gradients are freed once they are complete.
            units: Parts of it to be marked; a parameter belongs to the last of them that holds it.
            vocab_size: Width of logits.
        """
        super().__init__()
        self._vocab_size = vocab_size
        self._storages: list[_Storage] = []
        self._events: list[_Event] = []
        self._marked: set[tuple[Kind, int]] = set()
        self._unit_of_gradient: dict[int, int] = {}
        self._known = {t.untyped_storage()._cdata: -1 for t in [*model.parameters(), *model.buffers()]}
        self._watch_parameters({p: n for n, unit in enumerate(units) for p in unit.parameters()})
        for number, unit in enumerate(units):
            self._watch_unit(number, unit)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, tuple | list) else (result,):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._known:
                self._add(leaf)
        return result

    def timeline(self) -> Timeline:
        """Return all that was seen."""
        activations, logits, marks = [], [], []
        for moment, event in enumerate(self._events):
            stored = self._storages[event.number] if event.kind is None else _Storage(0, False)
            size, unit = event.sign * stored.size, self._unit_of_gradient.get(event.number)
            if event.kind is not None:
                marks.append(Mark(moment, event.kind, event.number))
            elif unit is not None:
                marks += [Mark(moment, "gradient", unit, size)] if size > 0 else []
                size = 0
            activations.append(size)
            logits.append(size if stored.is_logits else 0)
        return Timeline(_running_sum(activations), _running_sum(logits), marks)

    def _add(self, tensor: Tensor) -> None:
        storage, number = tensor.untyped_storage(), len(self._storages)
        self._storages.append(_Storage(storage.nbytes(), tensor.shape[-1:] == (self._vocab_size,)))
        self._events.append(_Event(None, number, 1))
        self._known[storage._cdata] = number
        weakref.finalize(storage, self._remove, storage._cdata, number).atexit = False

    def _remove(self, key: int, number: int) -> None:
        del self._known[key]
        self._events.append(_Event(None, number, -1))

    def _mark(self, kind: Kind, unit: int) -> None:
        """Note the first time only: with checkpointing a unit runs again in its backward."""
        if (kind, unit) not in self._marked:
            self._marked.add((kind, unit))
            self._events.append(_Event(kind, unit))

    def _watch_unit(self, number: int, unit: nn.Module) -> None:
        def end_forward(_module: object, _arguments: object, output: Any) -> None:
            self._mark("forward_end", number)
            for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda _: self._mark("backward", number))

        unit.register_forward_pre_hook(lambda *_: self._mark("forward", number))
        unit.register_forward_hook(end_forward)

    def _watch_parameters(self, unit_of: Mapping[nn.Parameter, int]) -> None:
        waiting: dict[int, set[Tensor]] = defaultdict(set)

        def let_go(parameter: Tensor) -> None:
            assert parameter.grad is not None
            unit = unit_of[parameter]  # pyright: ignore[reportArgumentType]
            self._unit_of_gradient[self._known[parameter.grad.untyped_storage()._cdata]] = unit
            parameter.grad = None
            waiting[unit].discard(parameter)
            if not waiting[unit]:
                self._mark("backward_end", unit)

        for parameter, unit in unit_of.items():
            if parameter.requires_grad:
                waiting[unit].add(parameter)
                parameter.register_post_accumulate_grad_hook(let_go)


def _running_sum(changes: Iterable[int]) -> Tensor:
    return torch.tensor(list(accumulate(changes)), dtype=torch.int64)
