"""One rule on one source of scores.

Shape legend: N tokens of the population, E experts, K experts selected per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from moe_plugin.apps.simulate.sources import Source
from moe_plugin.balancing.gaps import count_gaps_, gaps_of, new_gaps
from moe_plugin.balancing.rate import resolve_rate
from moe_plugin.balancing.rules import Load, Rule
from moe_plugin.errors import ConfigError
from moe_plugin.metrics import max_violation
from moe_plugin.number_checks import check_integer, check_positive_integers
from moe_plugin.routing import Score

POPULATION = 1024
"""Tokens that batches are drawn from, if experts are few."""
PER_EXPERT = 32
"""Selections per expert that the population should have, so loads are not coarse."""
LARGEST = 2**22
"""Most scores of a population; they are ranked in a few hundredths of a second."""
BALANCED = 0.1
"""MaxVio below which a load counts as balanced."""
TAIL = 0.3
"""Share of the steps, at the end, over which the settled rule is measured."""


@dataclass(frozen=True)
class Setting:
    """The sizes of a trial, without the source.

    Attributes:
        num_experts: E.
        top_k: K.
        tokens: Tokens in a batch.
        steps: Batches.
        score: Logits to scores.
        seed: Of the source.
    """

    num_experts: int
    top_k: int
    tokens: int
    steps: int
    score: Score
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If one is out of range.
        """
        check_positive_integers(
            num_experts=self.num_experts, top_k=self.top_k, tokens=self.tokens, steps=self.steps
        )
        check_integer("seed", self.seed, least=0)
        if not hasattr(self.score, "scores"):
            raise ConfigError(
                "score", "must be a score function, such as moe_plugin.routing.Sigmoid", self.score
            )
        if self.top_k >= self.num_experts:
            raise ConfigError("top_k", f"must be < num_experts ({self.num_experts})", self.top_k)

    def __str__(self) -> str:
        """Return the setting in one line."""
        kind = type(self.score).__name__
        return f"{self.num_experts} experts, top-{self.top_k}, {self.tokens:,} tokens a batch, {kind} scores"

    @property
    def floor(self) -> float:
        """MaxVio of a batch under perfectly balanced probabilities: about the largest of E random deviations."""
        share = self.top_k / self.num_experts
        return math.sqrt(2 * math.log(self.num_experts) * (1 - share) / (share * self.tokens))

    @property
    def population(self) -> int:
        """Tokens of the population."""
        wanted = max(POPULATION, PER_EXPERT * self.num_experts // self.top_k)
        return min(wanted, LARGEST // self.num_experts)


@dataclass(frozen=True)
class Trial:
    """The measures of a rule on a source.

    Attributes:
        batch: MaxVio of each batch.
        expected: MaxVio of the whole population under the bias of each step: a batch without its noise.
        steps_to_balance: Steps until `expected` is below `BALANCED`; None if it never is.
        tail_batch: Mean of `batch` over the last steps.
        tail_expected: Mean of `expected` over the last steps.
        oscillation: How far a bias moves in a step, mean over the last steps, in spreads of the scores.
        bias_range: Largest minus smallest bias at the end, in spreads of the scores.
    """

    batch: list[float]
    expected: list[float]
    steps_to_balance: int | None
    tail_batch: float
    tail_expected: float
    oscillation: float
    bias_range: float


@torch.no_grad()
def try_rule(rule: Rule, source: Source, setting: Setting) -> Trial:
    """Run a rule on a source.

    Args:
        rule: The rule.
        source: What it follows.
        setting: The sizes.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    stream = source.start(setting.population, setting.num_experts, generator)
    bias_E, memory = torch.zeros(setting.num_experts), {}
    batch, expected, moves, spread = [], [], [], torch.tensor(0.0)
    for step in range(1, setting.steps + 1):
        scores_NE = setting.score.scores(stream.logits_NE())
        spread = scores_NE.std(-1, correction=0).mean()
        drawn_N = stream.draw_N(setting.tokens)
        ids_NK = (scores_NE + bias_E).topk(setting.top_k, sorted=False).indices
        counts_E = _counts(ids_NK, setting.num_experts, drawn_N)
        expected.append(max_violation(_counts(ids_NK, setting.num_experts)).item())
        batch.append(max_violation(counts_E).item())
        load = Load(counts_E, bias_E, _gaps(rule, scores_NE + bias_E, setting.top_k, drawn_N))
        step_E = rule.step(load, resolve_rate(rule, spread), memory).float()
        bias_E = bias_E + step_E
        moves.append(step_E.abs().mean().item())
        stream.advance_(step, counts_E)
    return _measured(batch, expected, moves, bias_E, spread.item())


def _measured(
    batch: list[float], expected: list[float], moves: list[float], bias_E: Tensor, spread: float
) -> Trial:
    last = slice(-max(1, round(TAIL * len(batch))), None)
    return Trial(
        batch,
        expected,
        next((step for step, violation in enumerate(expected) if violation < BALANCED), None),
        fmean(batch[last]),
        fmean(expected[last]),
        fmean(moves[last]) / spread,
        float(bias_E.max() - bias_E.min()) / spread,
    )


def _counts(ids_NK: Tensor, num_experts: int, drawn_N: Tensor | None = None) -> Tensor:
    """Return tokens per expert; int64 (E,)."""
    ones_NK = torch.ones_like(ids_NK) if drawn_N is None else drawn_N[:, None].expand_as(ids_NK)
    return ids_NK.new_zeros(num_experts).scatter_add_(0, ids_NK.flatten(), ones_NK.flatten())


def _gaps(rule: Rule, biased_NE: Tensor, top_k: int, drawn_N: Tensor) -> Tensor | None:
    if not getattr(rule, "needs_gaps", False):
        return None
    gaps_EG = new_gaps(biased_NE.shape[-1])
    if top_k < biased_NE.shape[-1]:
        with torch.enable_grad():  # without gradients it would not count as a training forward
            count_gaps_(gaps_EG, gaps_of(biased_NE, top_k), drawn_N)
    return gaps_EG
