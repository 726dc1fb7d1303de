"""See, and where the host has no bias of its own also steer, the call that selects experts.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_plugin.adapters.selecting import FUNCTIONS, Call, read_call


class Selection(NamedTuple):
    """One expert selection as the host made it: the scores it ranked, and what it chose.

    Attributes:
        ranked_TE: Scores that were ranked.
        selected_TK: Scores of the selected experts.
        expert_ids_TK: The selected experts.
        used_TK: Which of them the token is really sent to; None for all.
    """

    ranked_TE: Tensor
    selected_TK: Tensor
    expert_ids_TK: Tensor
    used_TK: Tensor | None = None

    def detached(self) -> Selection:
        """The same without gradients."""
        return self._replace(ranked_TE=self.ranked_TE.detach(), selected_TK=self.selected_TK.detach())


class Intercept(TorchFunctionMode):
    """Intercepts the calls of one kind that rank ``num_experts`` scores inside a router's forward.

    Without a bias the call is only seen. With one, experts are ranked by ``scores + bias`` while the values handed
    back are the unbiased scores of the chosen experts, so that gate weights and their gradients never see the bias;
    with a zero bias values, ids and gradients are bit-identical to the plain call.

    When several calls match, the last is the selection: group limits rank groups before they rank experts.
    """

    def __init__(
        self,
        kind: str,
        num_experts: int,
        top_k: int,
        bias_E: Tensor | None,
        zeros_masked: bool,
        seen: list[Selection],
    ) -> None:
        """Prepare to intercept.

        Args:
            kind: topk, sort, argsort, argmax or max; a host that uses argmax may read the value by max.
            num_experts: E.
            top_k: K.
            bias_E: fp32 bias to add for the ranking; None to only see the call.
            zeros_masked: Whether the host writes exact zeros over experts outside the chosen groups. Those must not
                be selected, whatever the bias.
            seen: Receives the selections. A list of the caller's, since compiled code cannot read an attribute of
                the mode after leaving it.
        """
        super().__init__()
        self.functions = FUNCTIONS[kind]
        self.num_experts = num_experts
        self.top_k = top_k
        self.bias_E = bias_E
        self.zeros_masked = zeros_masked
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Pass every call through, except the expert selection."""
        if func not in self.functions:  # every operation of the router passes here
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        call = read_call(func, args, kwargs)
        if call is None or call.k not in (0, self.top_k) or call.num_items != self.num_experts:
            return func(*args, **kwargs)
        if self.bias_E is None:
            return self._see(call, func(*args, **kwargs))
        ranked_TE = biased(call.scores, self.bias_E, call.dim, self.zeros_masked)
        result = func(ranked_TE, *args[1:], **kwargs) if args else func(**kwargs | {"input": ranked_TE})
        return self._see(call, _unbiased_result(call, result))

    def _see(self, call: Call, result: Any) -> Any:
        """Note what was chosen."""
        if call.kind == "topk":
            values, ids = result
        else:
            ids = result if isinstance(result, Tensor) else result[1]
            ids = (ids if ids.dim() == call.scores.dim() else ids.unsqueeze(call.dim)).narrow(
                call.dim, 0, self.top_k
            )
            values = call.scores.gather(call.dim, ids)
        chosen = (call.scores, values, ids)
        last = call.scores.dim() - 1
        self.seen.append(
            Selection(*(chosen if call.dim == last else (t.movedim(call.dim, -1) for t in chosen)))
        )
        return result


def select(scores_TE: Tensor, k: int, bias_E: Tensor) -> Selection:
    """The ``k`` experts with the largest score plus bias, with their unbiased scores."""
    ids_TK = torch.topk(biased(scores_TE, bias_E, scores_TE.dim() - 1, False), k, dim=-1).indices
    return Selection(scores_TE, scores_TE.gather(-1, ids_TK), ids_TK)


def biased(scores: Tensor, bias_E: Tensor, dim: int, zeros_masked: bool) -> Tensor:
    """Scores to rank by: without gradient, with the bias along ``dim``, closed groups kept closed."""
    ranked = scores.detach()
    if zeros_masked:
        ranked = ranked.masked_fill(ranked == 0, float("-inf"))
    after = scores.dim() - 1 - dim
    return ranked + (bias_E.view(-1, *[1] * after) if after else bias_E)


def _unbiased_result(call: Call, result: Any) -> Any:
    """The result of the biased ranking with its values replaced by the unbiased scores."""
    if isinstance(result, Tensor):
        return result
    ids = result[1]
    if call.keepdim:
        return type(result)((call.scores.gather(call.dim, ids), ids))
    return type(result)((call.scores.gather(call.dim, ids.unsqueeze(call.dim)).squeeze(call.dim), ids))
