"""Sites that differ in nothing but their numbers, and whose biases are therefore moved together.

One operation for sixty layers costs what it costs for one. Shape legend: L sites of a group, E experts, S slots of a
tally, G bins of a histogram of gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_plugin.attach.site import Site
from moe_plugin.balancing.budget import level_step
from moe_plugin.balancing.counts import SPREAD_UNIT
from moe_plugin.balancing.memories import remember_, stacked
from moe_plugin.balancing.rate import resolve_rate
from moe_plugin.balancing.rules import Load, Memory, Rule
from moe_plugin.balancing.tally import settle_
from moe_plugin.errors import ConfigError

SPREAD = "score_spread"
"""Key of the last measured spread of the scores in what is remembered of a site."""


class Counted(NamedTuple):
    """What the sites of a group have counted in a step; all int64.

    Attributes:
        slots_LS: See `moe_plugin.balancing.counts`.
        gaps_LEG: How far scores were from being selected, where the rule needs it.
        budget_L1G: How far selected experts were from being left out, where their number varies.
    """

    slots_LS: Tensor
    gaps_LEG: Tensor | None
    budget_L1G: Tensor | None


@dataclass(frozen=True)
class SiteGroup:
    """Sites with the same numbers, device and rule.

    Attributes:
        sites: At least one.
        rule: Their rule; None where they are only watched.
        memories: What is remembered of each site.
    """

    sites: Sequence[Site]
    rule: Rule | None
    memories: Sequence[Memory]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.sites[0].num_experts

    def take(self) -> Counted:
        """Return what this rank has counted since the last call; all counting restarts from zero."""
        settle_([site.tally for site in self.sites])
        counts = [(site.tally.slots_S, site.gaps_EG, site.budget_1G) for site in self.sites]
        slots, gaps, budgets = (
            [each for each in column if each is not None] for column in zip(*counts, strict=True)
        )
        counted = Counted(torch.stack(slots), _stacked(gaps), _stacked(budgets))
        torch._foreach_zero_([*slots, *gaps, *budgets])  # pyright: ignore[reportPrivateImportUsage]
        return counted

    def num_rejected(self, counted: Counted) -> Tensor:
        """Return how often something was NaN or infinite that must not be; int64 scalar."""
        return (counted.slots_LS[:, self.num_experts] + counted.slots_LS[:, self.num_experts + 4]).sum()

    def num_seen(self, counted: Counted) -> Tensor:
        """Return selections that each site saw, masked ones too; int64 (L,)."""
        return counted.slots_LS[:, : self.num_experts + 2].sum(-1)

    def counts(self, counted: Counted) -> dict[str, Tensor]:
        """Return tokens per routed expert by site; int64 (E,)."""
        return self._by_name(counted.slots_LS[:, : self.sites[0].num_routed])

    def tokens(self, counted: Counted) -> dict[str, Tensor]:
        """Return tokens by site; int64 scalars."""
        return self._by_name(self.sites[0].tokens_in(counted.slots_LS))

    def measure_spread_(self, counted: Counted) -> None:
        """Remember the spread of the scores, where tokens were seen and it is needed."""
        if not self.sites[0].measures_spread:
            return
        tokens_L = self.sites[0].tokens_in(counted.slots_LS)
        fresh_L = (counted.slots_LS[:, self.num_experts + 3] / tokens_L.clamp(min=1) / SPREAD_UNIT).float()
        remember_(self.memories, stacked(self.memories), {SPREAD: fresh_L}, tokens_L > 0)

    def move_biases_(self, counted: Counted, factor: float) -> None:
        """Move every bias by the rule.

        Args:
            counted: Of all ranks; zeros if the step must not count.
            factor: The schedule's.
        """
        if self.rule is None or factor == 0:
            return
        load, before = self._load(counted), stacked(self.memories)
        memory = dict(before)
        step_LE = self.rule.step(load, self._rate(before) * factor, memory)
        moves_L = load.counts_E.sum(-1) > 0
        moved_LE = load.bias_E + step_LE.where(moves_L[:, None], 0.0)
        biases, moved = [site.bias for site in self.sites], list(moved_LE.float().unbind())
        torch._foreach_copy_(biases, moved)  # pyright: ignore[reportPrivateImportUsage]
        remember_(self.memories, before, memory, moves_L)

    def check_rule(self, counted: Counted) -> None:
        """Look whether the rule steps each site by itself, as it would alone.

        Raises:
            ConfigError: If it does not.
        """
        if self.rule is None or len(self.sites) == 1:
            return
        # Sites mostly see as many tokens, which would hide a mean over all of them.
        times_L1 = torch.arange(1, len(self.sites) + 1, device=counted.slots_LS.device)[:, None]
        load, memory = (
            self._load(counted._replace(slots_LS=counted.slots_LS * times_L1)),
            stacked(self.memories),
        )
        together_LE = self.rule.step(load, 1.0, dict(memory))
        for row, together_E in enumerate(together_LE):
            alone = {key: value[row] for key, value in memory.items()}
            step_E = self.rule.step(load.of(row), 1.0, alone)
            if not torch.allclose(step_E, together_E, rtol=1e-6):
                raise ConfigError(
                    f"The step of {self.rule!r} must be that of each site alone, but sites given together change each "
                    "other's. Take sums and means over the last dimension only: 'load.counts_E' is (..., E)."
                )

    def hold_budgets_(self, counted: Counted) -> None:
        """Move the level of dynamic routers, whether their experts are balanced or only watched."""
        if counted.budget_L1G is None:
            return
        tokens_L = self.sites[0].tokens_in(counted.slots_LS)
        for site, budget_1G, tokens in zip(self.sites, counted.budget_L1G, tokens_L, strict=True):
            assert site.dynamic is not None, "only dynamic routers have a budget"
            step = level_step(budget_1G, tokens, site.dynamic.target_k)
            site.dynamic.level.add_(step.where(tokens > 0, 0.0))

    def _load(self, counted: Counted) -> Load:
        bias_LE = torch.stack([site.bias for site in self.sites])
        shares_LE = _stacked([site.shares_E for site in self.sites if site.shares_E is not None])
        return Load(counted.slots_LS[:, : self.num_experts], bias_LE, counted.gaps_LEG, shares_LE)

    def _rate(self, memory: Memory) -> float | Tensor:
        assert self.rule is not None, "sites without a rule are not moved"
        device = self.sites[0].tally.slots_S.device
        spread_L = memory[SPREAD] if SPREAD in memory else torch.zeros(len(self.sites), device=device)
        return resolve_rate(self.rule, spread_L[:, None])

    def _by_name(self, values_L: Tensor) -> dict[str, Tensor]:
        return {site.name: value for site, value in zip(self.sites, values_L.unbind(), strict=True)}


def _stacked(tensors: list[Tensor]) -> Tensor | None:
    return torch.stack(tensors) if tensors else None


def site_groups(
    sites: Sequence[Site], rules: Mapping[str, Rule | None], memories: Mapping[str, Memory]
) -> list[SiteGroup]:
    """Put sites together that can be moved together."""
    alike: dict[tuple, list[Site]] = {}
    for site in sites:
        counted = site.gaps_EG is not None, site.budget_1G is not None, site.shares_E is not None
        numbers = site.num_experts, site.num_routed, site.top_k
        alike.setdefault((numbers, counted, site.tally.slots_S.device, id(rules[site.name])), []).append(site)
    return [
        SiteGroup(each, rules[each[0].name], [memories[site.name] for site in each])
        for each in alike.values()
    ]
