"""The state of a routing site over the last windows of training steps.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor

from moe_plugin.metrics.window import LayerLoad


@dataclass(frozen=True)
class SiteWindow:
    """A site in one window; the same on every rank.

    Attributes:
        step: The optimizer step at the window's end.
        load: The load over the window.
        bias_range: Largest minus smallest bias at its end.
        score_range: Largest minus smallest score of a token, mean over the tokens that were looked at, if any.
        scores_are_finite: Whether no score that was looked at is NaN.
        rejected_steps: Steps in which no site counted a token, because a loss or score was NaN or infinite.
        ranks_agree: Whether the bias is the same on every rank, to the bit.
    """

    step: int
    load: LayerLoad
    bias_range: float
    score_range: float | None = None
    scores_are_finite: bool = True
    rejected_steps: int = 0
    ranks_agree: bool = True


@dataclass
class SiteHistory:
    """The last windows of one site.

    Attributes:
        num_experts: E.
        top_k: Experts per token.
        steps_kept: How far back the history reaches, in optimizer steps.
        windows: The oldest first; only the last has its tokens per expert.
        idle_steps_E: Steps since each expert's last token, to the precision of a window; int64 (E,).
    """

    num_experts: int
    top_k: int
    steps_kept: int
    windows: list[SiteWindow] = field(default_factory=list)
    idle_steps_E: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start without idle steps."""
        self.idle_steps_E = torch.zeros(self.num_experts, dtype=torch.int64)

    @property
    def last(self) -> SiteWindow:
        """The latest window."""
        return self.windows[-1]

    def add_(self, window: SiteWindow) -> None:
        """Add a window."""
        if self.windows:
            self.windows[-1] = replace(self.last, load=replace(self.last.load, tokens_per_expert=()))
        self.windows.append(window)
        while len(self.windows) > 1 and self._age(1) >= self.steps_kept:
            del self.windows[0]
        counted = window.load.steps - window.load.empty_steps
        tokens_E = torch.tensor(window.load.tokens_per_expert)
        self.idle_steps_E = torch.where(tokens_E > 0, 0, self.idle_steps_E + counted)

    def since(self, steps: int) -> list[SiteWindow]:
        """Return the windows of the last `steps` steps, or [] if the history is shorter."""
        first = next((i for i in reversed(range(len(self.windows))) if self._age(i) >= steps), None)
        return [] if first is None else self.windows[first:]

    def _age(self, place: int) -> int:
        return self.last.step - self.windows[place].step


def mean_violation(windows: Sequence[SiteWindow]) -> float:
    """Return the mean over windows of the MaxVio of a step."""
    return fmean(window.load.max_violation_batch for window in windows)
