"""Sites of one kind, whose biases are moved together: an operation on sixty layers costs what it costs on one.

Shape legend: L sites of a group, E experts, S slots of a tally, G bins of a histogram of gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.attach.site import Site
from moe_plugin.balancing.budget import level_step
from moe_plugin.balancing.counts import SPREAD_UNIT, expert_counts, num_rejected, num_seen, spread_sum
from moe_plugin.balancing.memories import remember_, stacked
from moe_plugin.balancing.rate import resolve_rate
from moe_plugin.balancing.rules import Load, Memory, Rule
from moe_plugin.balancing.tally import settle_
from moe_plugin.errors import ConfigError

SPREAD = "score_spread"
"""Key of the last measured spread of the scores in a site's memory."""


@dataclass(frozen=True)
class SiteGroup:
    """Sites with the same numbers, device and rule.

    Attributes:
        sites: At least one.
        rule: Their rule; None if they are only watched.
        memories: The memory of each site.
    """

    sites: Sequence[Site]
    rule: Rule | None
    memories: Sequence[Memory]

    def take(self) -> GroupStep:
        """Return what this rank has counted since the last call; all counting restarts from zero."""
        counters = [site.counters for site in self.sites]
        settle_([each.training for each in counters])
        slots = [each.training.slots_S for each in counters]
        gaps = [each.gaps_EG for each in counters if each.gaps_EG is not None]
        budgets = [each.budget_1G for each in counters if each.budget_1G is not None]
        step = GroupStep(self, torch.stack(slots), _stacked(gaps), _stacked(budgets))
        torch._foreach_zero_([*slots, *gaps, *budgets])  # pyright: ignore[reportPrivateImportUsage]
        return step


