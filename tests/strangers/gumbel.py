"""A generator of noise that several repositories keep in a global map, one per device."""

from __future__ import annotations

import torch

gumbel_map: dict = {}


def gumbel_rsample(shape, device):
    gumbel = gumbel_map.get(device)
    if gumbel is None:
        zero, one = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)
        gumbel = torch.distributions.gumbel.Gumbel(zero, one).rsample
        gumbel_map[device] = gumbel
    return gumbel(shape)


def drawn(shape):
    """Return the same noise for the same seed, from no map."""
    return torch.distributions.gumbel.Gumbel(0.0, 1.0).rsample(shape)
