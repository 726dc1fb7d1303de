"""Watch the call that selects experts, and steer it if the host has no bias.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_plugin.attach.discovery.probing.ranking_calls import FUNCTIONS, Call, read_call
from moe_plugin.attach.discovery.routing_style import RoutingStyle
from moe_plugin.attach.selection import Selection


class Intercept(TorchFunctionMode):
    """Intercepts the calls of one kind that rank ``num_experts`` scores inside a router's forward.

    Without a bias the call is only watched. With one, experts are ranked by ``scores + bias``, and the values returned
    are the unbiased scores of the chosen experts, so gate weights and their gradients never see the bias; with a zero
    bias values, ids and gradients are bit-identical to the plain call. If the smallest scores are chosen, the bias is
    subtracted, so it always attracts tokens.
    """

    def __init__(
        self,
        style: RoutingStyle,
        bias_E: Tensor | None,
        seen: list[Selection],
        guard: Callable[[], None] | None = None,
    ) -> None:
        """Prepare to intercept.

        Args:
            style: How the router selects.
            bias_E: fp32 bias to add for the ranking; None to only watch the call.
            seen: The caller's list, which receives the selections: compiled code cannot read an attribute of the mode
                after leaving it.
            guard: Called before a biased ranking.
        """
        super().__init__()
        self.functions = FUNCTIONS[style.kind]
        self.style = style
        self.bias_E = bias_E
        self.seen = seen
        self.guard = guard

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Pass every call through, except the expert selection."""
        if func not in self.functions:  # every operation of the router passes here
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        call, style = read_call(func, args, kwargs), self.style
        if (
            call is None
            or call.scores.shape[call.dim] != style.num_experts
            or (call.k and style.use.k not in (None, call.k))
        ):
            return func(*args, **kwargs)
        draws_largest = call.largest != style.use.from_end
        if self.bias_E is None:
            result = func(*args, **kwargs)
            self._see(call, result, draws_largest)
            return result
        if self.guard is not None:
            self.guard()
        ranked_TE = self._ranked(call, self.bias_E, draws_largest)
        result = func(ranked_TE, *args[1:], **kwargs) if args else func(**kwargs | {"input": ranked_TE})
        self._see(call, result, draws_largest)
        return _unbiased_result(call, result)

    def _ranked(self, call: Call, bias_E: Tensor, draws_largest: bool) -> Tensor:
        zeros_masked = self.style.zeros_masked
        if draws_largest:
            ranked_TE = _biased(call.scores, bias_E, call.dim, zeros_masked)
        else:
            ranked_TE = -_biased(-call.scores, bias_E, call.dim, zeros_masked)
        return ranked_TE if self.style.use.rounds == 1 else self._left_by_earlier_rounds(call, ranked_TE)

    def _left_by_earlier_rounds(self, call: Call, ranked_TE: Tensor) -> Tensor:
        """Exclude experts chosen in earlier rounds: hosts that set their scores to zero leave them in the ranking."""
        rounds = self.style.use.rounds
        for earlier in self.seen[len(self.seen) // rounds * rounds :]:
            ids = earlier.expert_ids_TK.movedim(-1, call.dim)
            ranked_TE = ranked_TE.scatter(call.dim, ids, -torch.inf if call.largest else torch.inf)
        return ranked_TE

    def _see(self, call: Call, result: Any, draws_largest: bool) -> None:
        """Record what was chosen."""
        if call.kind == "topk" and not self.style.use.cut:
            values, ids = result
        else:
            ids = self._cut(call, result if isinstance(result, Tensor) else result[1])
            values = call.scores.gather(call.dim, ids)
        scores = call.scores if draws_largest else -call.scores
        if self.seen and self.seen[-1].ranked_TE is scores:  # ranked once more, for a loss
            return
        chosen = (scores, values, ids)
        if call.dim != call.scores.dim() - 1:
            chosen = tuple(tensor.movedim(call.dim, -1) for tensor in chosen)
        self.seen.append(Selection(*chosen))

    def _cut(self, call: Call, ids: Tensor) -> Tensor:
        """Return the ids that the host uses."""
        if ids.dim() < call.scores.dim():
            return ids.unsqueeze(call.dim)
        size = ids.shape[call.dim]
        use = self.style.use
        kept = min(self.style.top_k // use.rounds, size)
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


def _unbiased_result(call: Call, result: Any) -> Any:
    """Return the result of the biased ranking with its values replaced by the unbiased scores."""
    if isinstance(result, Tensor):
        return result
    ids = result[1]
    if call.keepdim:
        return type(result)((call.scores.gather(call.dim, ids), ids))
    return type(result)((call.scores.gather(call.dim, ids.unsqueeze(call.dim)).squeeze(call.dim), ids))
