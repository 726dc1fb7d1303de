"""Hold the average number of experts per token at a target.

A router whose tokens use different numbers of experts has one number, its level, that moves the number of all of them:
see `moe_plugin.routing.dynamic`. Each step moves it towards the level that would have met the target in that step. That
level is read from a histogram of how far every selected expert was from being left out. So no gain has to suit the
scale of the scores or the slope of the number of experts over the level, as for a controller that only knows the mean.
No loss, no gradient.

Shape legend: T tokens, K experts selected per token at most, G bins.
"""

from __future__ import annotations

from torch import Tensor

from moe_plugin.balancing.gaps import balanced_gap, count_gaps_, new_gaps

RATE = 0.2
"""Share of the way to go in one step: less evens out the noise of batches, more follows the data sooner."""


def new_budget() -> Tensor:
    """Return an empty histogram; int64 zeros (1, G)."""
    return new_gaps(1)


def count_slack_(budget_1G: Tensor, slack_TK: Tensor, valid_T: Tensor | None = None) -> None:
    """Add one training forward to ``budget_1G``, in place; see `count_gaps_`.

    Args:
        budget_1G: From `new_budget`, on the device of the scores.
        slack_TK: How far the level may fall before each expert is left out; fp32, positive where it is used.
        valid_T: bool, True for tokens that count; None when all do.
    """
    top_k = slack_TK.shape[-1]
    valid_P = None if valid_T is None else valid_T.reshape(-1, 1).expand(-1, top_k).reshape(-1)
    # Experts that are used at any level are in the last bin, like others far from the level.
    count_gaps_(budget_1G, slack_TK.reshape(-1, 1).nan_to_num(), valid_P)


def level_step(budget_1G: Tensor, tokens: Tensor, target_k: float) -> Tensor:
    """Return how far to move the level; fp32 scalar, 0 if the target was met or nothing was counted.

    Args:
        budget_1G: The histogram of the step over all ranks; int64 (1, G).
        tokens: Its tokens; int64 scalar.
        target_k: Experts per token, on average.
    """
    wanted_1 = (tokens.double() * target_k).reshape(1)
    return -RATE * balanced_gap(budget_1G, wanted_1).float().squeeze(0)
