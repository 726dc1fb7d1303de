"""Verify or refuse one family; one row of the table of models."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers.utils import logging as transformers_logging

from moe_plugin.attach.balance import balance_
from moe_plugin.errors import AttachError
from tests.families.checks import Verified, verify
from tests.families.fused import fused
from tests.families.models import build

HEADER = (
    "| family | model | router | driven | experts/k | gate weights | result | fused |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Row:
    """A family in the table: verified, or refused with a reason."""

    family: str
    model: str
    verified: Verified | None
    refused: str = ""
    fused: str = "-"

    def __str__(self) -> str:
        """Return one line of Markdown."""
        if self.verified is None:
            return (
                f"| {self.family} | {self.model} | - | - | - | - | refused: {self.refused} | {self.fused} |"
            )
        v = self.verified
        cells = (self.family, self.model, v.router, v.driven, v.experts, v.gates)
        return f"| {' | '.join(cells)} | verified{f' ({v.notes})' if v.notes else ''} | {self.fused} |"


@contextmanager
def without_warnings(logger: str) -> Iterator[None]:
    """Make a logger report errors only."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def surveyed(family: str) -> Row:
    """Build the family's small model, and run every check on it.

    Raises:
        AssertionError: If the family is neither balanced as it must be nor refused.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings(), without_warnings("moe_plugin.attach.balance"):
        warnings.simplefilter("ignore")  # transformers' own, about configs and checkpointing
        model = build(family)
        try:
            refused = balance_(copy.deepcopy(model)).refused
        except AttachError as error:
            return Row(family, type(model).__name__, None, str(error))
        verified, is_fused = verify(model), fused(model)
    if refused:
        left_out = "; ".join(f"`{name}`: {reason}" for name, reason in refused.items())
        verified = Verified(**{**vars(verified), "notes": f"left out {left_out}"})
    return Row(family, type(model).__name__, verified, fused=is_fused)
