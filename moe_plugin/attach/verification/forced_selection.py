"""Make a router without balancing select given experts, without the code that balancing uses for it.

Shape legend: T tokens, N tokens of one call, J experts chosen by one call, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from moe_plugin.attach.discovery.probing.ranking_calls import SELECTING, Call, read_call
from moe_plugin.attach.site import Site
from moe_plugin.attach.verification.observation import Seen, observing

_AMAX = (torch.amax, Tensor.amax)


def force_(model: nn.Module, sites: Mapping[str, Site], chosen: Mapping[str, list[Seen]]) -> list[str]:
    """Make the routers of a model without balancing select what was chosen elsewhere.

    Args:
        model: The model.
        sites: The sites of a balanced copy, which show what each router selects by itself from the same input.
        chosen: By router, what each of its calls is to select.

    Returns:
        A list that receives the names of routers in which no call was recognised as the selection.
    """
    unforced: list[str] = []
    for name, site in sites.items():
        method = site.style.adapter.method if site.style.adapter is not None else "forward"
        module = model.get_submodule(name)
        calls = iter(chosen[name])
        module.__dict__[method] = _forced(site, method, getattr(module, method), calls, unforced)
    return unforced


def _forced(
    site: Site, method: str, original: Callable[..., Any], calls: Iterator[Seen], unforced: list[str]
) -> Callable[..., Any]:
    def forced(*args: Any, **kwargs: Any) -> Any:
        given_args, given_kwargs = tree_map(_cloned, (args, kwargs))  # some routers change their input
        with torch.random.fork_rng(devices=[]), torch.no_grad(), observing({site.name: site}) as seen:
            getattr(site.router, method)(*given_args, **given_kwargs)
        (plain,) = seen[site.name]
        mode = ForcedSelection(site, plain, next(calls).ids_TK)
        with mode:
            output = original(*args, **kwargs)
        unforced.extend([site.name] * (not mode.has_forced))
        return output

    return forced


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class ForcedSelection(TorchFunctionMode):
    """Replaces the result of every call that would choose the experts that the router by itself selects.

    So also of those that choose them a second time, as for gate weights. Values are those of the call's own input.
    """

    def __init__(self, site: Site, plain: Seen, ids_TK: Tensor) -> None:
        """Prepare to force one call of a router.

        Args:
            site: The router in a balanced copy with its first bias.
            plain: What that selected.
            ids_TK: What to select instead.
        """
        super().__init__()
        self.style = site.style
        self.ranked_TE = plain.scores_TE + site.bias if site.host_owns_bias else plain.scores_TE
        self.ids_TK = ids_TK
        self.place, self.num_rows = (0, -1), 0
        self.has_forced = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the call, and replace its result if it chose."""
        kwargs = kwargs or {}
        call = self._choice(func, args, kwargs)
        result = func(*args, **kwargs)
        if call is None:
            return result
        num_chosen = self._num_chosen(call)
        best = call.scores.detach().movedim(call.dim, -1)
        from_end = self.style.use.from_end and call.k != num_chosen
        best_NE = (best if call.largest != from_end else -best).reshape(-1, best.shape[-1]).float()
        for place in self._places(len(best_NE), num_chosen):
            if _chooses(best_NE, self._expected(place, len(best_NE), num_chosen)):
                self.place, self.num_rows, self.has_forced = place, len(best_NE), True
                ids_NJ = self._ids(place, len(best_NE), num_chosen)
                ids = _in_order(best_NE, ids_NJ, call.k or best.shape[-1], from_end)
                return _result(call, result, ids.view(*best.shape[:-1], -1).movedim(-1, call.dim))
        return result

    def _choice(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """Return the call if it may choose experts."""
        k = self.ids_TK.shape[1]
        if func in _AMAX and k == 1:
            call = _read_amax(*args, **kwargs)
        else:
            call = read_call(func, args, kwargs) if func in SELECTING else None
        if call is None or call.num_items != self.style.num_experts or not call.scores.is_floating_point():
            return None
        return call if self._num_chosen(call) else None

    def _num_chosen(self, call: Call) -> int:
        """Return how many of a token's experts the call chooses: J; 0 if it is no such call."""
        k = self.ids_TK.shape[1]
        if self.style.kind == "adapter":
            return call.k if call.k and k % call.k == 0 else k
        per_round = k // self.style.use.rounds
        return 0 if 0 < call.k < per_round else per_round

    def _places(self, num_rows: int, num_chosen: int) -> Iterator[tuple[int, int]]:
        """Yield the first row and the round of the choice that comes next, then of the last one."""
        row, number = self.place
        if (number + 1) * num_chosen < self.ids_TK.shape[1]:
            yield row, number + 1
        elif row + self.num_rows + num_rows <= len(self.ids_TK):
            yield row + self.num_rows, 0
        if number >= 0:
            yield row, number

    def _ids(self, place: tuple[int, int], num_rows: int, num_chosen: int) -> Tensor:
        row, number = place
        return self.ids_TK[row : row + num_rows, number * num_chosen : (number + 1) * num_chosen]

    def _expected(self, place: tuple[int, int], num_rows: int, num_chosen: int) -> Tensor:
        """Return what the router by itself chooses here, after earlier rounds chose what they were forced to."""
        row, number = place
        earlier = self.ids_TK[row : row + num_rows, : number * num_chosen]
        left = self.ranked_TE[row : row + num_rows].scatter(1, earlier, -torch.inf)
        return left.topk(num_chosen).indices


def _read_amax(input: Tensor, dim: Any = (), keepdim: bool = False, **rest: Any) -> Call | None:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return Call("amax", input, 1, dim % input.dim(), keepdim, True) if isinstance(dim, int) else None


def _chooses(best_NE: Tensor, ids_NJ: Tensor) -> bool:
    """Return whether these are the best experts of every row; any of those that are equally good."""
    if len(best_NE) != len(ids_NJ):
        return False
    worst_N = best_NE.gather(1, ids_NJ).amin(1)
    return bool((worst_N >= best_NE.topk(ids_NJ.shape[1]).values[:, -1]).all())


def _in_order(best_NE: Tensor, ids_NJ: Tensor, num_returned: int, from_end: bool) -> Tensor:
    """Return the ids that a call returns: the forced ones, and behind them the rest by score."""
    others = best_NE.scatter(1, ids_NJ, -torch.inf).argsort(-1, descending=True)
    others = others[:, : num_returned - ids_NJ.shape[1]]
    return torch.cat([others.flip(1), ids_NJ] if from_end else [ids_NJ, others], dim=1)


def _result(call: Call, result: Any, ids: Tensor) -> Any:
    values = call.scores.gather(call.dim, ids)
    if not call.keepdim:
        values, ids = values.squeeze(call.dim), ids.squeeze(call.dim)
    if isinstance(result, Tensor):
        return ids if not result.is_floating_point() else values
    return type(result)((values, ids))
