"""Find the experts of a model's routers, and read from their shapes how they hold SwiGLU projections.

Shape legend: D model width, H hidden width, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import nn

from moe_plugin.attach.discovery.routing_style import FoundRouter
from moe_plugin.attach.discovery.surroundings import Surroundings
from moe_plugin.experts import GroupedExperts
from moe_plugin.experts.stacks import has_experts_in_weights

ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
"""The arguments of a layer of experts in transformers."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Projections:
    """Which parameters of a layer of experts are its projections.

    Attributes:
        gate_up: Name of the gate and up projections.
        down: Name of the down projections.
        input_first: Whether they are (E, D, 2H) and (E, H, D) instead of (E, 2H, D) and (E, D, H).
    """

    gate_up: str
    down: str
    input_first: bool


def experts_of_routers(
    model: nn.Module, routers: Sequence[FoundRouter]
) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the layers of stacked experts of these routers, by name, and the routers without one.

    A router's layers are the nearest modules that hold 3-D parameters with one entry per expert.

    Args:
        model: The model.
        routers: Its routers.
    """
    layers: dict[str, nn.Module] = {}
    without = []
    for router in routers:
        near = _nearest(model, router)
        if not near:
            without.append(router.name)
        layers |= {name: layer for name, layer in near.items() if layer not in layers.values()}
    return layers, without


def _nearest(model: nn.Module, router: FoundRouter) -> dict[str, nn.Module]:
    for prefix, module in Surroundings.of(model, router.name).path:
        parts = module.named_modules(prefix=prefix)
        stacked = {
            name: part for name, part in parts if has_experts_in_weights(part, router.style.num_experts)
        }
        if stacked:
            return stacked
    return {}


def projections_of(experts: nn.Module) -> Projections | str:
    """Return how this layer holds its projections, or why it cannot be computed by the fused experts."""
    if isinstance(experts, GroupedExperts):
        return "they are the fused experts already"
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    found = [_projections(*pair) for pair in permutations(shapes.items(), 2)] if len(shapes) == 2 else []
    projections = next((projections for projections in found if projections), None)
    if projections is None:
        return f"its parameters must be two projections, (E, 2H, D) and (E, D, H) or both transposed, got {shapes}"
    dtypes = {parameter.dtype for parameter in experts.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        return f"its parameters must have one floating-point dtype, got {dtypes}"
    if "forward" in vars(experts):
        return "something else has replaced its forward already: attach before that"
    arguments = tuple(inspect.signature(type(experts).forward).parameters)[1:]
    if arguments != ARGUMENTS:
        return f"its forward must take {', '.join(ARGUMENTS)}, and takes {', '.join(arguments)}"
    return projections


def _projections(
    gate_up: tuple[str, tuple[int, ...]], down: tuple[str, tuple[int, ...]]
) -> Projections | None:
    """Return the projections if their shapes fit: at most one order of the two and of their dimensions does."""
    (gate_up_name, gate_up_shape), (down_name, down_shape) = gate_up, down
    if len(gate_up_shape) != 3 or len(down_shape) != 3:
        return None
    experts, first, second = down_shape
    if gate_up_shape == (experts, 2 * second, first):
        return Projections(gate_up_name, down_name, input_first=False)
    if gate_up_shape == (experts, second, 2 * first):
        return Projections(gate_up_name, down_name, input_first=True)
    return None
