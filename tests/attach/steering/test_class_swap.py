from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from moe_plugin.attach.steering.class_swap import Mixin, swap_, unswap_


class Doubled(Mixin):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(Mixin):
    def forward(self, x):
        return 1 + super().forward(x)


class TestSwap:
    def test_mixins_stack_and_come_off_in_reverse(self):
        module, x = nn.Identity(), torch.ones(1)
        swap_(module, Doubled)
        swap_(module, Shifted)
        assert module(x).item() == 3
        unswap_(module, Shifted)
        assert module(x).item() == 2
        unswap_(module, Doubled)
        assert type(module) is nn.Identity

    def test_name_and_isinstance_stay(self):
        module = nn.Linear(2, 3)
        swap_(module, Doubled)
        assert isinstance(module, nn.Linear)
        assert repr(module) == repr(nn.Linear(2, 3))

    def test_other_instances_of_the_class_stay(self):
        module, other = nn.Identity(), nn.Identity()
        swap_(module, Doubled)
        assert other(torch.ones(1)).item() == 1

    def test_copies_and_pickles_keep_all_mixins(self):
        module = nn.Identity()
        swap_(module, Doubled)
        swap_(module, Shifted)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other(torch.ones(1)).item() == 3
            assert type(other) is type(module)
