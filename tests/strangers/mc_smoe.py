"""MC-SMoE: the top-2 router of NLLB with sampled second experts, which keeps the capacity of its first forward."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.gumbel import drawn
from tests.strangers.slow import first_come, in_rounds, mix, of
from tests.strangers.stranger import D, E, Stranger


class FSGPTMoETop2Router(nn.Module):
    def __init__(self, prioritized):
        super().__init__()
        self.num_experts, self.expert_capacity = E, None
        self.classifier = nn.Linear(D, E, bias=False)
        self.dtype = torch.float32
        self.second_expert_policy, self.batch_prioritized_routing = "sampling", prioritized

    def normalize_router_probabilities(self, probs, mask1, mask2):
        top1, top2 = (probs * mask1).sum(dim=1), (probs * mask2).sum(dim=1)
        denom = torch.clamp(top1 + top2, min=torch.finfo(probs.dtype).eps)
        return top1 / denom, top2 / denom

    def route_tokens(self, router_logits, input_dtype):
        tokens = router_logits.shape[0]
        router_probs = functional.softmax(router_logits, dim=-1, dtype=self.dtype).to(input_dtype)
        mask1 = functional.one_hot(torch.argmax(router_probs, dim=-1), num_classes=self.num_experts)
        if self.second_expert_policy == "sampling":
            gumbel = torch.distributions.gumbel.Gumbel(0, 1).rsample
            router_logits += gumbel(router_logits.shape).to(router_logits.device)
        except_top1 = router_logits.masked_fill(mask1.bool(), float("-inf"))
        mask2 = functional.one_hot(torch.argmax(except_top1, dim=-1), num_classes=self.num_experts)
        if self.batch_prioritized_routing:
            importance = -1 * router_probs.max(dim=1)[0]
            order, back = importance.argsort(dim=0), importance.argsort(dim=0).argsort(dim=0)
            locations1 = ((torch.cumsum(mask1[order], dim=0) - 1) * mask1[order])[back]
            locations2 = ((torch.cumsum(mask2[order], dim=0) - 1) * mask2[order])[back]
        else:
            locations1, locations2 = torch.cumsum(mask1, dim=0) - 1, torch.cumsum(mask2, dim=0) - 1
        locations2 += torch.sum(mask1, dim=0, keepdim=True)
        capacity = 2 * math.ceil(tokens / self.num_experts)
        self.expert_capacity = capacity if self.expert_capacity is None else self.expert_capacity
        mask1 = mask1 * torch.lt(locations1, self.expert_capacity)
        mask2 = mask2 * torch.lt(locations2, self.expert_capacity)
        top1, top2 = self.normalize_router_probabilities(router_probs, mask1, mask2)
        return mask1, top1[:, None] * mask1 + top2[:, None] * mask2

    def forward(self, hidden_states):
        dtype, hidden_states = hidden_states.dtype, hidden_states.reshape(-1, D).to(self.dtype)
        self.classifier = self.classifier.to(self.dtype)
        router_logits = self.classifier(hidden_states)
        mask1, router_probs = self.route_tokens(router_logits, dtype)
        return mask1, router_probs, router_logits


class FSGPTMoESparseMLP(nn.Module):
    def __init__(self, prioritized=False):
        super().__init__()
        self.router, self.num_experts = FSGPTMoETop2Router(prioritized), E
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(D, D) for i in range(E)})

    def forward(self, x):
        mask1, router_probs, router_logits = self.router(x)
        router_mask, flat = router_probs.bool(), x.reshape(-1, D)
        masked = torch.einsum("bm,be->ebm", flat, router_mask.to(flat.dtype))
        for i, expert in enumerate(self.experts.values()):
            rows = router_mask[:, i]
            masked[i, rows] = torch.einsum("b,be->be", router_probs[rows, i], expert(masked[i, rows]))
        return masked.sum(dim=0).view(x.shape), (router_logits, router_probs, torch.argmax(mask1, dim=-1))


def reference(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    logits_TE = block.router.classifier(x_TD.float())
    scores_TE = logits_TE.softmax(1).to(x.dtype)
    ids_TK = in_rounds(scores_TE + bias_E, logits_TE + drawn(logits_TE.shape) + bias_E)
    largest, prioritized = scores_TE.amax(1).tolist(), block.router.batch_prioritized_routing
    order = sorted(range(len(x_TD)), key=lambda t: -largest[t]) if prioritized else None
    weights_TK = scores_TE.gather(1, ids_TK) * first_come(ids_TK, 2 * math.ceil(len(x_TD) / E), order=order)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).eps)
    return ids_TK, mix(x_TD, ids_TK, weights_TK, of(block.experts.values())).view_as(x)


_shape = partial(
    Stranger,
    "UNITES-Lab/MC-SMoE",
    "4a195b17114f3d1e5c991dfa5932f07dcffb1f63",
    "mcsmoe/models/fsgpt_moe.py",
    reference=reference,
    router="router",
)
BLOCKS = {
    "MC-SMoE FSGPTMoETop2Router": _shape(build=FSGPTMoESparseMLP),
    "MC-SMoE FSGPTMoETop2Router, prioritized": _shape(build=partial(FSGPTMoESparseMLP, True)),
}
