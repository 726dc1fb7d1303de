"""Follow what a router's forward ranks, and which of its tensors reach the ranking or the values it returns.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, ValuesView
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_plugin.attach.discovery.probing.ranking import SAME_VALUES, Fates, Ranking
from moe_plugin.attach.discovery.probing.ranking_calls import SELECTING, UNSTEERABLE, Call, read_call
from moe_plugin.attach.discovery.probing.tensor_map import TensorMap

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})


class Trace(TorchFunctionMode):
    """Marks every floating-point result that depends on a followed tensor; ids and masks carry no mark."""

    def __init__(self, followed: Mapping[str, Tensor]) -> None:
        """Follow these tensors."""
        super().__init__()
        self._marks: TensorMap[dict[str, str]] = TensorMap()
        for name, tensor in followed.items():
            self._marks[tensor] = {name: "raw"}
        self._fates = Fates()
        self.used: set[str] = set()
        """Followed tensors, by name, that something used after the last ranking depends on."""
        self.unsteerable: list[tuple[str, Tensor]] = []
        """Calls by which experts may be selected without a bias: their names, and what they select from."""

    @property
    def rankings(self) -> list[Ranking]:
        """The rankings so far, those of masks too."""
        return self._fates.rankings

    def clear_(self) -> None:
        """Forget the rankings, not the marks."""
        self._fates = Fates()
        self.unsteerable.clear()

    def marks_of(self, values: Any) -> set[str]:
        """Return names of the followed tensors on which any of these values depends."""
        return {name for tensor in tensors_in(values) for name in self._marks.get(tensor, {})}

    def note_returned_(self, values: Any) -> None:
        """Note that the module returned these values."""
        self._fates.note_returned_(tensors_in(values))

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the call and note what it did."""
        kwargs = kwargs or {}
        # Read before the call: an in-place one changes the marks of its input.
        call = read_call(func, args, kwargs) if func in SELECTING else None
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        self._fates.note_(name, list(tensors_in((args, kwargs))), list(tensors_in(result)))
        if call is not None:
            self._note_ranking(call, result)
        elif name in UNSTEERABLE and args and isinstance(args[0], Tensor):
            self.unsteerable.append((name, args[0]))
        self._mark(func, args, kwargs, result, call)
        return result

    def _note_ranking(self, call: Call, result: Any) -> None:
        marks = self._marks.get(call.scores, {})
        added = frozenset(name for name, how in marks.items() if how == "added")
        values, ids = (None, result) if isinstance(result, Tensor) else result
        self._fates.add_(call, added, frozenset(marks), values, ids)
        if self._fates.are_scores(call.scores):
            self.used.clear()

    def _mark(self, func: Any, args: tuple, kwargs: dict, result: Any, call: Call | None) -> None:
        name = getattr(func, "__name__", "")
        marks: dict[str, str] = {}
        for tensor in tensors_in((args, kwargs.values())):
            for followed, how in self._marks.get(tensor, {}).items():
                marks[followed] = _combined(marks.get(followed), _after(name, how))
        if not marks:
            return
        if func not in SELECTING and name not in SAME_VALUES:
            self.used |= set(marks)
        changed = [args[0]] if name.endswith("_") and args and isinstance(args[0], Tensor) else []
        for tensor in (*tensors_in(result), *changed):
            if tensor.is_floating_point() and not (call is not None and tensor is call.scores):
                self._marks[tensor] = self._marks.get(tensor, {}) | marks


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings, data classes and model outputs."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, Mapping, ValuesView)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors_in(value)
    elif is_dataclass(values) and not isinstance(values, type):
        yield from tensors_in([getattr(values, each.name) for each in fields(values)])


def _after(name: str, how: str) -> str:
    """Return how the result of ``name`` depends on a tensor, if an argument depends on it in the way ``how``."""
    if how != "raw" or name in SAME_VALUES:
        return how
    return "added" if name in _ADDITIONS else "mixed"


def _combined(one: str | None, other: str) -> str:
    return other if one is None or one == other else "mixed"
