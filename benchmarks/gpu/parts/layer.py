"""The expert layer, forward and backward: ours, transformers', a loop, and the products alone as the limit.

All sides of a shape have the same weights. Outputs and gradients are compared with a loop in fp32, and one that is not
within the tolerance is a failure: its time would mean nothing.

Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per token, P = T * K pairs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.expert_layer import SHAPES, Layer, Shape
from benchmarks.gpu.line import Figures, Line
from benchmarks.gpu.memory import peak_mib
from benchmarks.gpu.place import Place
from benchmarks.gpu.timing import median_ms
from benchmarks.gpu.waits import waits_of
from moe_plugin.experts.kernels.choice import VARIABLE
from moe_plugin.experts.kernels.dispatch import order_pairs
from moe_plugin.experts.kernels.grouped_products import backward_by_groups, forward_by_groups
from moe_plugin.experts.kernels.row_blocks import backward_in_blocks, forward_in_blocks
from moe_plugin.types import Routing

TOKENS = 32768
WIDE = "d=2048 h=768 E=128 k=8"
REAL = {WIDE: Shape(128, 8, 768, 2048), **{name: SHAPES[name] for name in "BCA"}}
DRY = {name: Shape(4, 2, 16, 32) for name in REAL}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03}
"""How far outputs and gradients may be from those in fp32, of their norm."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Pass = Callable[[], Sequence[Tensor]]


def lines(place: Place) -> Iterator[Line]:
    """Yield each side of each shape in bf16, then ours in each dtype by each implementation."""
    for shape in REAL:
        yield Line(f"{shape}: ours, torch", partial(ours, place, shape, "torch"))
        yield Line(f"{shape}: ours, triton", partial(ours, place, shape, "triton"), ("triton",))
        yield Line(f"{shape}: grouped_mm", partial(transformers, place, shape), ("transformers",))
        yield Line(f"{shape}: products", partial(products, place, shape))
        yield Line(f"{shape}: loop", partial(loop, place, shape))
    for dtype in DTYPES:
        for implementation in IMPLEMENTATIONS:
            measure = partial(by_implementation, place, implementation, DTYPES[dtype])
            yield Line(f"B in {dtype}: {implementation}", measure)


@lru_cache(maxsize=1)
def layer_of(place: Place, shape: str, dtype: torch.dtype) -> tuple[Layer, list[Routing], list[Tensor]]:
    """Return a layer, routings, and what the first of them gives in fp32; see `results_of`.

    Args:
        place: Where.
        shape: Its name.
        dtype: Of weights and tokens.
    """
    torch.manual_seed(0)
    with place.device:
        layer = Layer(place.size(REAL, DRY)[shape], place.size(TOKENS, 64), dtype)
        routings = [layer.routing() for _ in range(4)]
    return layer, routings, exact_results(layer, routings[0])


def exact_results(layer: Layer, routing: Routing) -> list[Tensor]:
    """Return the results of a loop over the experts, all in fp32.

    Args:
        layer: In any dtype.
        routing: Of its tokens.
    """
    exact = copy.copy(layer)
    exact.dtype = torch.float32
    exact.experts = copy.deepcopy(layer.experts).float()
    exact.x_TD = layer.x_TD.detach().float().requires_grad_()
    exact.gradient_TD = layer.gradient_TD.float()
    weights_TK = routing.weights_TK.detach().float().requires_grad_()
    return results_of(exact, exact.loop, routing._replace(weights_TK=weights_TK))


def results_of(layer: Layer, side: Callable[[Routing], Tensor], routing: Routing) -> list[Tensor]:
    """Return the output of a side, and the gradients of tokens, gate weights and expert weights.

    Args:
        layer: Whose side it is.
        side: One that forgets the gradients it makes.
        routing: Its argument.
    """
    kept: list[Tensor] = []
    layer._forget = lambda trained: (kept.extend(t.grad for t in trained), Layer._forget(trained))  # pyright: ignore
    try:
        return [side(routing), *kept]
    finally:
        del layer._forget


