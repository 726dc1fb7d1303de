"""What a bias must do to the block of a `RouterSpec`, computed token by token in plain Python.

Only the steps up to the scores are the host's own code; selection, gate weights and counts are written again.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tests.attach.generated.block import Block
from tests.attach.generated.spec import GROUPS, SECOND_VALUES, RouterSpec


class Expected(NamedTuple):
    """The output (T, D), the tokens of each expert, and by how much the closest token was decided."""

    output_TD: Tensor
    counts: list[int]
    margin: float


@torch.no_grad()
def reference(block: Block, x_TD: Tensor, logits_TE: Tensor, bias_E: Tensor) -> list[Expected]:
    """Return what is right: one answer, or one for each tensor to which the bias may be added.

    Args:
        block: An unbalanced block.
        x_TD: Hidden states.
        logits_TE: Its logits for them.
        bias_E: The selection bias.
    """
    spec = block.spec
    scores_TE, probs_TE = block.routing.score(logits_TE), logits_TE.softmax(-1)
    is_of_probs = spec.second in SECOND_VALUES or spec.gates.startswith("gathered from")
    source = (probs_TE if is_of_probs else scores_TE).tolist()
    ranked = [scores_TE, probs_TE] if spec.second in SECOND_VALUES else [scores_TE]
    outputs_TED = torch.stack([block.expert(e, x_TD) for e in range(spec.experts)], dim=1)
    return [_decided(spec, each_TE.tolist(), source, outputs_TED, bias_E.tolist()) for each_TE in ranked]


def _decided(spec, ranked, source, outputs_TED, bias) -> Expected:
    counts, rows, margin = [0] * spec.experts, [], math.inf
    for token, scores in enumerate(ranked):
        final = _final(spec, scores, bias)
        order = sorted(range(spec.experts), key=lambda e: -final[e])
        ids, left = order[: spec.k], order[spec.k :]
        margin = min([margin, *(final[ids[-1]] - final[e] for e in left)])
        gates = _weights(spec, [source[token][e] for e in ids])
        rows.append(sum(gate * outputs_TED[token, e] for gate, e in zip(gates, ids, strict=True)))
        for e in ids:
            counts[e] += 1
    return Expected(torch.stack(rows), counts, margin)


def _final(spec: RouterSpec, scores: list[float], bias: list[float]) -> list[float]:
    """Return what decides; it is ranked once."""
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    is_open = _open_experts(spec, biased if spec.choice_bias else scores)
    # A host with a bias of its own ranks the zeros of closed groups as they are.
    closed = 0.0 if spec.mask == GROUPS[0] and spec.choice_bias else -math.inf
    return [value if opened else closed for value, opened in zip(biased, is_open, strict=True)]


def _open_experts(spec: RouterSpec, scores: list[float]) -> list[bool]:
    if spec.mask == "experts":
        return [e != spec.seed % spec.experts for e in range(spec.experts)]
    if spec.mask not in GROUPS:
        return [True] * spec.experts
    half = spec.experts // 2
    first, second = (sum(sorted(part)[-2:]) for part in (scores[:half], scores[half:]))
    return [(e >= half) == (second > first) for e in range(spec.experts)]


def _weights(spec: RouterSpec, values: list[float]) -> list[float]:
    if spec.gates in ("softmax", "softmax by hand"):
        powers = [math.exp(value) for value in values]
        return [power / sum(powers) for power in powers]
    if spec.gates == "normalised":
        return [value / (sum(values) + 1e-9) for value in values]
    return values
