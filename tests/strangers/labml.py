"""labml.ai: the switch layer, which takes the largest probability and may drop tokens at random."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.strangers.slow import best, of
from tests.strangers.stranger import D, E, Stranger


class SwitchFeedForward(nn.Module):
    def __init__(self, *, drop_tokens, is_scale_prob):
        super().__init__()
        self.capacity_factor, self.n_experts = 1.0, E
        self.drop_tokens, self.is_scale_prob = drop_tokens, is_scale_prob
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.switch = nn.Linear(D, E)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        shape, x = x.shape, x.view(-1, x.shape[-1])
        route_prob = self.softmax(self.switch(x))
        route_prob_max, routes = torch.max(route_prob, dim=-1)
        indexes = [torch.eq(routes, i).nonzero(as_tuple=True)[0] for i in range(self.n_experts)]
        final = x.new_zeros(x.shape)
        capacity = int(self.capacity_factor * len(x) / self.n_experts)
        counts = x.new_tensor([len(indexes[i]) for i in range(self.n_experts)])
        dropped = []
        if self.drop_tokens:
            for i in range(self.n_experts):
                if len(indexes[i]) <= capacity:
                    continue
                indexes[i] = indexes[i][torch.randperm(len(indexes[i]))]
                dropped.append(indexes[i][capacity:])
                indexes[i] = indexes[i][:capacity]
        outputs = [self.experts[i](x[indexes[i], :]) for i in range(self.n_experts)]
        for i in range(self.n_experts):
            final[indexes[i], :] = outputs[i]
        if dropped:
            passed = torch.cat(dropped)
            final[passed, :] = x[passed, :]
        scale = route_prob_max if self.is_scale_prob else route_prob_max / route_prob_max.detach()
        final = (final * scale.view(-1, 1)).view(shape)
        return final, counts, route_prob.sum(0), len(dropped), route_prob_max


def reference(block, x, bias_E):
    x_TD, expert = x.reshape(-1, D), of(block.experts)
    scores_TE = block.switch(x_TD).softmax(-1)
    ids_T1 = best(scores_TE + bias_E, 1)
    rows, capacity = list(x_TD), len(x_TD) // E
    for e in range(E):
        queue = [t for t, (id_,) in enumerate(ids_T1.tolist()) if id_ == e]
        if block.drop_tokens and len(queue) > capacity:
            queue = [queue[place] for place in torch.randperm(len(queue))][:capacity]
        for t in queue:
            rows[t] = expert(e, x_TD[t : t + 1])[0]
    scale_T1 = scores_TE.gather(1, ids_T1) if block.is_scale_prob else 1
    return ids_T1, (torch.stack(rows) * scale_T1).view_as(x)


_shape = partial(
    Stranger,
    "labmlai/annotated_deep_learning_paper_implementations",
    "e6b3c8a6a2cdae4071bcde1abeaaf9a2bc37bd53",
    "labml_nn/transformers/switch/__init__.py",
    reference=reference,
    top_k=1,
)
BLOCKS = {
    "labml SwitchFeedForward": _shape(
        build=partial(SwitchFeedForward, drop_tokens=False, is_scale_prob=True)
    ),
    "labml SwitchFeedForward, dropping": _shape(
        build=partial(SwitchFeedForward, drop_tokens=True, is_scale_prob=True)
    ),
    "labml SwitchFeedForward, unscaled": _shape(
        build=partial(SwitchFeedForward, drop_tokens=True, is_scale_prob=False)
    ),
}
