from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_plugin.experts import GroupedExperts
from moe_plugin.experts.stacks import has_experts_in_weights, num_experts_in, own_stacks


class Weights(nn.Module):
    """Two 3-D weights, a matrix, and a child with weights of its own."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(first, 2, 3))
        self.down = nn.Parameter(torch.zeros(second, 3, 2))
        self.gate = nn.Parameter(torch.zeros(7, 2))
        self.child = GroupedExperts(5, 4, 4)


LISTED = [
    nn.ModuleList(nn.Linear(2, 2) for _ in range(4)),
    nn.ModuleDict({str(i): nn.Linear(2, 2) for i in range(4)}),
    nn.ParameterList(torch.zeros(2, 2) for _ in range(4)),
    nn.ParameterDict({str(i): nn.Parameter(torch.zeros(2, 2)) for i in range(4)}),
]


class TestStacks:
    @pytest.mark.parametrize("module", LISTED, ids=lambda module: type(module).__name__)
    def test_list_is_one_stack_of_its_entries(self, module: nn.Module) -> None:
        (stack,) = own_stacks(module)
        assert (stack.size, stack.is_weight) == (4, False)
        assert {id(tensor) for tensor in stack.tensors} == {id(each) for each in module.parameters()}
        assert num_experts_in(module) == 4
        assert not has_experts_in_weights(module, 4)

    def test_own_weights_are_stacks_and_not_those_of_children(self) -> None:
        module = Weights(4, 4)
        assert [
            (s.size, s.is_weight, s.tensors[0] is w)
            for s, w in zip(own_stacks(module), (module.up, module.down), strict=True)
        ] == [
            (4, True, True),
            (4, True, True),
        ]
        assert num_experts_in(module) == 4
        assert [has_experts_in_weights(module, n) for n in (4, 5, 7)] == [True, False, False]

    def test_stacks_of_different_sizes_tell_no_number(self) -> None:
        assert num_experts_in(Weights(4, 6)) is None

    def test_module_that_stacks_nothing_has_no_experts(self) -> None:
        assert own_stacks(nn.Linear(4, 4)) == []
        assert num_experts_in(nn.Linear(4, 4)) is None
