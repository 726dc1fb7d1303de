"""The router: hidden states to gate weights and expert ids, in fp32 whatever the autocast.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_positive_integers
from moe_plugin.routing.rankings.ranking import Ranking
from moe_plugin.routing.scores import Score
from moe_plugin.routing.selection import limit_to_groups, select_top_k
from moe_plugin.types import Routing


class Router(nn.Module):
    """Sends each token to `top_k` of `num_experts` experts.

    Experts are selected by score plus `expert_bias`; gate weights come from the scores alone, and no gradient
    reaches the bias: auxiliary-loss-free balancing, arXiv 2408.15664, equation 3.

    Attributes:
        weight: Router weights, one row per expert, (E, D).
        expert_bias: Selection bias, a persistent fp32 buffer (E,). It stays fp32 whatever the module is cast
            to: in bf16 a bias of 0.5 plus an update of 0.001 is still 0.5.
    """

    expert_bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: Score,
        normalize: bool = False,
        scale: float = 1.0,
        num_groups: int = 1,
        top_k_groups: int = 1,
        ranking: Ranking | None = None,
    ) -> None:
        """Create the router.

        Args:
            dim: Width of the hidden states.
            num_experts: Experts to choose from.
            top_k: Experts per token.
            score: Score function, see `moe_plugin.routing.scores`.
            normalize: Divide each token's gate weights by their sum.
            scale: Factor on the gate weights, applied last.
            num_groups: Groups of consecutive experts; 1 for no group limit.
            top_k_groups: Groups a token may choose its experts from.
            ranking: What experts are selected by in place of their scores, see `moe_plugin.routing.rankings`.

        Raises:
            ConfigError: The numbers do not fit together.
        """
        super().__init__()
        _validate_sizes(dim, num_experts, top_k, scale)
        _validate_groups(num_experts, top_k, num_groups, top_k_groups)
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.score = score
        self.normalize = normalize
        self.scale = scale
        self.num_groups = num_groups
        self.top_k_groups = top_k_groups
        self.ranking = ranking
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("expert_bias", torch.empty(num_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights and sets the selection bias to zero."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)
        nn.init.zeros_(self.expert_bias)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route each token.

        Args:
            x_TD: Hidden states, any floating dtype.

        Returns:
            Gate weights and scores in fp32, expert ids in int64.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE, scores_TE = self._score(x_TD)
            ranked_TE = scores_TE.detach()
            if self.ranking is not None:
                ranked_TE = self.ranking(ranked_TE, x_TD, training=self.training)
            expert_ids_TK = self._select(ranked_TE + self.expert_bias)
            weights_TK = self._gate_weights(scores_TE.gather(-1, expert_ids_TK))
        return Routing(weights_TK, expert_ids_TK, scores_TE, logits_TE)

    def extra_repr(self) -> str:
        """Return sizes and score, for `print(model)`."""
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, score={self.score}"

    def _score(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = functional.linear(x_TD.float(), self.weight.float())
        return logits_TE, self.score.scores(logits_TE)

    def _select(self, biased_scores_TE: Tensor) -> Tensor:
        if self.num_groups > 1:
            biased_scores_TE = limit_to_groups(biased_scores_TE, self.num_groups, self.top_k_groups)
        return select_top_k(biased_scores_TE, self.top_k)

    def _gate_weights(self, selected_scores_TK: Tensor, used_TK: Tensor | None = None) -> Tensor:
        if used_TK is None:
            weights_TK = self.score.weights(selected_scores_TK)
        else:
            used_scores_TK = selected_scores_TK.masked_fill(~used_TK, -torch.inf)
            weights_TK = self.score.weights(used_scores_TK).masked_fill(~used_TK, 0.0)
        if self.normalize:
            # The smallest normal number only matters where all selected scores have underflowed to zero.
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(
                min=torch.finfo(torch.float32).tiny
            )
        return weights_TK * self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # Every cast or move of a module comes through here. Overridden in the class because an override on
        # the instance is lost by deepcopy and pickle.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, moved in list(self.named_buffers(recurse=False)):
            if moved.dtype != torch.float32:
                setattr(self, name, before[name].to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # `load_state_dict(assign=True)` would take the checkpoint's dtype over.
        for name, _ in self.named_buffers(recurse=False):
            if (key := f"{prefix}{name}") in state_dict:
                state_dict[key] = state_dict[key].float()
        super()._load_from_state_dict(state_dict, prefix, *args)  # pyright: ignore[reportArgumentType]


def _validate_sizes(dim: int, num_experts: int, top_k: int, scale: float) -> None:
    check_positive_integers(dim=dim, num_experts=num_experts, top_k=top_k)
    if top_k > num_experts:
        raise ConfigError(f"'top_k' must be <= num_experts ({num_experts}), got {top_k}.")
    if not scale > 0:
        raise ConfigError(f"'scale' must be > 0, got {scale}.")


def _validate_groups(num_experts: int, top_k: int, num_groups: int, top_k_groups: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise ConfigError(f"'num_groups' must divide num_experts ({num_experts}), got {num_groups}.")
    if not 1 <= top_k_groups <= num_groups:
        raise ConfigError(
            f"'top_k_groups' must be between 1 and num_groups ({num_groups}), got {top_k_groups}."
        )
    group_size = num_experts // num_groups
    if num_groups > 1 and group_size < 2:
        raise ConfigError(
            f"'num_groups' must leave at least 2 experts in a group (its score is the sum of its two best), got "
            f"{num_groups} groups of {num_experts} experts. Set num_groups <= {max(1, num_experts // 2)} with "
            f"top_k_groups <= num_groups, or num_groups=1 with top_k_groups=1 for no group limit."
        )
    if top_k > top_k_groups * group_size:
        raise ConfigError(
            f"'top_k' must be <= the experts in the chosen groups ({top_k_groups} groups of {group_size}), "
            f"got {top_k}. Raise top_k_groups or lower top_k."
        )
