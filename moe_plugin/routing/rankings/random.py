"""Random experts for every token.

Shape legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.routing.rankings.ranking import pseudo_random


@dataclass(frozen=True)
class Random:
    """Experts drawn evenly, and again whenever a token's hidden state changes at all.

    The draw is a hash of the bits of the hidden state, without a generator: a layer that is recomputed in the backward
    draws the same.
    """

    def __call__(self, scores_TE: Tensor, x_TD: Tensor, *, training: bool) -> Tensor:
        """Return numbers that look random, see `Ranking`."""
        bits_TD = x_TD.detach().float().contiguous().view(torch.int32).long()
        places_D = torch.arange(1, bits_TD.shape[-1] + 1, device=bits_TD.device)
        return pseudo_random((bits_TD * places_D).sum(-1), scores_TE.shape[-1])
