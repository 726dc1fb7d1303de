"""Compare what runs gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moe_plugin.attach.site import Site
from moe_plugin.attach.verification.result import require
from moe_plugin.attach.verification.subject import Outcome

Alike = Callable[[Tensor, Tensor], bool]


def identical(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers; NaN equals NaN.

    Args:
        one: A tensor.
        other: Another.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def close(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors differ by no more than the rounding of another order of operations.

    Args:
        one: A tensor.
        other: Another.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = one[one.isfinite()].abs()
    size = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6 * size, equal_nan=True)


def require_alike(expected: Outcome, seen: Outcome, alike: Alike, when: str) -> None:
    """Fail the check if outputs or gradients differ.

    Args:
        expected: What must be seen.
        seen: What was seen.
        alike: How closely they must agree: `identical` or `close`.
        when: In what situation, for the failure.
    """
    numbers = len(expected.outputs), len(seen.outputs)
    require(numbers[0] == numbers[1], f"{when} the model returns {numbers[1]} tensors, expected {numbers[0]}")
    wrong = _first_difference(dict(enumerate(expected.outputs)), dict(enumerate(seen.outputs)), alike)
    require(
        wrong is None, f"{when} output tensor {wrong} differs{_by(expected.outputs, seen.outputs, wrong)}"
    )
    others = sorted(expected.gradients.keys() ^ seen.gradients.keys())
    require(not others, f"{when} other parameters have gradients: {others[:3]} in one run only")
    wrong = _first_difference(expected.gradients, seen.gradients, alike)
    require(
        wrong is None,
        f"{when} the gradient of {wrong} differs{_by(expected.gradients, seen.gradients, wrong)}",
    )


def require_same_counts(expected: Mapping[str, Site], seen: Mapping[str, Site], when: str) -> None:
    """Fail the check if sites have not counted the same.

    Args:
        expected: Sites that counted as usual.
        seen: The same sites of another copy.
        when: In what situation, for the failure.
    """
    for name, site in expected.items():
        for kind in ("counts", "eval_counts"):
            ours, theirs = getattr(site, kind).tolist(), getattr(seen[name], kind).tolist()
            require(ours == theirs, f"{name}: {when} the {kind} are {theirs}, expected {ours}")


def _first_difference(expected: Mapping, seen: Mapping, alike: Alike) -> object:
    return next((key for key, value in expected.items() if not alike(value, seen[key])), None)


def _by(expected: Sequence[Tensor] | Mapping, seen: Sequence[Tensor] | Mapping, key: object) -> str:
    """Return by how much two tensors differ, as the end of a sentence."""
    if key is None:
        return ""
    one, other = expected[key], seen[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
    if one.shape != other.shape or one.dtype != other.dtype:
        return f": expected {one.dtype} {tuple(one.shape)}, got {other.dtype} {tuple(other.shape)}"
    return f" by up to {(one.double() - other.double()).abs().max().item():.2g}"
