"""davidmrau/mixture-of-experts: noisy top-k with one candidate more than selected, for a smooth load."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributions.normal import Normal

from tests.strangers.slow import best, mix, normalised, of
from tests.strangers.stranger import D, E, Stranger, random_, tokens


class SparseDispatcher:
    """Sorts the tokens of nonzero gates by expert."""

    def __init__(self, num_experts, gates):
        self._gates = gates
        sorted_experts, order = torch.nonzero(gates).sort(0)
        _, self._expert_index = sorted_experts.split(1, dim=1)
        self._batch_index = torch.nonzero(gates)[order[:, 1], 0]
        self._part_sizes = (gates > 0).sum(0).tolist()
        self._nonzero_gates = torch.gather(gates[self._batch_index.flatten()], 1, self._expert_index)

    def dispatch(self, x):
        return torch.split(x[self._batch_index].squeeze(1), self._part_sizes, dim=0)

    def combine(self, outputs):
        stitched = torch.cat(outputs, 0).mul(self._nonzero_gates)
        zeros = torch.zeros(len(self._gates), outputs[-1].size(1), requires_grad=True)
        return zeros.index_add(0, self._batch_index, stitched.float())


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.noisy_gating, self.num_experts, self.k = True, E, 2
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Softmax(1)) for _ in range(E))
        self.w_gate = nn.Parameter(torch.zeros(D, E))
        self.w_noise = nn.Parameter(torch.zeros(D, E))
        self.softplus, self.softmax = nn.Softplus(), nn.Softmax(1)
        self.register_buffer("mean", torch.tensor([0.0]))
        self.register_buffer("std", torch.tensor([1.0]))

    def cv_squared(self, x):
        return x.float().var() / (x.float().mean() ** 2 + 1e-10)

    def _prob_in_top_k(self, clean, noisy, noise_stddev, noisy_top):
        batch, m = clean.size(0), noisy_top.size(1)
        flat = noisy_top.flatten()
        positions_if_in = torch.arange(batch) * m + self.k
        threshold_if_in = flat.gather(0, positions_if_in).unsqueeze(1)
        threshold_if_out = flat.gather(0, positions_if_in - 1).unsqueeze(1)
        normal = Normal(self.mean, self.std)
        if_in = normal.cdf((clean - threshold_if_in) / noise_stddev)
        if_out = normal.cdf((clean - threshold_if_out) / noise_stddev)
        return torch.where(torch.gt(noisy, threshold_if_in), if_in, if_out)

    def noisy_top_k_gating(self, x, train):
        clean = x @ self.w_gate
        noisy = noise_stddev = None
        if self.noisy_gating and train:
            noise_stddev = self.softplus(x @ self.w_noise) + 1e-2
            noisy = clean + torch.randn_like(clean) * noise_stddev
        logits = self.softmax(clean if noisy is None else noisy)
        top, indices = logits.topk(min(self.k + 1, self.num_experts), dim=1)
        top_k, top_k_indices = top[:, : self.k], indices[:, : self.k]
        top_k_gates = top_k / (top_k.sum(1, keepdim=True) + 1e-6)
        gates = torch.zeros_like(logits, requires_grad=True).scatter(1, top_k_indices, top_k_gates)
        if noisy is None:
            return gates, (gates > 0).sum(0)
        return gates, self._prob_in_top_k(clean, noisy, noise_stddev, top).sum(0)

    def forward(self, x, loss_coef=1e-2):
        gates, load = self.noisy_top_k_gating(x, self.training)
        loss = (self.cv_squared(gates.sum(0)) + self.cv_squared(load)) * loss_coef
        dispatcher = SparseDispatcher(self.num_experts, gates)
        inputs = dispatcher.dispatch(x)
        return dispatcher.combine([self.experts[i](inputs[i]) for i in range(self.num_experts)]), loss


def reference(block, x_TD, bias_E):
    clean_TE = x_TD @ block.w_gate
    spread_TE = (x_TD @ block.w_noise).exp().log1p() + 1e-2
    scores_TE = (clean_TE + torch.randn_like(clean_TE) * spread_TE).softmax(1)
    ids_TK = best(scores_TE + bias_E, 2)
    return ids_TK, mix(x_TD, ids_TK, normalised(scores_TE.gather(1, ids_TK), 1e-6), of(block.experts))


BLOCKS = {
    "mixture-of-experts MoE": Stranger(
        "davidmrau/mixture-of-experts",
        "f662999727109357c42074997e9a6cd72806f668",
        "moe.py",
        lambda: random_(MoE()),
        reference,
        inputs=tokens,
    )
}
