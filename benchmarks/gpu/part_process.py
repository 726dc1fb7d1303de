"""The process in which the lines of a part are measured; it notes each as a line of JSON."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.card import describe_here
from benchmarks.gpu.line import Figures
from benchmarks.gpu.part_table import Part
from benchmarks.gpu.place import Place


def run_lines(part: Part, first: int, dry: bool, events: Path, log: Path) -> None:
    """Measure lines. An error ends the process: its `Figures` may have left the device broken.

    Args:
        part: Whose lines.
        first: How many of them to leave out.
        dry: Whether it is a rehearsal.
        events: Is written.
        log: Gets all that is printed.
    """
    os.setsid()
    with log.open("a") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    place = Place(dry)
    if dry:
        torch.compiler.set_stance("force_eager")
    lines = list(part.lines(place))
    with events.open("a", buffering=1) as file:

        def note(**event: Any) -> None:
            file.write(json.dumps(event) + "\n")

        note(lines=[line.name for line in lines], machine=describe_here(place))
        for number, line in list(enumerate(lines))[first:]:
            if line.obstacle:
                note(number=number, state="passed over", reason=line.obstacle)
                continue
            note(number=number, state="failed", reason="the process ended")
            _measure(
                line.measure, lambda number=number, **found: note(number=number, state="measured", **found)
            )
    sys.stdout.flush()
    os._exit(0)  # What a library does at the end, such as NCCL, could take the time of the next part.


def _measure(measure: Callable[[], Figures], note: Callable[..., None]) -> None:
    begin = time.perf_counter()
    figures = dict(measure())
    seconds = time.perf_counter() - begin
    if wrong := {key: v for key, v in figures.items() if isinstance(v, float) and not math.isfinite(v)}:
        raise ValueError(f"figures must be finite, got {wrong}")
    note(figures=figures, seconds=round(seconds, 1))
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
