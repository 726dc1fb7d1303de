"""How many experts tokens use if their number varies: by layer, by kind of token, and by the loss of the token.

Only counts of tokens are kept, so batches add up exactly and memory does not grow with them.

Shape legend: L layers, T tokens, U numbers of experts used (0, 1, ... up to the most), G kinds of tokens,
P ranges of positions, B ranges of loss, Q parts of the tokens with equally many in each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOSS_FROM, LOSS_STEPS, LOSS_BINS = -10, 16, 256
"""Ranges of loss: sixteenths of an octave, from 2**-10 nats to 2**6."""
POSITION_BINS = 8
"""Positions 0, 1, 2 to 3, 4 to 7, ..., from 64 on."""


class ExpertsUsed:
    """Counts of tokens by the number of experts that they used.

    Attributes:
        tokens_LU: Tokens of each layer by the number of experts that they used; int64.
        by_kind: The same for each kind of token; int64 (L, G, U).
        by_loss_LPUB: The same by position and loss, of tokens whose loss is known; int64.
    """

    def __init__(self, num_layers: int, max_k: int, kinds: Mapping[str, int]) -> None:
        """Start without tokens.

        Args:
            num_layers: L.
            max_k: The most experts of a token.
            kinds: The number of kinds G, by what distinguishes them.
        """
        self.tokens_LU = torch.zeros(num_layers, max_k + 1, dtype=torch.int64)
        self.by_kind = {
            name: torch.zeros(num_layers, groups, max_k + 1, dtype=torch.int64)
            for name, groups in kinds.items()
        }
        self.by_loss_LPUB = torch.zeros(num_layers, POSITION_BINS, max_k + 1, LOSS_BINS, dtype=torch.int64)

    def add_(
        self,
        used_LT: Tensor,
        kinds: Mapping[str, Tensor],
        losses_T: Tensor | None = None,
        positions_T: Tensor | None = None,
    ) -> None:
        """Take in the tokens of a batch, on the host.

        Args:
            used_LT: Experts that each token used; int64.
            kinds: The kind of each token; int64 (T,). Others than 0 to G - 1 are left out.
            losses_T: Loss of each token in nats; those not finite are left out.
            positions_T: Place of each token in its sequence; int64. Required with losses.
        """
        self.tokens_LU += _count(used_LT, *self.tokens_LU.shape)
        most = self.tokens_LU.shape[1]
        for name, table_LGU in self.by_kind.items():
            groups = table_LGU.shape[1]
            known_T = (kinds[name] >= 0) & (kinds[name] < groups)
            cells_LT = kinds[name][known_T] * most + used_LT[:, known_T]
            table_LGU += _count(cells_LT, len(table_LGU), groups * most).view_as(table_LGU)
        if losses_T is not None:
            assert positions_T is not None
            known_T = losses_T.isfinite()
            cells_T = position_bins(positions_T[known_T]) * most * LOSS_BINS + loss_bins(losses_T[known_T])
            cells_LT = cells_T + used_LT[:, known_T] * LOSS_BINS
            table = self.by_loss_LPUB
            table += _count(cells_LT, len(table), table[0].numel()).view_as(table)


def mean_used(tokens_U: Tensor) -> Tensor:
    """Return the mean number of experts of a token from counts (..., U); float64 (...), NaN without tokens."""
    numbers_U = torch.arange(tokens_U.shape[-1], dtype=torch.float64)
    return (tokens_U * numbers_U).sum(-1) / tokens_U.sum(-1)


def loss_bins(losses_T: Tensor) -> Tensor:
    """Return the range of each token's loss; int64."""
    octaves_T = losses_T.double().clamp(min=2.0**LOSS_FROM).log2()
    return ((octaves_T - LOSS_FROM) * LOSS_STEPS).long().clamp(max=LOSS_BINS - 1)


def position_bins(positions_T: Tensor) -> Tensor:
    """Return the range of each token's position; int64."""
    return (positions_T + 1).double().log2().long().clamp(max=POSITION_BINS - 1)


def loss_correlation(by_loss_LPUB: Tensor) -> Tensor:
    """Return the rank correlation of a token's experts with its loss; float64 (L,), NaN if one is constant."""
    return rank_correlation(by_loss_LPUB.sum(1))


def loss_correlation_in_place(by_loss_LPUB: Tensor) -> Tensor:
    """Return the `loss_correlation` among tokens of about the same position, mean over all tokens.

    Early tokens have high losses because they have little context; this leaves that effect out.
    """
    within_LP = rank_correlation(by_loss_LPUB)
    tokens_LP = by_loss_LPUB.sum((-2, -1)).where(within_LP.isfinite(), 0)
    return (within_LP.nan_to_num() * tokens_LP).sum(1) / tokens_LP.sum(1)


def rank_correlation(table_UB: Tensor) -> Tensor:
    """Return Spearman's rank correlation, with mean ranks for ties, of a table of counts (..., U, B)."""
    table_UB = table_UB.double()
    total = table_UB.sum((-2, -1))
    rows_U = _mean_ranks(table_UB.sum(-1)) - (total / 2).unsqueeze(-1)
    columns_B = _mean_ranks(table_UB.sum(-2)) - (total / 2).unsqueeze(-1)
    together = (table_UB * rows_U.unsqueeze(-1) * columns_B.unsqueeze(-2)).sum((-2, -1))
    spread = (table_UB.sum(-1) * rows_U**2).sum(-1) * (table_UB.sum(-2) * columns_B**2).sum(-1)
    return together / spread.sqrt()


def used_by_loss(by_loss_LPUB: Tensor, parts: int = 10) -> tuple[Tensor, Tensor]:
    """Return the mean number of experts, from the tokens of the lowest losses to those of the highest.

    Args:
        by_loss_LPUB: Counts of tokens.
        parts: Q. A range of loss is never divided between two parts.

    Returns:
        The mean loss of each part, float64 (Q,), and the mean number of experts, float64 (L, Q); parts without tokens
        are left out.
    """
    table_LUB = by_loss_LPUB.sum(1)
    tokens_B = table_LUB[0].sum(0).double()
    part_B = (_mean_ranks(tokens_B) / tokens_B.sum() * parts).long().clamp(max=parts - 1)
    table_LUQ = torch.zeros(*table_LUB.shape[:2], parts, dtype=torch.int64).index_add_(2, part_B, table_LUB)
    loss_B = 2.0 ** (LOSS_FROM + (torch.arange(LOSS_BINS, dtype=torch.float64) + 0.5) / LOSS_STEPS)
    tokens_Q = torch.zeros(parts, dtype=torch.float64).index_add_(0, part_B, tokens_B)
    loss_Q = torch.zeros(parts, dtype=torch.float64).index_add_(0, part_B, tokens_B * loss_B) / tokens_Q
    filled_Q = tokens_Q > 0
    return loss_Q[filled_Q], mean_used(table_LUQ.transpose(1, 2))[:, filled_Q]


def _mean_ranks(counts: Tensor) -> Tensor:
    """Return the mean rank of the items in each cell of a line of counts, from 0."""
    return counts.cumsum(-1) - counts / 2


def _count(cells_LT: Tensor, layers: int, cells: int) -> Tensor:
    """Return how often each cell occurs in each layer; int64 (L, cells)."""
    offsets_L1 = torch.arange(layers).unsqueeze(1) * cells
    return (cells_LT + offsets_L1).flatten().bincount(minlength=layers * cells).view(layers, cells)
