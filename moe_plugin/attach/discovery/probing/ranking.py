"""How the results of ranking calls are used: which ids, and in what way.

Shape legend: T tokens, K experts selected per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from moe_plugin.attach.discovery.probing.ranking_calls import Call, Use
from moe_plugin.attach.discovery.probing.tensor_map import TensorMap

SAME_VALUES = frozenset(
    (
        *("view", "view_as", "reshape", "flatten", "squeeze", "unsqueeze"),
        *("expand", "expand_as", "broadcast_to"),
        *("to", "type", "type_as", "float", "double", "half", "bfloat16", "detach", "contiguous", "clone"),
        *("movedim", "transpose", "t", "permute", "repeat", "select", "narrow", "__getitem__", "__get__"),
    )
)

_COMPARISONS = frozenset({"ge", "gt", "le", "lt", "__ge__", "__gt__", "__le__", "__lt__"})
_SHIFTS = frozenset(
    {"sub", "sub_", "__sub__", "__rsub__", "rsub", "div", "div_", "__truediv__", "true_divide"}
)
_LOOKS = frozenset({"__get__", "size", "dim", "numel", "stride"})
"""Calls that describe a tensor without using its entries."""


@dataclass
class Ranking:
    """A ranking call as traced.

    Attributes:
        number: How many rankings came before it.
        call: What was ranked.
        added: Names of the followed tensors that were only added to the scores on the way here.
        depends: Names of all followed tensors on which the scores depend.
        after: Numbers of the rankings on whose result the scores depend.
        ids: What was returned.
        hard: Whether the scores are made of comparisons or ids, like a mask, so no bias could move their order.
        slices: Where the slices taken of the ids start and end.
        columns: The same of single columns.
        whole_used: Whether all ids were used together.
        ids_used: Whether any ids were used.
        values_used: Whether the values returned were used.
        values_end: Where the longest slice taken of the values ends; 0 if none was taken.
        compared: Whether the values returned were compared with other scores.
        shifts: Whether they were subtracted from scores of all items, or divided them, as in a softmax by hand.
        ended: Whether the module returned, so all use was seen.
        returned: Whether what the module returned was seen to depend on the result.
    """

    number: int
    call: Call
    added: frozenset[str]
    depends: frozenset[str]
    after: frozenset[int]
    ids: Tensor
    hard: bool
    slices: set[tuple[int, int]] = field(default_factory=set)
    columns: set[tuple[int, int]] = field(default_factory=set)
    whole_used: bool = False
    ids_used: bool = False
    values_used: bool = False
    values_end: int = 0
    compared: bool = False
    shifts: bool = False
    ended: bool = False
    returned: bool = False

    @property
    def k(self) -> int:
        """How many of the ranked items are used."""
        start, end = self._extent
        return end - start

    @property
    def num_used(self) -> int:
        """How many of the ranked items are used, or only their values are."""
        return self.k if self.ids_used else self.values_end or self.call.k

    @property
    def draws_largest(self) -> bool:
        """Whether the items with the largest scores are used."""
        return self.call.largest != self.use.from_end

    @property
    def use(self) -> Use:
        """How the result is used."""
        start, end = self._extent
        full = self.call.k or self.call.num_items
        return Use(cut=end - start < full, from_end=start > 0)

    @property
    def _extent(self) -> tuple[int, int]:
        """The range of the returned ids in use; none of a sort unless it was cut."""
        full = self.call.k or self.call.num_items
        parts = self.slices | (self.columns if self.ended else set())
        if not parts or (self.call.k and self.whole_used):
            return 0, self.call.k
        start, end = min(first for first, _ in parts), max(last for _, last in parts)
        return (start, full) if start and end == full else (0, end)


class Fates:
    """Follows the ids and the values that rankings return."""

    def __init__(self) -> None:
        """Start without rankings."""
        self.rankings: list[Ranking] = []
        self._ids: TensorMap[Ranking] = TensorMap()
        self._parts: TensorMap[Ranking] = TensorMap()
        self._values: TensorMap[Ranking] = TensorMap()
        self._after: TensorMap[frozenset[int]] = TensorMap()
        self._hard: TensorMap[bool] = TensorMap()

    def are_scores(self, tensor: Tensor) -> bool:
        """Return whether a bias could move the tensor's order: not if it is made of comparisons or ids, like a mask."""
        return tensor.is_floating_point() and tensor not in self._hard

    def add_(
        self, call: Call, added: frozenset[str], depends: frozenset[str], values: Tensor | None, ids: Tensor
    ) -> None:
        """Note a ranking, see `Ranking`, and the values and ids that it returned."""
        after, hard = self._after.get(call.scores, frozenset()), not self.are_scores(call.scores)
        ranking = Ranking(len(self.rankings), call, added, depends, after, ids, hard)
        self._ids[ids] = ranking
        self._after[ids] = after | {ranking.number}
        if values is not None:
            self._values[values] = ranking
            self._after[values] = after | {ranking.number}
        self.rankings.append(ranking)

    def note_returned_(self, tensors: Iterable[Tensor]) -> None:
        """Note that the module returned these tensors, which its caller uses."""
        tensors = list(tensors)
        self._note_use(tensors)
        after = self._after_of(tensors)
        for ranking in self.rankings:
            ranking.ended, ranking.returned = True, ranking.number in after

    def note_(self, name: str, given: list[Tensor], results: list[Tensor]) -> None:
        """Note a function call.

        Args:
            name: The function's name.
            given: The tensors among its arguments.
            results: The tensors that it returned.
        """
        if given and not any(map(self.are_scores, given)):
            for result in results:
                self._hard[result] = True
        after = self._after_of(given)
        if after:
            for tensor in (*results, *(_changed(given[0]) if name.endswith("_") else ())):
                self._after[tensor] = after | self._after.get(tensor, frozenset())
        if not given or name in _LOOKS:
            return
        if name in SAME_VALUES and len(results) == 1:
            self._note_same(given, results[0])
        else:
            self._note_meeting(name, given)
            self._note_use(given)

    def _after_of(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        return frozenset().union(*(self._after.get(tensor, frozenset()) for tensor in tensors))

    def _note_meeting(self, name: str, given: list[Tensor]) -> None:
        for tensor in given if len(given) > 1 else ():
            if tensor in self._values:
                ranking = self._values[tensor]
                ranking.compared = ranking.compared or name in _COMPARISONS
                if name in _SHIFTS and any(other.shape == ranking.call.scores.shape for other in given):
                    ranking.shifts = True

    def _note_same(self, given: list[Tensor], result: Tensor) -> None:
        source = given[0]
        if source in self._values:
            ranking = self._values[result] = self._values[source]
            dim = ranking.call.dim
            if (
                result.dim() == source.dim() == ranking.call.scores.dim()
                and result.shape[dim] < source.shape[dim]
            ):
                ranking.values_end = max(ranking.values_end, result.shape[dim])
        is_slice = source in self._ids and self._note_slice(self._ids[source], source, result)
        self._note_use(given[1:] if is_slice else given)

    def _note_slice(self, ranking: Ranking, ids: Tensor, result: Tensor) -> bool:
        """Note which part of the ids a slice is; False if it is none."""
        dim, full = ranking.call.dim, ranking.call.k or ranking.call.num_items
        if result.shape == ids.shape:
            self._ids[result] = ranking
            return True
        if ids.dim() < ranking.call.scores.dim():
            return False
        start = int(result.storage_offset() - ids.storage_offset()) // ids.stride(dim)
        if result.dim() == ids.dim() and result.shape[dim] < full:
            ranking.slices.add((start, start + result.shape[dim]))
        elif result.dim() == ids.dim() - 1 and result.numel() * full == ids.numel():
            ranking.columns.add((start, start + 1))
        else:
            return False
        self._parts[result] = ranking
        return True

    def _note_use(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor in self._ids:
                ranking = self._ids[tensor]
                ranking.whole_used = ranking.ids_used = True
            elif tensor in self._parts:
                self._parts[tensor].ids_used = True
            elif tensor in self._values:
                self._values[tensor].values_used = True


def _changed(tensor: Tensor) -> list[Tensor]:
    """Return what a call that changes a tensor in place changes: a view's base too."""
    return [tensor] if tensor._base is None else [tensor, tensor._base]
