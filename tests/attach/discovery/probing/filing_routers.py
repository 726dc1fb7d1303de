"""Routers that keep something outside of themselves, each in another place, as public code does.

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache

import torch
from torch.distributions.gumbel import Gumbel
from torch.nn import functional

from tests.attach.discovery.wild_block import E, OfLogits, Wild


class _Losses:
    """What nanoMoE's MANAGER is: collects the losses of all layers until training takes them."""

    def __init__(self):
        self.by_name = {"balance": []}

    def add(self, loss):
        self.by_name["balance"].append(loss)


class Config:
    """What all layers of a model share."""

    def __init__(self):
        self.seen = {}


def _collector():
    losses = []

    def collect(loss):
        losses.append(loss)
        return losses

    return collect


MANAGER = _Losses()
LOSSES = []
NOISE = {}
CONFIG = Config()
LAST_LOSS = None
CALLS = 0
HIDDEN = threading.local()
collect = _collector()


class Filing(Wild):
    """Files a loss, as training code expects it."""

    def gates(self, scores_TE):
        self.file(scores_TE.square().mean())
        return super().gates(scores_TE)


class InManager(Filing):
    def file(self, loss):
        MANAGER.add(loss)

    @staticmethod
    def filed():
        return MANAGER.by_name["balance"]


class InGlobalList(Filing):
    def file(self, loss):
        LOSSES.append(loss)

    @staticmethod
    def filed():
        return LOSSES


class InClass(Filing):
    losses = []  # noqa: RUF012  shared by all layers, on purpose

    def file(self, loss):
        self.losses.append(loss)

    @classmethod
    def filed(cls):
        return cls.losses


class InNewClassAttribute(Filing):
    last = None

    def file(self, loss):
        InNewClassAttribute.last = loss

    @classmethod
    def filed(cls):
        return [] if cls.last is None else [cls.last]


class InClosure(Filing):
    def file(self, loss):
        collect(loss)

    @staticmethod
    def filed():
        return collect.__closure__[0].cell_contents


def file_in_default(loss, losses=[]):  # noqa: B006  the default is the place
    losses.append(loss)


class InDefault(Filing):
    def file(self, loss):
        file_in_default(loss)

    @staticmethod
    def filed():
        return file_in_default.__defaults__[0]


def file_on_function(loss):
    file_on_function.losses = [*getattr(file_on_function, "losses", []), loss]


class OnFunction(Filing):
    def file(self, loss):
        file_on_function(loss)

    @staticmethod
    def filed():
        return getattr(file_on_function, "losses", [])


class InGlobalName(Filing):
    def file(self, loss):
        global LAST_LOSS
        LAST_LOSS = loss

    @staticmethod
    def filed():
        return [] if LAST_LOSS is None else [LAST_LOSS]


class InConfig(Filing):
    """Every layer holds the same config."""

    def __init__(self):
        super().__init__()
        self.config = CONFIG

    def file(self, loss):
        self.config.seen[len(self.config.seen)] = loss

    @staticmethod
    def filed():
        return list(CONFIG.seen.values())


class OnParameter(Filing):
    def file(self, loss):
        self.gate.weight.losses = [*self.filed_here(), loss]

    def filed_here(self):
        return getattr(self.gate.weight, "losses", [])


class CountsCalls(Wild):
    def gates(self, scores_TE):
        global CALLS
        CALLS += 1
        return super().gates(scores_TE)


@lru_cache
def positions(num_tokens):
    return torch.arange(num_tokens, dtype=torch.float32)[:, None] / num_tokens


class CachesTensor(OfLogits):
    """Ranks scores with a constant that it computes once per number of tokens."""

    def scores(self, x_TD):
        return self.gate(x_TD) + positions(len(x_TD)).tile(1, E).cumsum(1)


def gumbel_like(scores_TE):
    """Return noise of a distribution that is made once per device, as DeepSpeed and torchscale do."""
    device = scores_TE.device
    if device not in NOISE:
        zero, one = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)
        NOISE[device] = Gumbel(zero, one).rsample
    return NOISE[device](scores_TE.shape)


class NoisyTopK(Wild):
    def choose(self, scores_TE):
        return super().choose(scores_TE + gumbel_like(scores_TE))


class NoisySecond(Wild):
    """GShard's top-2 gate: the second expert is drawn, by a maximum under noise."""

    def scores(self, x_TD):
        return self.gate(x_TD)

    def gates(self, scores_TE):
        first_TE = functional.one_hot(scores_TE.argmax(dim=1), E)
        noisy_TE = scores_TE + Gumbel(torch.zeros_like(scores_TE), torch.ones_like(scores_TE)).rsample()
        second_TE = functional.one_hot(noisy_TE.masked_fill(first_TE.bool(), -torch.inf).argmax(dim=1), E)
        return scores_TE.softmax(-1) * (first_TE + second_TE)


class InThread(Filing):
    def file(self, loss):
        HIDDEN.loss = loss


class InBuiltinModule(Filing):
    def file(self, loss):
        math.loss = loss
