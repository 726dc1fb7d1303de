"""The tokens that suit each expert best, with the text around them.

Shape legend: T tokens, K experts selected per token, E experts, N tokens kept of each expert, W tokens of a window,
B sequences, S tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_plugin.callbacks.monitor.token_kinds import TokenKinds

KEPT, SHOWN = 16, 4
BEFORE, AFTER = 20, 12
"""Tokens of a window before and after the one that went to the expert."""
TOKENS = 2048
"""Tokens of a validation batch that are looked at, at most, for all but counts."""
EXPERTS = 64
"""Experts of a layer that are shown, at most."""

Snippet = tuple[str, str, str]
"""The text before a token, of the token, and after it."""


class TypicalTokens:
    """For each expert, the tokens with the highest scores among those that used it.

    Args:
        num_experts: Experts of the layer; the first `EXPERTS` are looked at.
    """

    def __init__(self, num_experts: int) -> None:
        """Start without tokens."""
        self.num_experts = min(num_experts, EXPERTS)
        self._scores_EN = torch.empty(self.num_experts, 0, dtype=torch.float32)
        self._windows_ENW = torch.empty(self.num_experts, 0, BEFORE + 1 + AFTER, dtype=torch.int64)

    def add_(self, scores_TK: Tensor, expert_ids_TK: Tensor, tokens_BS: Tensor) -> None:
        """Take in a batch.

        Args:
            scores_TK: Unbiased scores of the selected experts, -inf where a token did not use one.
            expert_ids_TK: Selected experts; int64.
            tokens_BS: Token ids, T of them.
        """
        scores_TK, ids_TK = scores_TK[:TOKENS].cpu(), expert_ids_TK[:TOKENS].cpu()
        looked_TK = scores_TK.where(ids_TK < self.num_experts, -torch.inf)
        scores_TE = torch.full((len(ids_TK), self.num_experts), -torch.inf, dtype=torch.float32)
        scores_TE.scatter_reduce_(1, ids_TK.clamp(max=self.num_experts - 1), looked_TK, "amax")
        best_NE, tokens_NE = scores_TE.topk(min(KEPT, len(ids_TK)), dim=0)
        scores_EN = torch.cat([self._scores_EN, best_NE.T], dim=1)
        windows_ENW = torch.cat([self._windows_ENW, _windows(tokens_BS.cpu())[tokens_NE.T]], dim=1)
        self._scores_EN, places_EN = scores_EN.topk(min(KEPT, scores_EN.shape[1]), dim=1)
        self._windows_ENW = windows_ENW.gather(
            1, places_EN.unsqueeze(-1).expand(-1, -1, windows_ENW.shape[2])
        )

    def snippets(self, kinds: TokenKinds) -> list[list[Snippet]]:
        """Return for each expert the text around its best tokens, the best first, without repetitions."""
        return [
            _distinct([_snippet(window_W, kinds) for window_W in windows_NW[scores_N > -torch.inf]])
            for windows_NW, scores_N in zip(self._windows_ENW, self._scores_EN, strict=True)
        ]


def _windows(tokens_BS: Tensor) -> Tensor:
    """Return the tokens around each token, -1 past the ends of its sequence; int64 (T, W)."""
    return pad(tokens_BS, (BEFORE, AFTER), value=-1).unfold(1, BEFORE + 1 + AFTER, 1).flatten(0, 1)


def _snippet(window_W: Tensor, kinds: TokenKinds) -> Snippet:
    before, token, after = (
        "".join(kinds.text(part[part >= 0])) for part in window_W.split([BEFORE, 1, AFTER])
    )
    return before, token, after


def _distinct(snippets: list[Snippet]) -> list[Snippet]:
    """Return the first of the snippets whose token follows the same few letters."""
    first: dict[tuple[str, str], Snippet] = {}
    for before, token, after in snippets:
        first.setdefault((before[-4:], token), (before, token, after))
    return list(first.values())[:SHOWN]