class GroupStep:
    """What the sites of a group have counted in one step, and the moves that follow from it.

    The counts are this rank's until `counted` is summed over ranks in place. Then the step is rejected or applied.
    """

    def __init__(
        self, group: SiteGroup, slots_LS: Tensor, gaps_LEG: Tensor | None, budget_L1G: Tensor | None
    ) -> None:
        """Own the counts.

        Args:
            group: Whose step it is.
            slots_LS: See `moe_plugin.balancing.counts`; int64.
            gaps_LEG: How far scores were from being selected, if the rule needs it; int64.
            budget_L1G: How far selected experts were from being left out, if their number varies; int64.
        """
        self.group = group
        self._slots_LS, self._gaps_LEG, self._budget_L1G = slots_LS, gaps_LEG, budget_L1G

    def counted(self) -> list[Tensor]:
        """Return the counts, to be summed over ranks in place."""
        return [each for each in (self._slots_LS, self._gaps_LEG, self._budget_L1G) if each is not None]

    def num_rejected(self) -> Tensor:
        """Return how many values that must be finite were not; int64 scalar."""
        return num_rejected(self._slots_LS).sum()

    def reject_if_(self, condition: Tensor) -> None:
        """Count no tokens in this step if ``condition``, a bool scalar, holds: then `apply_` moves nothing."""
        self._slots_LS.masked_fill_(condition, 0)

    def num_seen(self) -> dict[str, int]:
        """Return how many selections each site saw, masked ones too."""
        return {name: int(seen) for name, seen in self._by_site(num_seen(self._slots_LS)).items()}

    def counts(self) -> dict[str, Tensor]:
        """Return the tokens per routed expert by site; int64 (E,)."""
        return self._by_site(expert_counts(self._slots_LS)[:, : self._first.num_routed])

    def tokens(self) -> dict[str, Tensor]:
        """Return the tokens by site; int64 scalars."""
        return self._by_site(self._tokens_L())

    def apply_(self, factor: float, *, measures_spread: bool) -> None:
        """Move every bias by the rule, and the level of routers that have one.

        Args:
            factor: The schedule's, on the rate.
            measures_spread: Whether to first remember the spread of the scores, if ``rate: auto`` needs it.
        """
        if self.group.rule is not None and factor:
            if measures_spread and self._first.counters.measures_spread:
                self._remember_spread_()
            self._move_biases_(self.group.rule, factor)
        if self._budget_L1G is not None:
            self._move_levels_(self._budget_L1G)

    def check_rule(self) -> None:
        """Check that the rule steps each site as it would alone.

        Raises:
            ConfigError: If it does not.
        """
        rule = self.group.rule
        if rule is None or len(self.group.sites) == 1:
            return
        # Most sites see equally many tokens, which would hide a mean over all of them.
        times_L1 = torch.arange(1, len(self.group.sites) + 1, device=self._slots_LS.device)[:, None]
        load, memory = self._load(self._slots_LS * times_L1), stacked(self.group.memories)
        together_LE = rule.step(load, 1.0, dict(memory))
        for row, together_E in enumerate(together_LE):
            alone_E = rule.step(load.of(row), 1.0, {key: value[row] for key, value in memory.items()})
            if not torch.allclose(alone_E, together_E, rtol=1e-6):
                raise ConfigError(
                    "rule",
                    "must step each site as it would alone, but sites given together change each other's step",
                    rule,
                    "Take sums and means over the last dimension only: 'load.counts_E' is (..., E).",
                )

    @property
    def _first(self) -> Site:
        return self.group.sites[0]

    def _tokens_L(self) -> Tensor:  # noqa: N802 (shape suffix)
        return self._first.counters.tokens_in(self._slots_LS)

    def _remember_spread_(self) -> None:
        tokens_L = self._tokens_L()
        fresh_L = (spread_sum(self._slots_LS) / tokens_L.clamp(min=1) / SPREAD_UNIT).float()
        memories = self.group.memories
        remember_(memories, stacked(memories), {SPREAD: fresh_L}, tokens_L > 0)

    def _move_biases_(self, rule: Rule, factor: float) -> None:
        memories = self.group.memories
        load, before = self._load(self._slots_LS), stacked(memories)
        memory = dict(before)
        spread_L = before[SPREAD] if SPREAD in before else load.bias_E.new_zeros(len(memories))
        step_LE = rule.step(load, resolve_rate(rule, spread_L[:, None]) * factor, memory)
        moves_L = load.counts_E.sum(-1) > 0
        moved_LE = load.bias_E + step_LE.where(moves_L[:, None], 0.0)
        biases, moved = [site.bias for site in self.group.sites], list(moved_LE.float().unbind())
        torch._foreach_copy_(biases, moved)  # pyright: ignore[reportPrivateImportUsage]
        remember_(memories, before, memory, moves_L)

    def _move_levels_(self, budget_L1G: Tensor) -> None:
        for site, budget_1G, tokens in zip(self.group.sites, budget_L1G, self._tokens_L(), strict=True):
            allocation = site.allocation
            assert allocation is not None, "only routers that allocate experts have a budget"
            assert allocation.level is not None, "only routers with a level have a budget"
            step = level_step(budget_1G, tokens, allocation.target_k)
            allocation.level.add_(step.where(tokens > 0, 0.0))

    def _load(self, slots_LS: Tensor) -> Load:
        bias_LE = torch.stack([site.bias for site in self.group.sites])
        shares = [site.counters.shares_E for site in self.group.sites if site.counters.shares_E is not None]
        return Load(expert_counts(slots_LS), bias_LE, self._gaps_LEG, _stacked(shares))

    def _by_site(self, values_L: Tensor) -> dict[str, Tensor]:
        return {site.name: value for site, value in zip(self.group.sites, values_L.unbind(), strict=True)}


def site_groups(
    sites: Sequence[Site], rules: Mapping[str, Rule | None], memories: Mapping[str, Memory]
) -> list[SiteGroup]:
    """Group sites that can be moved together.

    Args:
        sites: The sites of a model.
        rules: The rule of each, by name.
        memories: The memory of each, by name.
    """
    alike: dict[tuple, list[Site]] = {}
    for site in sites:
        counters, numbers = site.counters, (site.num_experts, site.num_routed, site.top_k)
        has = tuple(each is not None for each in (counters.gaps_EG, counters.budget_1G, counters.shares_E))
        alike.setdefault((numbers, has, counters.device, id(rules[site.name])), []).append(site)
    return [
        SiteGroup(each, rules[each[0].name], [memories[site.name] for site in each])
        for each in alike.values()
    ]


def _stacked(tensors: list[Tensor]) -> Tensor | None:
    return torch.stack(tensors) if tensors else None
