"""Watch the call that selects experts, and steer it if the host has no bias.

Shape legend: T tokens, K experts selected per token, E experts, N ranked items that a call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_plugin.attach.discovery.probing.ranking_calls import FUNCTIONS, Call, read_call
from moe_plugin.attach.discovery.routing_style import Plan, Role, RoutingStyle
from moe_plugin.attach.selection import Selection
from moe_plugin.attach.steering.rank_op import rank

_RESULTS: dict[str, Callable[..., Any]] = {
    "topk": torch.return_types.topk,
    "sort": torch.return_types.sort,
    "max": torch.return_types.max,
    "min": torch.return_types.min,
}


class Intercept(TorchFunctionMode):
    """Intercepts the calls inside a router's forward that rank its experts.

    The selecting call ranks experts by ``scores + bias`` and returns the unbiased scores of the chosen experts, so gate
    weights and their gradients never see the bias; with a zero bias values, ids and gradients are bit-identical to the
    plain call. If the smallest scores are chosen, the bias is subtracted, so it always attracts tokens. A call that
    repeats the choice, on the same scores or others, returns the same experts and its own scores of them wherever the
    bias has changed the choice. All other rankings are the host's. Without a bias calls are only watched.
    """

    def __init__(
        self,
        style: RoutingStyle,
        plan: Plan,
        bias_E: Tensor | None,
        seen: list[Selection],
        calls: list[Role],
        guard: Callable[[], None] | None = None,
    ) -> None:
        """Prepare to intercept one forward.

        Args:
            style: How the router selects.
            plan: What each of its rankings is for.
            bias_E: fp32 bias to add for the ranking; None to only watch the call.
            seen: The caller's list, which receives the selections: compiled code cannot read an attribute of the mode
                after leaving it.
            calls: The same, for what each ranking of the experts was for.
            guard: Called before a biased ranking.
        """
        super().__init__()
        self.functions = FUNCTIONS[plan.kind or style.kind]
        self.style = style
        self.plan = plan
        self.bias_E = bias_E
        self.seen = seen
        self.guard = guard
        self.calls = calls
        self.returned: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Pass every call through, except rankings of the experts."""
        if func not in self.functions:  # every operation of the router passes here
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        call = read_call(func, args, kwargs)
        if call is None or call.scores.shape[call.dim] != self.style.num_experts:
            return func(*args, **kwargs)
        role = self._role_of(call)
        self.calls.append(role)
        steers = role is Role.SELECTS and self.bias_E is not None
        if steers and self.guard is not None:
            self.guard()
        ranked = self._ranked(call) if steers else call.scores
        if torch.compiler.is_compiling():
            ids = _rank(call, ranked)
            result = _unbiased_result(call, ids)
        elif steers:
            result = func(ranked, *args[1:], **kwargs) if args else func(**kwargs | {"input": ranked})
            ids = _ids_in(call, result)
            result = _unbiased_result(call, ids)
        else:
            result = func(*args, **kwargs)
            ids = _ids_in(call, result)
        if role is Role.SELECTS:
            self._see(call, ids, result)
        elif role is Role.REPEATS and self.bias_E is not None:
            return self._repeated(call, ids)
        return result

    def _repeated(self, call: Call, own_ids: Tensor) -> Any:
        """Return the selected experts for tokens that the bias sends elsewhere; scores may tie for the others."""
        ids, moved = self.returned[-1]
        ids = ids[..., : call.k or None].movedim(-1, call.dim)
        return _unbiased_result(call, torch.where(moved.movedim(-1, call.dim), ids, own_ids))

    def _role_of(self, call: Call) -> Role:
        roles = self.plan.roles
        if not roles:  # each call selects for some of the tokens
            return Role.SELECTS if not call.k or self.style.use.k in (None, call.k) else Role.OTHER
        number = len(self.calls)
        return roles[number] if number < len(roles) else Role.OTHER

    def _draws_largest(self, call: Call) -> bool:
        return call.largest != self.style.use.from_end

    def _ranked(self, call: Call) -> Tensor:
        assert self.bias_E is not None
        zeros_masked = self.style.zeros_masked
        if self._draws_largest(call):
            ranked_TE = _biased(call.scores, self.bias_E, call.dim, zeros_masked)
        else:
            ranked_TE = -_biased(-call.scores, self.bias_E, call.dim, zeros_masked)
        return ranked_TE if self.style.use.rounds == 1 else self._left_by_earlier_rounds(call, ranked_TE)

    def _left_by_earlier_rounds(self, call: Call, ranked_TE: Tensor) -> Tensor:
        """Exclude experts chosen in earlier rounds: hosts that set their scores to zero leave them in the ranking."""
        rounds = self.style.use.rounds
        for earlier in self.seen[len(self.seen) // rounds * rounds :]:
            ids = earlier.expert_ids_TK.movedim(-1, call.dim)
            ranked_TE = ranked_TE.scatter(call.dim, ids, -torch.inf if call.largest else torch.inf)
        return ranked_TE

    def _see(self, call: Call, ids: Tensor, result: Any) -> None:
        """Record what was chosen."""
        if self.plan.repeats:
            moved = (ids != _rank(call, call.scores)).any(call.dim, keepdim=True)
            self.returned.append((ids.movedim(call.dim, -1), moved.movedim(call.dim, -1)))
        cut_ids = self._cut(call, ids)
        is_whole = call.kind == "topk" and cut_ids is ids
        values = result[0] if is_whole else call.scores.gather(call.dim, cut_ids)
        chosen = (call.scores if self._draws_largest(call) else -call.scores, values, cut_ids)
        if call.dim != call.scores.dim() - 1:
            chosen = tuple(tensor.movedim(call.dim, -1) for tensor in chosen)
        self.seen.append(Selection(*chosen))

    def _cut(self, call: Call, ids: Tensor) -> Tensor:
        """Return the ids that the host uses."""
        use, size = self.style.use, ids.shape[call.dim]
        kept = min(self.style.top_k // use.rounds, size)
        if kept == size or not (use.cut or call.kind != "topk"):
            return ids
        return ids.narrow(call.dim, size - kept if use.from_end else 0, kept)


def select(scores_TE: Tensor, k: int, bias_E: Tensor) -> Selection:
    """Select experts by score plus bias, with their unbiased scores.

    Args:
        scores_TE: Unbiased scores.
        k: K.
        bias_E: fp32 bias.
    """
    ids_TK = torch.topk(_biased(scores_TE, bias_E, scores_TE.dim() - 1, False), k, dim=-1).indices
    return Selection(scores_TE, scores_TE.gather(-1, ids_TK), ids_TK)


def _biased(scores: Tensor, bias_E: Tensor, dim: int, zeros_masked: bool) -> Tensor:
    """Return the scores to rank by: without gradient, with the bias along ``dim``, closed groups kept closed."""
    ranked = scores.detach()
    if zeros_masked:
        ranked = ranked.masked_fill(ranked == 0, float("-inf"))
    after = scores.dim() - 1 - dim
    return ranked + (bias_E.view(-1, *[1] * after) if after else bias_E)


def _rank(call: Call, scores: Tensor) -> Tensor:
    """Return the ids (..., N, ...) that a call returns for these scores."""
    return rank(scores.detach(), call.kind, call.k, call.dim, call.largest)


def _ids_in(call: Call, result: Any) -> Tensor:
    """Return the ids (..., N, ...) that a call returned, with the ranked dimension kept."""
    ids = result if isinstance(result, Tensor) else result[1]
    return ids if call.keepdim else ids.unsqueeze(call.dim)


def _unbiased_result(call: Call, ids: Tensor) -> Any:
    """Return what the call returns if these ids (..., N, ...) are chosen."""
    squeezed = ids if call.keepdim else ids.squeeze(call.dim)
    if call.kind not in _RESULTS:
        return squeezed
    values = call.scores.gather(call.dim, ids)
    return _RESULTS[call.kind]((values if call.keepdim else values.squeeze(call.dim), squeezed))