def error_of(found: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Return the largest distance of a result from the exact one, of its norm.

    Args:
        found: Results.
        exact: The same in fp32; more of them are left out.
        dtype: What the tolerance depends on.

    Raises:
        ValueError: It is beyond the tolerance.
    """
    pairs = zip(found, exact, strict=False)
    error = max(float((one.float() - other).norm() / other.norm()) for one, other in pairs)
    if not error <= TOLERANCE[dtype]:
        raise ValueError(f"results must be within {TOLERANCE[dtype]} of those in fp32, got {error:.3g}")
    return error


def figures_of(place: Place, shape: str, side: str, compared: int = 5) -> Figures:
    """Return time, rate, memory, error and waits of a side that `Layer` has.

    Args:
        place: Where.
        shape: Its name.
        side: Its name in `Layer`.
        compared: How many of the results are compared: those of another layout of weights are not.
    """
    layer, routings, exact = layer_of(place, shape, torch.bfloat16)
    with place.device:
        run = layer.transformers(side) if side == "grouped_mm" else getattr(layer, side)
    error = error_of(results_of(layer, run, routings[0])[:compared], exact, layer.dtype)
    turn = cycle(routings)
    return {
        **rate(median_ms(place, lambda: run(next(turn))), layer),
        "peak MiB": peak_mib(place, lambda: run(next(turn))),
        "error": error,
        "waits": waits_of(place, lambda: run(next(turn))),
    }


def rate(milliseconds: float, layer: Layer) -> dict[str, float]:
    """Return the time, and the operations of the products in it: three times those of the forward."""
    shape = layer.shape
    operations = 3 * 2 * len(layer.x_PD) * 3 * shape.dim * shape.hidden
    return {"ms": milliseconds, "TFLOP/s": operations / milliseconds / 1e9}


def ours(place: Place, shape: str, kernels: str) -> Figures:
    """Measure our layer with these kernels.

    Args:
        place: Where.
        shape: Its name.
        kernels: The value of the variable that chooses them.
    """
    os.environ[VARIABLE] = kernels
    return figures_of(place, shape, "ours")


def transformers(place: Place, shape: str) -> Figures:
    """Measure transformers' best; its weights are laid out in another way, so their gradients are not compared."""
    return figures_of(place, shape, "grouped_mm", compared=3)


def loop(place: Place, shape: str) -> Figures:
    """Measure a loop over the experts."""
    return figures_of(place, shape, "loop")


def products(place: Place, shape: str) -> Figures:
    """Measure the six grouped products of a step alone, over sorted rows and equally full experts: the limit."""
    layer, _, _ = layer_of(place, shape, torch.bfloat16)
    x_PD, gate_up, down = (each.detach() for each in (layer.x_PD, layer.experts.gate_up, layer.experts.down))
    rows = len(x_PD) // len(gate_up)
    offsets_E = torch.arange(1, len(gate_up) + 1, dtype=torch.int32, device=place.device) * rows
    grouped_mm = partial(functional.grouped_mm, offs=offsets_E)
    gate_up_P = grouped_mm(x_PD, gate_up)
    hidden_PH = gate_up_P[:, : down.shape[1]].contiguous()

    def run() -> None:
        grouped_mm(x_PD, gate_up)
        grouped_mm(hidden_PH, down)
        grouped_mm(x_PD, down.mT)
        grouped_mm(hidden_PH.t(), x_PD)
        grouped_mm(gate_up_P, gate_up.mT)
        grouped_mm(x_PD.t(), gate_up_P)

    alone = grouped_mm(x_PD, gate_up)[:rows].float()
    error = error_of([alone], [x_PD[:rows].float() @ gate_up[0].float()], layer.dtype)
    return {**rate(median_ms(place, run), layer), "error": error, "waits": waits_of(place, run)}


IMPLEMENTATIONS = {
    "grouped products": (forward_by_groups, backward_by_groups, lambda offsets_E: offsets_E),
    "a product per expert": (forward_in_blocks, backward_in_blocks, lambda offsets_E: offsets_E.tolist()),
}
"""Forward and backward of our layer on a GPU, and the ends of the experts' rows as they take them."""


def by_implementation(place: Place, implementation: str, dtype: torch.dtype) -> Figures:
    """Measure an implementation of our layer on shape B, whether or not the layer would choose it.

    Args:
        place: Where.
        implementation: Its name.
        dtype: Of weights and tokens.
    """
    os.environ[VARIABLE] = "torch"
    layer, routings, exact = layer_of(place, "B", dtype)
    forward, backward, ends_of = IMPLEMENTATIONS[implementation]
    weights = (layer.experts.gate_up.detach(), layer.experts.down.detach())

    def run(routing: Routing) -> list[Tensor]:
        pair_ids_P, offsets_E = order_pairs(routing.expert_ids_TK, layer.shape.experts)
        given = (layer.x_TD.detach(), routing.weights_TK.detach(), *weights, pair_ids_P.int())
        ends = ends_of(offsets_E)
        y_TD, gate_up_P = forward(*given, ends)
        return [y_TD, *backward(layer.gradient_TD, *given, ends, gate_up_P)]

    error, turn = error_of(run(routings[0]), exact, dtype), cycle(routings)
    return {
        **rate(median_ms(place, lambda: run(next(turn))), layer),
        "error": error,
        "waits": waits_of(place, lambda: run(next(turn))),
    }
