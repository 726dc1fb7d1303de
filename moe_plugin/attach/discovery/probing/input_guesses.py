"""Guesses of what a module is called with: hidden states of many shapes, images, token ids.

Shape legend: B batch, S sequence, T tokens, D model width or channels, H, W height and width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NUM_TOKENS = 97
"""Tokens in a guess: a number that is not a size of a model, so it can be recognised in shapes."""
_FEW = 2

Input = Callable[[], Tensor]


def inputs(
    widths: Sequence[int], channels_1d: Sequence[int], channels_2d: Sequence[int], **kind: Any
) -> Iterator[Input]:
    """Yield first arguments, each of which makes `NUM_TOKENS` rows of scores in some kind of router.

    These are (B, S, D) and (T, D) hidden states, sequences with one choice each, signals and images with one choice per
    position or in total, and token ids.

    Args:
        widths: Guesses of D.
        channels_1d: Guesses of the channels of signals.
        channels_2d: Guesses of the channels of images.
        kind: dtype and device.
    """
    shapes = [shape for d in widths for shape in ((1, NUM_TOKENS, d), (NUM_TOKENS, d), (NUM_TOKENS, _FEW, d))]
    shapes += [shape for d in channels_1d for shape in ((NUM_TOKENS, d, 8), (1, d, NUM_TOKENS))]
    shapes += [shape for d in channels_2d for shape in ((NUM_TOKENS, d, 8, 8), (1, d, NUM_TOKENS, 1))]
    for shape in shapes:
        yield lambda shape=shape: torch.zeros(shape, **kind)
    yield lambda: torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device=kind["device"])


def others(module: nn.Module, x: Tensor) -> Iterator[list[Any]]:
    """Yield values for the further arguments without a default: None, a condition like the first one, a number.

    Args:
        module: The module to call.
        x: The first argument.
    """
    missing = _missing(module)
    yield [None] * missing
    if missing:
        yield [x] * missing
        yield [x[:, 0]] * missing
        yield [0] * missing


def _missing(module: nn.Module) -> int:
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in kinds for p in parameters)
