"""DeepSpeed: the layer around the gates of `deepspeed_gates`, and what it must compute."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from tests.strangers.deepspeed_gates import TopKGate, exp_selection_uniform_map
from tests.strangers.gumbel import drawn, gumbel_map
from tests.strangers.slow import best, first_come, in_rounds, mix, of
from tests.strangers.stranger import D, E, Stranger


class MOELayer(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.num_local_experts = E

    def forward(self, x):
        flat = x.reshape(-1, D)
        self.l_aux, combine, dispatch, self.exp_counts = self.gate(flat)
        dispatched = torch.einsum("sec,sm->ecm", dispatch.type_as(x), flat)
        chunks = dispatched.chunk(self.num_local_experts, dim=0)
        output = torch.cat([expert(chunk) for chunk, expert in zip(chunks, self.experts, strict=True)])
        return torch.einsum("sec,ecm->sm", combine.type_as(x), output).reshape(x.shape)


def one(block, x, bias_E):
    x_TD, gate = x.reshape(-1, D), block.gate
    logits_TE = x_TD.float() @ gate.wg.weight.float().T
    scores_TE, capacity = logits_TE.softmax(1), math.ceil(len(x_TD) / E)
    ranked_TE = logits_TE + drawn(logits_TE.shape) if gate.noisy_gate_policy == "RSample" else scores_TE
    ids_T1 = best(ranked_TE + bias_E, 1)
    order = None
    if gate.use_rts:  # a full expert takes those tokens that drew the largest numbers
        lots = torch.rand(logits_TE.shape).gather(1, ids_T1)[:, 0].tolist()
        order = sorted(range(len(x_TD)), key=lambda t: -lots[t])
    kept_T1 = first_come(ids_T1, capacity if gate.drop_tokens else len(x_TD), order=order)
    return ids_T1, mix(x_TD, ids_T1, scores_TE.gather(1, ids_T1) * kept_T1, of(block.experts)).view_as(x)


def two(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    logits_TE = x_TD.float() @ block.gate.wg.weight.float().T
    scores_TE = logits_TE.softmax(1)
    ids_TK = in_rounds(scores_TE + bias_E, logits_TE + drawn(logits_TE.shape) + bias_E)
    return ids_TK, _kept_output(block, x, scores_TE, ids_TK, first_come(ids_TK, math.ceil(2 * len(x_TD) / E)))


def three(block, x, bias_E):
    x_TD, k = x.reshape(-1, D), block.gate.k
    scores_TE = (x_TD.float() @ block.gate.wg.weight.float().T).softmax(1)
    ids_TK = best(scores_TE + bias_E, k)
    kept_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    for e in range(E):  # a full expert takes the tokens with the largest weights
        wanting = [(t, place) for t, place in (ids_TK == e).nonzero().tolist()]
        for t, place in sorted(wanting, key=lambda at: -scores_TE[at[0], e])[: math.ceil(k * len(x_TD) / E)]:
            kept_TK[t, place] = True
    return ids_TK, _kept_output(block, x, scores_TE, ids_TK, kept_TK)


def _kept_output(block, x, scores_TE, ids_TK, kept_TK):
    weights_TK = scores_TE.gather(1, ids_TK) * kept_TK
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    return mix(x.reshape(-1, D), ids_TK, weights_TK, of(block.experts)).view_as(x)


_shape = partial(
    Stranger,
    "deepspeedai/DeepSpeed",
    "edaa7221267243c7be7fb49c5d5f5c4fb97b4641",
    "deepspeed/moe/sharded_moe.py",
    router="gate",
    shared=(gumbel_map, exp_selection_uniform_map),
)
BLOCKS = {
    "DeepSpeed TopKGate, k=1": _shape(build=lambda: MOELayer(TopKGate(1)), reference=one, top_k=1),
    "DeepSpeed TopKGate, k=1, no dropping": _shape(
        build=lambda: MOELayer(TopKGate(1, "RSample", drop_tokens=False, use_rts=False)),
        reference=one,
        top_k=1,
    ),
    "DeepSpeed TopKGate, k=2": _shape(build=lambda: MOELayer(TopKGate(2)), reference=two),
    "DeepSpeed TopKGate, k=3": _shape(build=lambda: MOELayer(TopKGate(3)), reference=three, top_k=3),
}
