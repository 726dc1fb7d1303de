"""nanoMoE: a router that hands its losses to a global object."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, first_come, mix
from tests.strangers.stranger import D, E, Stranger, random_


class MOEManager:
    def __init__(self):
        self.aux_loss, self.router_z_loss = [], []


MANAGER = MOEManager()


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.top_k, self.n_exp, self.use_noisy_top_k, self.train_capacity = 2, E, True, 1.25
        self.w_g = nn.Linear(D, E, bias=False)
        self.w_noise = nn.Linear(D, E, bias=False)

    def forward(self, x):
        num_tokens = x.shape[0] * x.shape[1]
        logits = self.w_g(x)
        noise = functional.softplus(self.w_noise(x))
        noise *= torch.randn_like(noise)
        logits += noise
        MANAGER.router_z_loss.append(torch.mean(torch.logsumexp(logits, dim=-1) ** 2.0))
        top_k_logits, top_k_indices = logits.topk(self.top_k, dim=-1)
        router_probs = torch.full_like(logits, float("-inf"))
        router_probs.scatter_(-1, top_k_indices, top_k_logits)
        router_probs = functional.softmax(router_probs, dim=-1)
        with torch.no_grad():
            chosen = (
                functional.one_hot(top_k_indices, num_classes=self.n_exp).sum(dim=2).float().mean(dim=(0, 1))
            )
        MANAGER.aux_loss.append(self.n_exp * torch.sum(router_probs.float().mean(dim=(0, 1)) * chosen))
        capacity = int(self.top_k * self.train_capacity * num_tokens / self.n_exp)
        capacity += capacity % 2
        mask = functional.one_hot(top_k_indices, num_classes=self.n_exp).view(
            num_tokens, self.top_k, self.n_exp
        )
        mask = mask.permute(1, 0, 2)
        rank = torch.cumsum(mask.reshape(self.top_k * num_tokens, self.n_exp), dim=0) - 1
        rank = rank.reshape(self.top_k, num_tokens, self.n_exp)
        mask = mask * torch.lt(rank, capacity)
        used_capacity = torch.sum(mask, dim=(0, 1))
        rank = torch.sum(mask * rank, dim=-1)
        weights = mask * router_probs.view(num_tokens, self.n_exp)[None, :]
        where = functional.one_hot(rank, num_classes=capacity)
        cb_weight = torch.sum(weights.unsqueeze(3) * where.unsqueeze(2), dim=0)
        return used_capacity, cb_weight, cb_weight.bool()


class MLPExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Parameter(torch.empty(E, D, D))
        self.c_proj = nn.Parameter(torch.empty(E, D, D))

    def forward(self, x):
        return torch.bmm(functional.gelu(torch.bmm(x, self.c_fc)), self.c_proj)


class MOELayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = Router(), MLPExperts()

    def forward(self, x):
        _, weight, mask = self.router(x)
        flat = x.view(-1, D)
        out = self.experts(mask.permute(1, 2, 0).type_as(flat) @ flat)
        return (weight.view(len(flat), -1) @ out.view(-1, D)).view(x.shape)


def reference(block, x, bias_E):
    x_TD, router = x.reshape(-1, D), block.router
    logits_TE, spread_TE = router.w_g(x_TD), functional.softplus(router.w_noise(x_TD))
    logits_TE = logits_TE + spread_TE * torch.randn_like(spread_TE)
    ids_TK = best(logits_TE + bias_E, 2)
    capacity = 2 * 5 * len(x_TD) // (4 * E)
    kept_TK = first_come(ids_TK, capacity + capacity % 2)
    weights_TK = logits_TE.gather(1, ids_TK).softmax(-1) * kept_TK

    def expert(e, x):
        return functional.gelu(x @ block.experts.c_fc[e]) @ block.experts.c_proj[e]

    return ids_TK, mix(x_TD, ids_TK, weights_TK, expert).view_as(x)


BLOCKS = {
    "nanoMoE MOELayer": Stranger(
        "wolfecameron/nanoMoE",
        "661fbcfade3e3081b3ed1150bc07e49082f46b48",
        "model.py",
        lambda: random_(MOELayer()),
        reference,
        router="router",
        shared=(MANAGER,),
    )
}
