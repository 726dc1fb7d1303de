"""How well each expert suits each token: router logits to scores, and selected scores to gate weights.

Every score is a small frozen class: Hydra can name it with `_target_`, and it pickles and compares by value. All
tensors are fp32.

Shape legend: T tokens, E experts, K experts selected per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Score(Protocol):
    """What a router needs to know about its score function."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return the scores_TE that selection compares, to which the selection bias is added."""
        ...

    def weights(self, selected_scores_TK: Tensor) -> Tensor:
        """Return gate weights_TK of the selected experts, before normalisation and scaling."""
        ...

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """Return the scores as a distribution over the experts, for load-balancing losses."""
        ...


@dataclass(frozen=True)
class Sigmoid:
    """Each expert scored on its own, in (0, 1): DeepSeek-V3, arXiv 2412.19437, equation 15."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return sigmoid of the logits."""
        return logits_TE.sigmoid()

    def weights(self, selected_scores_TK: Tensor) -> Tensor:
        """Return the selected scores themselves."""
        return selected_scores_TK

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """Return scores divided by their sum over the experts: arXiv 2412.19437, equation 19."""
        return _normalized(scores_TE)


@dataclass(frozen=True)
class LogSigmoid:
    """`Sigmoid`, but selection compares logarithms: a selection bias is then the logarithm of a factor."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return logarithm of the sigmoid of the logits."""
        return functional.logsigmoid(logits_TE)

    def weights(self, selected_scores_TK: Tensor) -> Tensor:
        """Return the sigmoids."""
        return selected_scores_TK.exp()

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """Return the sigmoids divided by their sum over the experts."""
        return scores_TE.softmax(dim=-1)


@dataclass(frozen=True)
class SqrtSoftplus(Sigmoid):
    """Each expert scored on its own, in (0, inf): the square root of the logit's softplus."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return square root of the softplus of the logits."""
        # Below about -87 softplus underflows to 0, and there the square root's gradient is infinite.
        return functional.softplus(logits_TE.clamp(min=-80.0)).sqrt()


@dataclass(frozen=True)
class SoftmaxBeforeTopK:
    """Experts compete for one unit of score: Switch, arXiv 2101.03961, equation 1, and Qwen3."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return softmax of the logits over all experts."""
        return logits_TE.softmax(dim=-1)

    def weights(self, selected_scores_TK: Tensor) -> Tensor:
        """Return the selected scores themselves."""
        return selected_scores_TK

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """Return the scores, which already sum to one."""
        return scores_TE


@dataclass(frozen=True)
class SoftmaxAfterTopK:
    """Selection on the logits, softmax over the selected ones: Mixtral, arXiv 2401.04088, section 2.1."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return the logits, unchanged."""
        return logits_TE

    def weights(self, selected_scores_TK: Tensor) -> Tensor:
        """Return softmax over the selected logits."""
        return selected_scores_TK.softmax(dim=-1)

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """Return softmax of the logits over all experts."""
        return scores_TE.softmax(dim=-1)


def _normalized(scores_TE: Tensor) -> Tensor:
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)
