from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.callbacks.loss_free import LossFreeBalancing


class Odd(LightningModule):
    """Samples its experts."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.top_k = 4, 1
        self.gate, self.experts = nn.Linear(2, 4), nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    def choose(self, x_TD):
        return torch.multinomial(self.gate(x_TD).softmax(-1), self.top_k)


def route(block, select, x_TD):
    return select(block.gate(x_TD), block.top_k)[1]


class TestAdapters:
    def test_users_adapter_reaches_the_model(self):
        model = Odd()
        callback = LossFreeBalancing(adapters=[Adapter(block=Odd, method="choose", route=route)])
        callback.setup(Trainer(accelerator="cpu", logger=False, barebones=True), model, "fit")
        balanced = find_balanced(model)
        assert balanced is not None
        model.choose(torch.randn(5, 2))
        assert balanced[""].counts.sum() == 5
