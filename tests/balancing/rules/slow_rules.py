"""The rules once more, from their papers, in plain Python: one expert after another, floats and fractions."""

from __future__ import annotations

import math
from fractions import Fraction


def errors(counts):
    mean = Fraction(sum(counts), len(counts))
    return [float((mean - c) / mean) if mean else 0.0 for c in counts]


def signs(counts):
    mean = Fraction(sum(counts), len(counts))
    return [(mean > c) - (mean < c) for c in counts]


def centred(values):
    mean = sum(values) / len(values)
    return [value - mean for value in values]


class Sign:
    def __init__(self, experts):
        self.bias = [0.0] * experts

    def update(self, counts, rate):
        found = signs(counts)
        mean = Fraction(sum(found), len(found))
        self.bias = [b + rate * float(s - mean) for b, s in zip(self.bias, found, strict=True)]


class Proportional(Sign):
    def update(self, counts, rate):
        self.bias = [b + rate * e for b, e in zip(self.bias, errors(counts), strict=True)]


class Multiplicative:
    def __init__(self, experts):
        self.factors = [1.0] * experts

    @property
    def bias(self):
        return [math.log(factor) for factor in self.factors]

    def update(self, counts, rate):
        moved = [m + rate * s for m, s in zip(self.factors, signs(counts), strict=True)]
        geometric_mean = math.exp(sum(map(math.log, moved)) / len(moved))
        self.factors = [m / geometric_mean for m in moved]


class Momentum(Sign):
    def __init__(self, experts):
        super().__init__(experts)
        self.momentum = [0.0] * experts

    def update(self, counts, rate):
        fresh = centred([rate * math.tanh(2 * e) for e in errors(counts)])
        self.momentum = [0.5 * m + 0.5 * d for m, d in zip(self.momentum, fresh, strict=True)]
        self.bias = [b + m for b, m in zip(self.bias, self.momentum, strict=True)]


class PID(Sign):
    def __init__(self, experts):
        super().__init__(experts)
        self.sums = self.last = [0.0] * experts

    def update(self, counts, rate):
        found = errors(counts)
        self.sums = [max(-10.0, min(10.0, s + e)) for s, e in zip(self.sums, found, strict=True)]
        changes = [e - last for e, last in zip(found, self.last, strict=True)]
        terms = zip(found, self.sums, changes, strict=True)
        steps = centred([e + 0.05 * s + 0.25 * change for e, s, change in terms])
        self.bias = [b + rate * step for b, step in zip(self.bias, steps, strict=True)]
        self.last = found


class PrimalDual(Sign):
    number = 0

    def update(self, counts, rate):
        self.number += 1
        size = rate / math.sqrt(self.number)
        self.bias = [b + size * e for b, e in zip(self.bias, errors(counts), strict=True)]


class Adaptive(Sign):
    def __init__(self, experts):
        super().__init__(experts)
        self.states = [(0.0, 0.0, 0.0, 0.05)] * experts

    def update(self, counts, rate):
        found = centred([max(-2.0, min(2.0, e)) for e in errors(counts)])
        self.states = [self.advanced(e, *state) for e, state in zip(found, self.states, strict=True)]
        steps = centred([state[3] * e for e, state in zip(found, self.states, strict=True)])
        self.bias = [b + rate * step for b, step in zip(self.bias, steps, strict=True)]

    @staticmethod
    def advanced(e, p, h, q, g):
        p = 0.9 * p + 0.1 * e**2 if p else e**2
        alike = e * h / math.sqrt(p * q) if p * q else 0.0
        g = max(0.002, min(1.0, g * math.exp(0.1 * max(-1.0, min(1.0, alike)))))
        h = (1 - g) * h + e
        return p, h, 0.9 * q + 0.1 * h**2, g


def quantile_step(histograms, edges, share):
    """The centred step of the quantile rule at rate 1, from a list of counts by bin for each expert."""
    lower, upper = [edges[0], *edges], [*edges, edges[-1]]

    def crossing(histogram, wanted, strictly):
        above = 0
        for place in reversed(range(len(histogram))):
            inside = histogram[place]
            if above + inside > wanted or (not strictly and above + inside == wanted):
                part = (wanted - above) / max(inside, 1)
                return upper[place] + part * (lower[place] - upper[place])
            above += inside
        return edges[0]

    steps = []
    for histogram in histograms:
        wanted = min(share, sum(histogram))
        most, least = crossing(histogram, wanted, False), crossing(histogram, wanted, True)
        steps.append(-min(max(0.0, least), most) if sum(histogram) else 0.0)
    return centred(steps)
