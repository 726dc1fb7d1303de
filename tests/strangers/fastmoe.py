"""FastMoE: the layer around the gates of `fastmoe_gates`, and what it must compute."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.fastmoe_gates import FasterGate, GShardGate, NaiveGate, NoisyGate, SwipeGate, SwitchGate
from tests.strangers.slow import best, mix, of
from tests.strangers.stranger import D, E, Stranger, tokens


class FMoE(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.num_expert, self.d_model, self.top_k = E, D, gate.top_k
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.gate = gate

    def forward(self, inp):
        ids, score = self.gate(inp)
        flat = ids.reshape(-1)
        rows = torch.arange(len(flat)) // self.top_k
        out = inp.new_zeros(len(flat), D)
        for e, expert in enumerate(self.experts):
            chosen = (flat == e).nonzero().squeeze(1)
            out = out.index_copy(0, chosen, expert(inp[rows[chosen]]))
        return torch.bmm(score.view(-1, 1, self.top_k), out.view(-1, self.top_k, D)).reshape(-1, D)


def pruned(ids_TK, capacity):
    """Return which choices fit, if experts are filled token by token."""
    taken, kept_TK = [0] * E, torch.zeros_like(ids_TK, dtype=torch.bool)
    for t, ids in enumerate(ids_TK.tolist()):
        for place, e in enumerate(ids):
            kept_TK[t, place] = taken[e] < capacity
            taken[e] += 1
    return kept_TK


def naive(block, x_TD, bias_E):
    logits_TE = block.gate.gate(x_TD)
    ids_TK = best(logits_TE + bias_E, 2)
    return ids_TK, mix(x_TD, ids_TK, logits_TE.gather(1, ids_TK).softmax(1), of(block.experts))


def gshard(block, x_TD, bias_E):
    logits_TE = block.gate.gate(x_TD)
    ids_TK = best(logits_TE + bias_E, 2)
    weights_TK = logits_TE.gather(1, ids_TK).softmax(1)
    kept_TK = pruned(ids_TK, math.ceil(1.2 * len(x_TD)) * 2 // E)
    kept_TK[:, 1] &= 2 * weights_TK[:, 1] >= torch.rand(len(x_TD))
    return ids_TK, mix(x_TD, ids_TK, weights_TK * kept_TK, of(block.experts))


def switch(block, x_TD, bias_E):
    logits_TE = block.gate.gate(x_TD)
    scores_TE = (logits_TE + torch.rand(logits_TE.shape) * 0.2 + 0.9).softmax(1)
    ids_T1 = best(scores_TE + bias_E, 1)
    kept_T1 = pruned(ids_T1, math.ceil(1.2 * len(x_TD) / E))
    return ids_T1, mix(x_TD, ids_T1, scores_TE.gather(1, ids_T1) * kept_T1, of(block.experts))


def noisy(block, x_TD, bias_E):
    logits_TE, spread_TE = x_TD @ block.gate.w_gate, functional.softplus(x_TD @ block.gate.w_noise) + 1e-2
    logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE
    ids_TK = best(logits_TE + bias_E, 2)
    return ids_TK, mix(x_TD, ids_TK, logits_TE.gather(1, ids_TK).softmax(1), of(block.experts))


def two_nodes(block, x_TD, bias_E):
    logits_TE, away_E = block.gate.gate(x_TD), block.gate.mask
    first_TK = best(logits_TE + bias_E, 2)
    travellers = [t for t in range(len(x_TD)) if away_E[first_TK[t, 0]]]
    limit = int(len(x_TD) * block.gate.ogn_ratio)
    ids_TK = first_TK
    if len(travellers) >= limit:
        ids_TK = best((logits_TE + bias_E).masked_fill(away_E, -torch.inf), 2)
        travellers.sort(key=lambda t: -float(logits_TE[t, first_TK[t, 0]]))
        for t in travellers[:limit]:
            ids_TK[t, 1] = first_TK[t, 0]
    return ids_TK, mix(x_TD, ids_TK, logits_TE.gather(1, ids_TK).softmax(1), of(block.experts))


_shape = partial(
    Stranger,
    "laekov/fastmoe",
    "ee3c5615a5588c65273a512de82f19ca287e1bdf",
    router="gate",
    inputs=tokens,
)


def _gate(name, gate, reference, **more):
    build = partial(_block, gate)
    return _shape(path=f"fmoe/gates/{name}_gate.py", build=build, reference=reference, **more)


def _block(gate):
    return FMoE(gate())


BLOCKS = {
    "FastMoE NaiveGate": _gate("naive", NaiveGate, naive, in_order=False),
    "FastMoE GShardGate": _gate("gshard", GShardGate, gshard),
    "FastMoE SwitchGate": _gate("switch", SwitchGate, switch, top_k=1),
    "FastMoE NoisyGate": _gate("noisy", NoisyGate, noisy),
    "FastMoE FasterGate, one node": _gate("faster", partial(FasterGate, E), naive),
    "FastMoE FasterGate, two nodes": _gate("faster", partial(FasterGate, 3), two_nodes, may_refuse=True),
    "FastMoE SwipeGate": _gate("swipe", SwipeGate, naive),
}
