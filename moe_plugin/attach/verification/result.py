"""What a check found, and how it ends early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MODEL_ERRORS = (
    *(RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError),
    *(NotImplementedError, ArithmeticError, MemoryError),
)
"""What a model may raise that is run in a way for which it is not made, or that balancing has broken."""


@dataclass(frozen=True)
class CheckResult:
    """What one check of the battery found.

    Attributes:
        name: The check.
        status: 'passed', 'failed' or 'skipped'.
        detail: What was expected and seen, or why the check was skipped.
    """

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str = ""


class CheckFailed(Exception):  # noqa: N818
    """Something does not hold; the text is what was expected and what was seen."""


class CheckSkipped(Exception):  # noqa: N818
    """A check does not apply to this model; the text is the reason."""


def require(holds: object, otherwise: str) -> None:
    """Fail the check unless something holds.

    Args:
        holds: What must be true.
        otherwise: What was expected and what was seen.

    Raises:
        CheckFailed: If it does not hold.
    """
    if not holds:
        raise CheckFailed(otherwise)


def skip_if(applies: object, reason: str) -> None:
    """Skip the check if something applies.

    Args:
        applies: Whether the check makes no sense.
        reason: Why.

    Raises:
        CheckSkipped: If it applies.
    """
    if applies:
        raise CheckSkipped(reason)


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
