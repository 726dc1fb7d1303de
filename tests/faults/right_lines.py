"""Right command lines near the borders of what is allowed: they must stay accepted."""

from __future__ import annotations

from tests.faults.wrong_lines import PLANNED, SMALL, Line

TRAIN: list[tuple[Line, str]] = [
]
SIMULATE: list[tuple[Line, str]] = [
]
PLAN: list[tuple[Line, str]] = [
]
REPORT: list[tuple[Line, str]] = [
]
RIGHT: dict[str, tuple[list[str], list[tuple[Line, str]]]] = {
    "moe-train": (SMALL, TRAIN),
    "moe-simulate": ([], SIMULATE),
    "moe-plan": (PLANNED, PLAN),
    "moe-report": ([], REPORT),
}
