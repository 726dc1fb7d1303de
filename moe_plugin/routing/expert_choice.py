"""Experts choose their tokens: a baseline that is balanced by construction.

Shape legend: T tokens, D model width, E experts, C tokens per expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_positive_integers
from moe_plugin.routing.scores import Score


class Choice(NamedTuple):
    """The tokens that each expert chose.

    Attributes:
        token_ids_EC: The tokens of each expert, best first; int64.
        weights_EC: Their gate weights; fp32.
    """

    token_ids_EC: Tensor
    weights_EC: Tensor


class ExpertChoiceRouter(nn.Module):
    """A router by which each expert takes the `T * top_k / E` best tokens: arXiv 2202.09368, section 3.2.

    Loads are equal; a token may have no expert, or all. Whether an expert takes a token depends on all other tokens of
    the batch, **later ones too: a language model trained this way sees the future**, and its loss does not measure what
    it does token by token. Compare with it, but do not use it.

    Attributes:
        weight: Router weights, one row per expert, (E, D).
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, *, score: Score) -> None:
        """Create the router.

        Args:
            dim: Width of the hidden states.
            num_experts: Experts.
            top_k: Experts per token, on average.
            score: Score function; the paper's is `SoftmaxBeforeTopK`.

        Raises:
            ConfigError: The numbers do not fit together.
        """
        super().__init__()
        check_positive_integers(num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise ConfigError("top_k", f"must be <= num_experts ({num_experts})", top_k)
        self.num_experts = num_experts
        self.top_k = top_k
        self.score = score
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x_TD: Tensor) -> Choice:
        """Let each expert choose, in fp32 whatever the autocast."""
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = self.score.scores(functional.linear(x_TD.float(), self.weight.float()))
            capacity = max(1, len(x_TD) * self.top_k // self.num_experts)
            weights_EC, token_ids_EC = scores_TE.T.topk(min(capacity, len(x_TD)), dim=-1)
        return Choice(token_ids_EC, weights_EC)
