"""See, and where the host has no bias of its own also steer, the top-k call that selects experts.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOP_K = (torch.topk, torch.Tensor.topk)
_NAMES = ("input", "k", "dim", "largest", "sorted")


class Selection(NamedTuple):
    """One expert selection as the host made it: the scores it ranked, and what it chose."""

    ranked_TE: Tensor
    selected_TK: Tensor
    expert_ids_TK: Tensor


class TopKIntercept(TorchFunctionMode):
    """Intercepts ``topk`` over ``num_experts`` scores with ``k == top_k`` inside a router's forward.

    Without a bias the call is only seen. With one, experts are ranked by ``scores + bias`` while the values handed
    back are the unbiased scores of the chosen experts, so that gate weights and their gradients never see the bias;
    with a zero bias values, ids and gradients are bit-identical to the plain call.

    When several calls match, the last is the selection: group limits rank groups before they rank experts.
    """

    def __init__(
        self, num_experts: int, top_k: int, bias_E: Tensor | None, zeros_masked: bool, seen: list[Selection]
    ) -> None:
        """Prepare to intercept.

        Args:
            num_experts: E.
            top_k: K.
            bias_E: fp32 bias to add for the ranking; None to only see the call.
            zeros_masked: Whether the host writes exact zeros over experts outside the chosen groups. Those must not
                be selected, whatever the bias.
            seen: Receives the selections. A list of the caller's, since compiled code cannot read an attribute of
                the mode after leaving it.
        """
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.bias_E = bias_E
        self.zeros_masked = zeros_masked
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Pass every call through, except the expert selection."""
        kwargs = kwargs or {}
        if func not in _TOP_K or not self._selects_experts(args, kwargs):
            return func(*args, **kwargs)
        result = func(*args, **kwargs) if self.bias_E is None else self._biased(self.bias_E, *args, **kwargs)
        ranked_TE = args[0] if args else kwargs["input"]
        self.seen.append(Selection(ranked_TE.detach(), result[0].detach(), result[1]))
        return result

    def _selects_experts(self, args: tuple, kwargs: dict) -> bool:
        call = dict(zip(_NAMES, args, strict=False)) | kwargs
        scores_TE, dim = call["input"], call.get("dim", -1)
        return (
            call["k"] == self.top_k
            and scores_TE.shape[-1] == self.num_experts
            and dim in (-1, scores_TE.dim() - 1)
            and call.get("largest", True)
        )

    def _biased(
        self, bias_E: Tensor, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> Any:
        ranked_TE = input.detach()
        if self.zeros_masked:
            ranked_TE = ranked_TE.masked_fill(ranked_TE == 0, float("-inf"))
        ids_TK = torch.topk(ranked_TE + bias_E, k, dim, largest, sorted).indices
        return torch.return_types.topk((input.gather(-1, ids_TK), ids_TK))
