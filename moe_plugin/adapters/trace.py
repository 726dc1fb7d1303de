"""Follow what a router's forward ranks, and which of its tensors reach the ranking or the values it returns.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, ValuesView
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_plugin.adapters.selecting import SELECTING, Call, read_call

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_SAME_VALUES = frozenset(
    (
        *(
            "view",
            "view_as",
            "reshape",
            "flatten",
            "squeeze",
            "unsqueeze",
            "expand",
            "expand_as",
            "broadcast_to",
        ),
        *("to", "type", "type_as", "float", "double", "half", "bfloat16", "detach", "contiguous", "clone"),
        *("movedim", "transpose", "t", "permute", "repeat", "select", "narrow", "__getitem__", "__get__"),
    )
)


class Ranking(NamedTuple):
    """A ranking call as traced.

    Attributes:
        call: What was ranked.
        k: How many of the ranked items are used.
        added: Names of the followed tensors that were added to the scores, and nothing else, on the way here.
    """

    call: Call
    k: int
    added: frozenset[str]


class Trace(TorchFunctionMode):
    """Marks every floating-point result that depends on a followed tensor; ids and masks carry no mark."""

    def __init__(self, followed: Mapping[str, Tensor]) -> None:
        """Follow these tensors."""
        super().__init__()
        self._marks: dict[int, dict[str, str]] = {
            id(tensor): {name: "raw"} for name, tensor in followed.items()
        }
        self._alive: list[Any] = [followed]  # an id is only good while its tensor lives
        self._calls: list[tuple[Call, frozenset[str]]] = []
        self._cuts: dict[int, tuple[int, int]] = {}
        self._order: dict[int, int] = {}
        self.used: set[str] = set()
        """Names of followed tensors on which something depends that was used after the last ranking."""

    @property
    def rankings(self) -> list[Ranking]:
        """The rankings so far; those of a sort that was never cut to its first k are left out."""
        found = []
        for number, (call, added) in enumerate(self._calls):
            k = call.k or self._order.get(number, 0)
            if k:
                found.append(Ranking(call, k, added))
        return found

    def clear_(self) -> None:
        """Forget the rankings, not the marks."""
        self._calls.clear()
        self._cuts.clear()
        self._order.clear()

    def marks_of(self, values: Any) -> set[str]:
        """Names of the followed tensors on which any of these values depends."""
        return {name for tensor in tensors_in(values) for name in self._marks.get(id(tensor), ())}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the call and note what it did."""
        kwargs = kwargs or {}
        # Read before the call: an in-place one changes the marks of its input.
        call = read_call(func, args, kwargs) if func in SELECTING else None
        result = func(*args, **kwargs)
        self._alive.append(result)
        if call is not None:
            self._note_ranking(call, result)
        self._note_cut(func, args, result)
        self._mark(func, args, kwargs, result)
        return result

    def _note_ranking(self, call: Call, result: Any) -> None:
        marks = self._marks.get(id(call.scores), {})
        added = frozenset(name for name, how in marks.items() if how == "added")
        if call.k == 0:
            ids = result if isinstance(result, Tensor) else result[1]
            self._cuts[id(ids)] = (len(self._calls), call.dim)
        self._calls.append((call, added))
        self.used.clear()

    def _note_cut(self, func: Any, args: tuple, result: Any) -> None:
        """A sort selects by slicing its ids: their new length is k."""
        if getattr(func, "__name__", "") not in ("__getitem__", "narrow") or id(args[0]) not in self._cuts:
            return
        number, dim = self._cuts[id(args[0])]
        full = args[0].shape[dim]
        if isinstance(result, Tensor) and result.dim() == args[0].dim() and 0 < result.shape[dim] < full:
            self._order[number] = result.shape[dim]
        elif isinstance(result, Tensor) and result.dim() == args[0].dim() - 1:
            self._order[number] = 1

    def _mark(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name = getattr(func, "__name__", "")
        marks: dict[str, str] = {}
        for tensor in tensors_in((args, kwargs.values())):
            for followed, how in self._marks.get(id(tensor), {}).items():
                marks[followed] = _combined(marks.get(followed), _after(name, how))
        if not marks:
            return
        if func not in SELECTING and name not in _SAME_VALUES:
            self.used |= set(marks)
        changed = [args[0]] if name.endswith("_") and args and isinstance(args[0], Tensor) else []
        for tensor in (*tensors_in(result), *changed):
            if tensor.is_floating_point() and not (func in SELECTING and tensor is args[0]):
                self._marks[id(tensor)] = self._marks.get(id(tensor), {}) | marks


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and model outputs."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, Mapping, ValuesView)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors_in(value)


def _after(name: str, how: str) -> str:
    """How a result depends on a tensor on which an argument of ``name`` depends in the way ``how``."""
    if how != "raw" or name in _SAME_VALUES:
        return how
    return "added" if name in _ADDITIONS else "mixed"


def _combined(one: str | None, other: str) -> str:
    return other if one is None or one == other else "mixed"
