"""The load-balancing loss of Switch Transformers and GShard.

Shape legend: T tokens, E experts, K experts selected per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.errors import ConfigError
from moe_plugin.types import Routing


@dataclass(frozen=True)
class LoadBalancingLoss:
    """`coefficient * E * sum_e f_e * P_e` for one layer: arXiv 2101.03961, equations 4 to 6.

    f_e is the share of the T * K selections that went to expert e, without gradient, and P_e the mean over
    the tokens of the router's probability for e. Balanced routing gives `coefficient`, all tokens on one
    expert up to `coefficient * E`. It is a mean over tokens, so that its gradient does not depend on the
    number of micro-batches. Over several layers the losses are added, as Switch does.

    Attributes:
        coefficient: Weight beside the cross-entropy; Switch uses 0.01.
    """

    coefficient: float

    def __post_init__(self) -> None:
        """Checks the coefficient.

        Raises:
            ConfigError: It is negative, infinite or NaN.
        """
        if not 0 <= self.coefficient < float("inf"):
            raise ConfigError(f"'coefficient' must be a finite number >= 0, got {self.coefficient}.")

    def __call__(self, routing: Routing, num_experts: int) -> Tensor:
        """The loss of one layer.

        Args:
            routing: Where the tokens went. `scores_TE` must be >= 0 and is divided by its sum per token,
                which leaves softmax scores as they are; for logits see `Score.probabilities`.
            num_experts: Experts E.

        Returns:
            A scalar, fp32; 0 when there is no token.
        """
        scores_TE = routing.scores_TE
        total_T1 = scores_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)
        num_tokens = max(1, scores_TE.shape[0])
        probability_E = (scores_TE / total_T1).sum(dim=0) / num_tokens
        load_E = _shares(routing.expert_ids_TK, num_experts)
        return self.coefficient * num_experts * (load_E * probability_E).sum()


def _shares(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """The share of all selections that went to each expert, fp32."""
    ids_P = expert_ids_TK.flatten()
    counts_E = ids_P.new_zeros(num_experts).scatter_add_(0, ids_P, torch.ones_like(ids_P))
    return counts_E.float() / max(1, ids_P.numel())
