"""Numbers as text in the cells of tables."""

from __future__ import annotations

DASH = "–"  # noqa: RUF001


def number_cell(value: float | None, style: str = "") -> str:
    """Return a number as text, and a dash for None.

    Args:
        value: The number.
        style: Its format; by default all digits of an integer, and four of others.
    """
    if value is None:
        return DASH
    return f"{value:{style or (',d' if isinstance(value, int) else ',.4g')}}"
