"""torchscale: the layer around the gates of `xmoe_gates`, and what it must compute."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.gumbel import drawn, gumbel_map
from tests.strangers.slow import best, first_come, in_rounds, mix, of
from tests.strangers.stranger import D, E, Stranger
from tests.strangers.xmoe_gates import Top1Gate, Top2Gate


class MOELayer(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.num_local_experts = E

    def forward(self, x):
        flat = x.reshape(-1, D)
        l_aux, combine, dispatch, self.metadata = self.gate(flat)
        tokens, _, capacity = dispatch.shape
        placed = torch.mm(dispatch.to(x.dtype).permute(1, 2, 0).reshape(E * capacity, tokens), flat)
        chunks = placed.reshape(E, capacity, D).chunk(self.num_local_experts, dim=0)
        outputs = [expert(chunk) for chunk, expert in zip(chunks, self.experts, strict=True)]
        return combine.view(tokens, -1).mm(torch.cat(outputs).view(-1, D)).view(x.shape), l_aux


def logits_of(gate, x_TD):
    if not gate.use_xmoe:
        return gate.wg(x_TD)
    return gate.wg_reduction(x_TD) @ functional.normalize(gate.wg, dim=1).T


def one(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    scores_TE = logits_of(block.gate, x_TD).softmax(1)
    ids_T1 = best(scores_TE + bias_E, 1)
    kept_T1 = first_come(ids_T1, math.ceil(len(x_TD) / E))
    return ids_T1, mix(x_TD, ids_T1, scores_TE.gather(1, ids_T1) * kept_T1, of(block.experts)).view_as(x)


def two(block, x, bias_E):
    x_TD, policy = x.reshape(-1, D), block.gate.second_expert_policy
    logits_TE = logits_of(block.gate, x_TD)
    scores_TE = logits_TE.softmax(1)
    noise_TE = drawn(logits_TE.shape) if policy == "sampling" else 0
    ids_TK = in_rounds(scores_TE + bias_E, logits_TE + noise_TE + bias_E)
    weights_TK, wanted_TK = scores_TE.gather(1, ids_TK), torch.ones_like(ids_TK, dtype=torch.bool)
    if policy == "random":
        wanted_TK[:, 1] = 2 * weights_TK[:, 1] > torch.rand(len(x_TD))
    largest = scores_TE.amax(1).tolist()
    prioritized = block.gate.batch_prioritized_routing
    order = sorted(range(len(x_TD)), key=lambda t: -largest[t]) if prioritized else None
    weights_TK = weights_TK * first_come(
        ids_TK, 2 * math.ceil(len(x_TD) / E), order=order, wanted_TK=wanted_TK
    )
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).eps)
    return ids_TK, mix(x_TD, ids_TK, weights_TK, of(block.experts)).view_as(x)


_shape = partial(
    Stranger,
    "microsoft/torchscale",
    "4d1e0e82e5adf86dd424f1463192635b73fc8efc",
    "torchscale/component/xmoe/routing.py",
    router="gate",
    shared=(gumbel_map,),
)
_two = partial(_shape, reference=two)
BLOCKS = {
    "torchscale Top1Gate": _shape(build=lambda: MOELayer(Top1Gate(False)), reference=one, top_k=1),
    "torchscale Top1Gate, cosine": _shape(build=lambda: MOELayer(Top1Gate(True)), reference=one, top_k=1),
    "torchscale Top2Gate, sampling": _two(build=lambda: MOELayer(Top2Gate())),
    "torchscale Top2Gate, cosine": _two(build=lambda: MOELayer(Top2Gate(True, "all"))),
    "torchscale Top2Gate, random": _two(build=lambda: MOELayer(Top2Gate(False, "random"))),
    "torchscale Top2Gate, prioritized": _two(build=lambda: MOELayer(Top2Gate(False, "sampling", True))),
}
