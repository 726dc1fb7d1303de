"""Sources of made-up router logits, which a rule has to follow.

A source holds a population of tokens. Each step it gives their logits and how often each token is drawn, so a batch of
a million costs hardly more than one of a thousand. Logits are a taste for each expert, plus one of each domain for each
expert, plus noise of standard deviation 1.

Shape legend: N tokens of the population, E experts, G domains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moe_plugin.number_checks import check_integer, check_not_negative


class Source(Protocol):
    """Something that makes the streams of logits that rules are tried on."""

    def start(self, population: int, num_experts: int, generator: torch.Generator) -> Stream:
        """Return a stream from its beginning; the same for the same generator.

        Args:
            population: N.
            num_experts: E.
            generator: Of everything random.
        """
        ...


@dataclass
class Stream:
    """A run of a source.

    Attributes:
        noise_NE: Logits of each token alone.
        taste_E: Logits that all tokens share; they change from step to step.
        domain_N: The domain of each token.
        generator: Of everything random after the start.
        weights_G: How frequent each domain is; equal at first.
    """

    noise_NE: Tensor
    taste_E: Tensor
    domain_N: Tensor
    generator: torch.Generator
    weights_G: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Make all domains equally frequent."""
        self.weights_G = torch.ones(int(self.domain_N.max()) + 1)

    def logits_NE(self) -> Tensor:  # noqa: N802 (shape suffix)
        """Return the logits of the population in this step."""
        return self.noise_NE + self.taste_E

    def draw_N(self, tokens: int) -> Tensor:  # noqa: N802 (shape suffix)
        """Return how often each token of the population is in a batch of ``tokens``; int64."""
        weights_N = self.weights_G[self.domain_N]
        ends_N = weights_N.double().cumsum(0)
        places = torch.rand(tokens, dtype=torch.float64, generator=self.generator) * ends_N[-1]
        ids = torch.searchsorted(ends_N, places).clamp(max=len(ends_N) - 1)
        return torch.bincount(ids, minlength=len(ends_N))

    def advance_(self, step: int, counts_E: Tensor) -> None:
        """Move to the next step.

        Args:
            step: Steps done.
            counts_E: Tokens per expert in the last one.
        """


@dataclass(frozen=True)
class Fixed:
    """A distribution that stays as it is.

    Attributes:
        taste: Standard deviation of the logits that all tokens share.
        domain_taste: Standard deviation of the logits that the tokens of a domain share.
        num_domains: Domains.
    """

    taste: float = 1.0
    domain_taste: float = 0.7
    num_domains: int = 8

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If one is out of range.
        """
        check_not_negative("taste", self.taste)
        check_not_negative("domain_taste", self.domain_taste)
        check_integer("num_domains", self.num_domains)

    def start(self, population: int, num_experts: int, generator: torch.Generator) -> Stream:
        """Return a stream, see `Source.start`."""
        return Stream(*self._parts(population, num_experts, generator))

    def _parts(
        self, population: int, num_experts: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
        domain_N = torch.arange(population) % self.num_domains
        domain_GE = self.domain_taste * torch.randn(self.num_domains, num_experts, generator=generator)
        noise_NE = torch.randn(population, num_experts, generator=generator) + domain_GE[domain_N]
        return noise_NE, self.taste * torch.randn(num_experts, generator=generator), domain_N, generator


@dataclass(frozen=True)
class Drifting(Fixed):
    """Tastes that turn slowly into others and back, as in training.

    Attributes:
        period: Steps of a full turn.
    """

    period: int = 800

    def __post_init__(self) -> None:
        """Check the numbers, see `Fixed`."""
        super().__post_init__()
        check_integer("period", self.period)

    def start(self, population: int, num_experts: int, generator: torch.Generator) -> Stream:
        """Return a stream, see `Source.start`."""
        parts = self._parts(population, num_experts, generator)
        other_E = self.taste * torch.randn(num_experts, generator=generator)
        return _DriftingStream(*parts, other_E=other_E, period=self.period)


@dataclass
class _DriftingStream(Stream):
    other_E: Tensor = field(kw_only=True)
    period: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._first_E = self.taste_E.clone()

    def advance_(self, step: int, counts_E: Tensor) -> None:
        angle = 2 * math.pi * step / self.period
        self.taste_E = math.cos(angle) * self._first_E + math.sin(angle) * self.other_E


@dataclass(frozen=True)
class Bursty(Fixed):
    """Batches of few documents: the mixture of domains jumps from batch to batch.

    Attributes:
        burst: Standard deviation of the logarithm of a domain's weight in a batch; 0 for even mixtures.
    """

    burst: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers, see `Fixed`."""
        super().__post_init__()
        check_not_negative("burst", self.burst)

    def start(self, population: int, num_experts: int, generator: torch.Generator) -> Stream:
        """Return a stream, see `Source.start`."""
        return _BurstyStream(*self._parts(population, num_experts, generator), burst=self.burst)


@dataclass
class _BurstyStream(Stream):
    burst: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.advance_(0, torch.empty(0))

    def advance_(self, step: int, counts_E: Tensor) -> None:
        self.weights_G = (self.burst * torch.randn(self.weights_G.shape, generator=self.generator)).exp()


@dataclass(frozen=True)
class Collapsing(Fixed):
    """A router that prefers the experts it uses more and more, as in training without balancing.

    Attributes:
        feedback: Growth of the taste for an expert in a step in which it has twice the mean load.
    """

    feedback: float = 0.02

    def __post_init__(self) -> None:
        """Check the numbers, see `Fixed`."""
        super().__post_init__()
        check_not_negative("feedback", self.feedback)

    def start(self, population: int, num_experts: int, generator: torch.Generator) -> Stream:
        """Return a stream, see `Source.start`."""
        return _CollapsingStream(*self._parts(population, num_experts, generator), feedback=self.feedback)


@dataclass
class _CollapsingStream(Stream):
    feedback: float = field(kw_only=True)

    def advance_(self, step: int, counts_E: Tensor) -> None:
        excess_E = counts_E / counts_E.float().mean().clamp(min=1) - 1
        self.taste_E = self.taste_E + self.feedback * excess_E.clamp(max=1)
