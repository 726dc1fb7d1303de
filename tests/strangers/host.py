"""A model of two blocks, one step of it, and what blocks keep outside of their output.

Shape legend: B batch, S sequence, T tokens, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from tests.strangers.stranger import Stranger


class Model(nn.Module):
    """Two blocks, one after the other."""

    def __init__(self, stranger: Stranger) -> None:
        super().__init__()
        self.layers = nn.ModuleList(stranger.build() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + first(layer(x))
        return x


def first(returned: Any) -> Tensor:
    """Return a block's output, without what it returns with it."""
    return returned[0] if isinstance(returned, tuple) else returned


def step(model: Model, stranger: Stranger, x: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and gradients of a seeded step, with a loss of all that the blocks return or keep.

    Args:
        model: The model.
        stranger: Its blocks.
        x: Input.
        seed: Of every random number.
    """
    torch.manual_seed(seed)
    extra: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, returned: extra.extend(tree_leaves(returned)[1:]))
        for layer in model.layers
    ]
    output = model(x)
    for handle in handles:
        handle.remove()
    kept = [value for module in model.modules() for value in vars(module).values()]
    extra += [each for each in kept if isinstance(each, Tensor)] + tensors(stranger.shared)
    losses = [each.square().mean() for each in {id(e): e for e in extra}.values() if needs_grad(each)]
    (output.square().mean() + sum(losses)).backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def needs_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


def tensors(shared: Any) -> list[Tensor]:
    """Return the tensors in containers and plain objects."""
    held = [vars(each) if hasattr(each, "__dict__") else each for each in shared]
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor)]


def clear_(shared: Any) -> None:
    """Empty all containers."""
    for each in shared:
        for container in list(vars(each).values()) if hasattr(each, "__dict__") else [each]:
            container.clear()


def kept_outside(shared: Any) -> list[Any]:
    """Return what the containers hold, to compare: keys and lengths, and copies of all tensors."""
    held = [vars(each) if hasattr(each, "__dict__") else each for each in shared]
    keys = [list(each) if isinstance(each, dict) else len(each) for each in held]
    sizes = [
        len(value)
        for each in held
        if isinstance(each, dict)
        for value in each.values()
        if isinstance(value, list)
    ]
    leaves = tensors(shared)
    assert not any(isinstance(leaf, FakeTensor) for leaf in leaves), "a fake tensor is in a global"
    return [keys, sizes, [leaf.detach().clone() for leaf in leaves]]


def attributes(model: nn.Module) -> dict[tuple[str, str], list[Any]]:
    """Return every attribute of every module, containers by their items."""
    return {
        (name, key): list(value.values()) if isinstance(value, dict) else [value]
        for name, module in model.named_modules()
        for key, value in [*vars(module).items(), ("class", type(module))]
    }


def same(some: dict, others: dict) -> bool:
    """Return whether attributes are the same objects.

    Args:
        some: Attributes.
        others: Attributes.
    """
    return some.keys() == others.keys() and all(
        len(values) == len(others[key]) and all(a is b for a, b in zip(values, others[key], strict=True))
        for key, values in some.items()
    )
