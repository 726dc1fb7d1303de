"""Our Triton kernels against the operations of torch that they replace; a rehearsal interprets them.

Shape legend: T tokens, D width, K experts per token, P pairs of token and expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import moe_plugin
from benchmarks.gpu.line import Figures, Line
from benchmarks.gpu.place import Place
from benchmarks.gpu.timing import median_ms
from moe_plugin.experts.kernels import permute
from moe_plugin.experts.kernels.dispatch import order_pairs

KNOWN = {"permute_triton"}
TOKENS, WIDTH, EXPERTS, TOP_K = 32768, 2048, 128, 8
TOLERANCE = 0.01
"""How far a sum in bf16 may be from the same in fp32, of its norm."""


def lines(place: Place) -> Iterator[Line]:
    """Yield a fused router, if one is in use, and both directions of the permutation."""
    for found in sorted(Path(moe_plugin.__file__).parent.rglob("*_triton.py")):
        if found.stem not in KNOWN:
            raise NotImplementedError(f"{found} is not measured: give it a line in {__name__}")
    yield Line("fused router", dict, not_here="no fused router kernel is in use")
    for direction in ("permute", "unpermute"):
        yield Line(direction, partial(moved, place, direction), ("triton",))


def moved(place: Place, direction: str) -> Figures:
    """Measure one direction by both, and compare them with fp32.

    Args:
        place: Where.
        direction: The name of the function.

    Raises:
        ValueError: A result is too far from the same in fp32.
    """
    from moe_plugin.experts.kernels import permute_triton

    run = arguments(place, direction)
    exact = run(permute, torch.float32)
    figures: dict[str, float] = {}
    for name, kernels in (("torch", permute), ("triton", permute_triton)):
        error = float((run(kernels, torch.bfloat16).float() - exact).norm() / exact.norm())
        if not error <= TOLERANCE:
            raise ValueError(f"{name} must be within {TOLERANCE} of fp32, got {error:.3g}")
        milliseconds = median_ms(place, partial(run, kernels, torch.bfloat16))
        bytes_moved = 2 * (TOP_K + 1) * exact.numel() / (TOP_K if direction == "permute" else 1)
        figures |= {f"{name} us": 1e3 * milliseconds, f"{name} GB/s": bytes_moved / milliseconds / 1e6}
    return figures


def arguments(place: Place, direction: str) -> Callable[[ModuleType, torch.dtype], Tensor]:
    """Return a call of a function on random rows.

    Args:
        place: Where.
        direction: Its name.
    """
    torch.manual_seed(0)
    tokens, width, experts, top_k = place.size((TOKENS, WIDTH, EXPERTS, TOP_K), (8, 16, 4, 2))
    with place.device:
        pair_ids_P, _ = order_pairs(torch.rand(tokens, experts).topk(top_k).indices, experts)
        rows = torch.randn(tokens if direction == "permute" else tokens * top_k, width).bfloat16()
    rows_in = {dtype: rows.to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    more = (pair_ids_P.int() // top_k,) if direction == "permute" else (pair_ids_P.int(), tokens, top_k)
    return lambda kernels, dtype: getattr(kernels, direction)(rows_in[dtype], *more)
