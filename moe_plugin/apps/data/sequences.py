"""Token streams cut into sequences, each of one domain.

Legend: N sequences, S context length, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Sequences and their labels, grouped by domain.

    Attributes:
        tokens: uint8 or int32 (N, S+1).
        domain: int64 (N,).
    """

    tokens: Tensor
    domain: Tensor

    def batch(self, ids_B: Tensor) -> dict[str, Tensor]:
        """Return `{"tokens": int64 (B, S+1), "domain": int64 (B,)}`."""
        return {"tokens": self.tokens[ids_B].long(), "domain": self.domain[ids_B]}

    def thinned(self, keep: int) -> Sequences:
        """Return at most `keep` sequences: the same mix of domains, evenly spread over each domain's files."""
        if keep >= len(self.domain):
            return self
        counts = torch.bincount(self.domain).tolist()
        ids, start = [], 0
        for count, quota in zip(counts, shares(counts, keep), strict=True):
            ids.append(start + torch.arange(quota) * count // max(quota, 1))
            start += count
        chosen_N = torch.cat(ids)
        return Sequences(self.tokens[chosen_N], self.domain[chosen_N])


def cut(streams: Mapping[str, Tensor], domains: Sequence[str], context_length: int) -> Sequences:
    """Cut each domain's stream into sequences of `context_length + 1` tokens; a rest is left out.

    Args:
        streams: Domain -> flat token ids.
        domains: Names in the order of their labels.
        context_length: S, the number of tokens a sequence predicts.

    Returns:
        The sequences, by domain and in the order of the stream.
    """
    length = context_length + 1
    parts = [
        streams[domain][: streams[domain].numel() // length * length].view(-1, length) for domain in domains
    ]
    labels = [torch.full((len(part),), label) for label, part in enumerate(parts)]
    return Sequences(torch.cat(parts), torch.cat(labels))


def shares(counts: Sequence[int], keep: int) -> list[int]:
    """Divide a number in proportion to others (largest remainders), never above them.

    Args:
        counts: The others.
        keep: What is divided; at most their sum.
    """
    total = sum(counts)
    quotas = [keep * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: -(keep * counts[i] % total))
    for i in by_remainder[: keep - sum(quotas)]:
        quotas[i] += 1
    return quotas
