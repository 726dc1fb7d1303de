"""A router that sends harder tokens to more experts, the mean number held at a target.

Experts are ranked as ever; a `Cut` then says how many of the best a token keeps. One number per router, its level,
moves the cut of all tokens. After each optimizer step it follows the number of experts per token that was counted, so
that the budget is held without a penalty loss: see `moe_plugin.balancing.budget`.

Shape legend: T tokens, D model width, E experts, K experts selected per token, at most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_plugin.errors import ConfigError
from moe_plugin.routing.cuts import Cut
from moe_plugin.routing.router import Router
from moe_plugin.routing.scores import Score
from moe_plugin.types import Allocation, Routing


class DynamicRouter(Router):
    """Sends each token to between `min_k` and `max_k` experts, in the mean to `target_k`.

    Attributes:
        level: Where the cut lies for all tokens, a persistent fp32 scalar; more experts are used at a higher level.
        target_k: Experts per token, in the mean over tokens.
    """

    level: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: Score,
        cut: Cut,
        max_k: int,
        min_k: int = 1,
        target_k: float | None = None,
        normalize: bool = False,
        scale: float = 1.0,
    ) -> None:
        """Create the router.

        Args:
            dim: Width of the hidden states.
            num_experts: Experts to choose from.
            top_k: Experts per token in the mean, unless `target_k` says otherwise.
            score: Score function, see `moe_plugin.routing.scores`.
            cut: How many of its best experts a token keeps, see `moe_plugin.routing.cuts`.
            max_k: Most experts of a token.
            min_k: Fewest experts of a token.
            target_k: Experts per token in the mean, not necessarily an integer; None is `top_k`.
            normalize: Divide each token's gate weights by their sum over the experts that it uses.
            scale: Factor on the gate weights, applied last.

        Raises:
            ConfigError: The numbers do not fit together.
        """
        if not 0 <= min_k <= max_k:
            raise ConfigError(f"'min_k' must be between 0 and max_k ({max_k}), got {min_k}.")
        target_k = float(top_k if target_k is None else target_k)
        if not (min_k <= target_k <= max_k and target_k > 0):
            raise ConfigError(
                f"'target_k' must be > 0 and between min_k ({min_k}) and max_k ({max_k}), got {target_k}."
            )
        super().__init__(dim, num_experts, max_k, score=score, normalize=normalize, scale=scale)
        self.cut = cut
        self.target_k = target_k
        self.min_k = min_k
        self.register_buffer("level", torch.tensor(cut.start, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Draw new weights, and sets the selection bias to zero and the level to where its cut starts."""
        super().reset_parameters()
        if "level" in self._buffers:  # not yet while `Router` is created
            nn.init.constant_(self.level, self.cut.start)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route each token; see `Router.forward`. Experts that a token does not use have gate weight 0."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE, scores_TE = self._score(x_TD)
            biased_TE = scores_TE.detach() + self.expert_bias
            expert_ids_TK = self._select(biased_TE)
            slack_TK = self._slack(scores_TE.detach(), biased_TE, expert_ids_TK)
            used_TK = slack_TK > 0
            weights_TK = self._gate_weights(scores_TE.gather(-1, expert_ids_TK), used_TK)
        return Routing(weights_TK, expert_ids_TK, scores_TE, logits_TE, used_TK, slack_TK)

    def allocation(self) -> Allocation:
        """Return what holds the number of experts per token at its target: the level."""
        return Allocation(self.target_k, self.num_experts, level=self.level)

    def extra_repr(self) -> str:
        """Return sizes, score and cut, for `print(model)`."""
        return f"{super().extra_repr()}, cut={self.cut}, target_k={self.target_k}, min_k={self.min_k}"

    def _slack(self, scores_TE: Tensor, biased_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        shares_TK = self.score.probabilities(scores_TE).gather(-1, expert_ids_TK)
        slack_TK = self.level - self.cut.needs(shares_TK, biased_TE.gather(-1, expert_ids_TK))
        slack_TK[..., : self.min_k] = torch.inf
        return slack_TK
