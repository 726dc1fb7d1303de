"""Move every bias towards the one that would have balanced the last step.

Shape legend: E experts, G bins of a histogram of gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_plugin.balancing.check import check_fraction
from moe_plugin.balancing.gaps import gap_edges
from moe_plugin.balancing.rules.load import Load, centred
from moe_plugin.balancing.rules.rule import Memory


@dataclass(frozen=True)
class Quantile:
    """Quantile balancing: Kimi K3, section 4.3 (equation 14), after Jianlin Su, kexue.fm/archives/11619.

    With alpha_t the (k+1)-th largest biased score of token t, expert i is used by the tokens whose score exceeds
    ``alpha_t - b_i``. The bias under which that are ``T k / E`` tokens, were the alphas to stay, is::

        b*_i = -quantile_{1 - k / E}(s_ti - alpha_t),  centred over the experts
        b_i += rate * (b*_i - b_i)

    Quantiles are read from a histogram with fixed bins of the biased gaps ``s_ti + b_i - alpha_t``, so that they are
    exactly the same on all ranks; the bins are narrow at 0, where selection changes, in proportion to their distance
    from it. Where any value in an interval is the quantile, the one nearest to the present bias is taken, so that a
    balanced load changes nothing.

    Attributes:
        rate: Share of the way to go in one step, 1 for all of it as in the paper; less evens out the noise of batches.
    """

    needs_gaps: ClassVar[bool] = True

    rate: float = 0.2

    def __post_init__(self) -> None:
        """Check the rate.

        Raises:
            ConfigError: If it is not between 0 and 1.
        """
        check_fraction("rate", self.rate, with_one=True)

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """A share of the way to the balanced bias, see `Rule.step`."""
        assert load.gaps_EG is not None, "a rule that needs gaps is given them"
        return rate * centred(-balanced_gap(load.gaps_EG, load.mean_1))


def balanced_gap(gaps_EG: Tensor, share_1: Tensor) -> Tensor:
    """The biased gap above which each expert has ``share_1`` tokens, nearest to 0 where there are several.

    Args:
        gaps_EG: Histogram; int64 (..., E, G).
        share_1: Tokens per expert; float64 (..., 1).

    Returns:
        float64 (..., E); 0 where the histogram is empty.
    """
    edges = gap_edges(gaps_EG.device).double()
    lower_G, upper_G = torch.cat([edges[:1], edges]), torch.cat([edges, edges[-1:]])
    above_EG = gaps_EG.flip(-1).cumsum(-1).flip(-1)
    all_E1 = above_EG[..., :1]
    share_E1 = torch.minimum(share_1[..., None], all_E1.double())

    def at(reached_EG: Tensor) -> Tensor:
        bin_E1 = (reached_EG.sum(-1, keepdim=True) - 1).clamp(min=0)
        inside_E1 = gaps_EG.gather(-1, bin_E1)
        part_E1 = (share_E1 - (above_EG.gather(-1, bin_E1) - inside_E1)) / inside_E1.clamp(min=1)
        return torch.lerp(upper_G[bin_E1], lower_G[bin_E1], part_E1.clamp(0, 1))

    most_E1, least_E1 = at(above_EG >= share_E1), at(above_EG > share_E1)
    least_E1 = torch.where(all_E1 > share_E1, least_E1, edges[0])
    nearest_E1 = torch.zeros_like(most_E1).clamp(least_E1, most_E1)
    return torch.where(all_E1 > 0, nearest_E1, 0.0).squeeze(-1)
