"""The router: hidden states to gate weights and expert ids, in fp32 whatever the autocast.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_positive, check_positive_integers
from moe_plugin.routing.rankings.ranking import Ranking
from moe_plugin.routing.scores import Score
from moe_plugin.routing.selection import limit_to_groups, select_top_k
from moe_plugin.types import Routing


class Router(nn.Module):
    """A router that sends each token to `top_k` of `num_experts` experts.

    Experts are selected by score plus `expert_bias`; gate weights come from the scores alone, and the bias has no
    gradient: auxiliary-loss-free balancing, arXiv 2408.15664, equation 3.

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
            ranking: What experts are selected by instead of their scores, see `moe_plugin.routing.rankings`.

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
        """Draw new weights and set the selection bias to zero."""
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
            # The smallest normal number only matters if all selected scores have underflowed to zero.
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(
                min=torch.finfo(torch.float32).tiny
            )
        return weights_TK * self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # Every cast or move of a module comes through here. Overridden in the class because deepcopy and pickle
        # lose an override on the instance.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, moved in list(self.named_buffers(recurse=False)):
            if moved.dtype != torch.float32:
                setattr(self, name, before[name].to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # `load_state_dict(assign=True)` would take the checkpoint's dtype.
        for name, _ in self.named_buffers(recurse=False):
            if (key := f"{prefix}{name}") in state_dict:
                state_dict[key] = state_dict[key].float()
        super()._load_from_state_dict(state_dict, prefix, *args)  # pyright: ignore[reportArgumentType]


def _validate_sizes(dim: int, num_experts: int, top_k: int, scale: float) -> None:
    check_positive_integers(dim=dim, num_experts=num_experts, top_k=top_k)
    if top_k > num_experts:
        raise ConfigError("top_k", f"must be <= num_experts ({num_experts})", top_k)
    check_positive("scale", scale)


def _validate_groups(num_experts: int, top_k: int, num_groups: int, top_k_groups: int) -> None:
    check_positive_integers(num_groups=num_groups, top_k_groups=top_k_groups)
    if num_experts % num_groups:
        raise ConfigError("num_groups", f"must divide num_experts ({num_experts})", num_groups)
    if top_k_groups > num_groups:
        raise ConfigError("top_k_groups", f"must be <= num_groups ({num_groups})", top_k_groups)
    size, most = num_experts // num_groups, max(1, num_experts // 2)
    if num_groups > 1 and size < 2:
        rule = f"must leave at least 2 of {num_experts} experts in a group, as its two best are its score"
        fix = f"Set num_groups <= {most} with top_k_groups <= num_groups, or both to 1 for no group limit."
        raise ConfigError("num_groups", rule, num_groups, fix)
    if top_k > top_k_groups * size:
        rule = f"must be <= the experts in the chosen groups ({top_k_groups} of {size} experts)"
        raise ConfigError("top_k", rule, top_k, "Raise top_k_groups or lower top_k.")
