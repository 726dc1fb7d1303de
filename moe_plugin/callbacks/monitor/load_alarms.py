"""Alarms about the load: once each, in words, with what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.callbacks.monitor.router_sample import Decisions
from moe_plugin.errors import ConfigError, LoadAlarmError, LoadAlarmWarning
from moe_plugin.metrics.alarms import Alarm, Limits, LoadAlarms
from moe_plugin.metrics.history import SiteHistory, SiteWindow
from moe_plugin.metrics.window import LayerLoad

OnAlarm = Literal["warn", "raise"] | Callable[[Alarm], object] | None


class AlarmWatch:
    """A watch on every site over the windows of a run, which raises the alarms.

    Args:
        on_alarm: 'warn' warns with `LoadAlarmWarning` and 'raise' raises `LoadAlarmError`; a function is called with
            the `Alarm` instead. None turns alarms off. Warnings and calls happen on the first rank only.
        limits: How long is too long.

    Attributes:
        alarms: All alarms so far.

    Raises:
        ConfigError: If `on_alarm` is anything else.
    """

    def __init__(self, on_alarm: OnAlarm, limits: Limits) -> None:
        """Start without any alarm."""
        if on_alarm not in ("warn", "raise", None) and not callable(on_alarm):
            raise ConfigError("on_alarm", "must be 'warn', 'raise', null or a function", on_alarm)
        self.alarms: list[Alarm] = []
        self._on_alarm = on_alarm
        self._limits = limits
        self._checks = LoadAlarms(limits)
        self._sites: dict[str, SiteHistory] = {}

    def window_ends(
        self,
        balanced: BalancedModel,
        loads: Mapping[str, LayerLoad],
        bias_ranges: Mapping[str, float],
        decisions: Mapping[str, Decisions],
        *,
        is_first_rank: bool,
    ) -> list[Alarm]:
        """Take in a window. Every rank must call it, with the same loads.

        Args:
            balanced: The routers.
            loads: The load of each.
            bias_ranges: The range of each one's bias.
            decisions: How those that were looked at decided.
            is_first_rank: Whether this rank warns.

        Returns:
            The new alarms.

        Raises:
            LoadAlarmError: If there are any and `on_alarm` is 'raise'.
        """
        if self._on_alarm is None:
            return []
        rejected = min(load.empty_steps for load in loads.values())
        shared = _shared(balanced, decisions)
        for name, site in balanced.items():
            history = self._sites.setdefault(
                name, SiteHistory(site.num_routed, site.top_k, self._limits.trend_steps)
            )
            history.add_(
                SiteWindow(
                    balanced.step, loads[name], bias_ranges[name], **shared[name], rejected_steps=rejected
                )
            )
        new = self._checks.new(self._sites)
        self.alarms += new
        self._tell(new, is_first_rank)
        return new

    def _tell(self, alarms: list[Alarm], is_first_rank: bool) -> None:
        if self._on_alarm == "raise" and alarms:
            raise LoadAlarmError("\n".join(map(str, alarms)))
        for alarm in alarms if is_first_rank else ():
            if callable(self._on_alarm):
                self._on_alarm(alarm)
            else:
                warnings.warn(str(alarm), LoadAlarmWarning, stacklevel=2)


def _shared(balanced: BalancedModel, decisions: Mapping[str, Decisions]) -> dict[str, dict]:
    """Return what ranks may see differently, combined: the largest score range, any NaN, and any other bias."""
    rows = [_measures(site.bias, decisions.get(name)) for name, site in balanced.items()]
    measures_L4 = torch.stack(rows)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(measures_L4, op=dist.ReduceOp.MAX, group=balanced.process_group)
    return {
        name: {
            "score_range": width if width > 0 else None,
            "scores_are_finite": not nan,
            "ranks_agree": highest == -lowest,
        }
        for name, (width, nan, highest, lowest) in zip(balanced, measures_L4.tolist(), strict=True)
    }


def _measures(bias_E: Tensor, decisions: Decisions | None) -> Tensor:
    """Return four numbers that are combined by their maximum over ranks; float64."""
    if isinstance(bias_E, DTensor):
        bias_E = bias_E.full_tensor()
    bits = bias_E.contiguous().view(torch.int32).double()
    # The place counts too, so swapped biases differ; sums of integers below 2**53 are exact.
    checksum = (bits * (torch.arange(len(bits), device=bits.device) % 61 + 1)).sum()
    width = decisions.score_range if decisions is not None and math.isfinite(decisions.score_range) else 0.0
    nan = decisions is not None and not decisions.are_finite
    known = torch.tensor([width, float(nan)], dtype=torch.float64, device=bits.device)
    return torch.cat([known, checksum.view(1), -checksum.view(1)])
