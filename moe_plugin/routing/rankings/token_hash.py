"""The same experts for every occurrence of a token of the vocabulary.

Shape legend: B sequences, S tokens of a sequence, T = B * S tokens, D model width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_plugin.errors import ConfigError
from moe_plugin.routing.rankings.ranking import pseudo_random


class TokenHash:
    """Hash layers, arXiv 2106.04426, with the random hash: experts are drawn once for each id of the vocabulary.

    Frequent tokens make their experts busy: it is even in the number of ids, not of tokens.

    Attributes:
        token_ids_T: The ids of the next tokens, see `tell_tokens_`; int64.
    """

    def __init__(self) -> None:
        """Start without tokens."""
        self.token_ids_T: Tensor | None = None

    def __call__(self, scores_TE: Tensor, x_TD: Tensor, *, training: bool) -> Tensor:
        """Return numbers that look random, see `Ranking`.

        Raises:
            ConfigError: The network does not give token ids.
        """
        ids_T = self.token_ids_T
        if x_TD.is_meta:
            ids_T = torch.zeros(len(x_TD), dtype=torch.int64, device="meta")
        if ids_T is None or len(ids_T) != len(x_TD):
            rule, given = (
                f"needs the ids of {len(x_TD)} tokens for TokenHash",
                0 if ids_T is None else len(ids_T),
            )
            raise ConfigError("ranking", rule, given, "Call tell_tokens_ before.")
        return pseudo_random(ids_T, scores_TE.shape[-1])


def tell_tokens_(network: nn.Module, token_ids_BS: Tensor) -> None:
    """Tell the routers of a network which tokens come next, see `TokenHash`."""
    for module in network.modules():
        ranking = getattr(module, "ranking", None)
        if isinstance(ranking, TokenHash):
            ranking.token_ids_T = token_ids_BS.flatten()
