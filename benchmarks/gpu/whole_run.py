"""All parts, one after the other; what is known is written whenever it changes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.part_run import PartRun
from benchmarks.gpu.part_table import Part
from moe_plugin.apps.report.code_commit import code_commit
from moe_plugin.apps.report.json_file import write_json

ROOT = Path(__file__).parents[2]
PRELOADED = [
    *("torch._inductor.compile_fx", "lightning.pytorch", "transformers", "moe_plugin.apps.launch.train_job"),
    *("benchmarks.qwen3", "benchmarks.gpu.part_process"),
]
"""What a rehearsal imports once for all its processes; a package that is absent is left out."""
RESERVE = 5.0
"""Seconds of the time that are left for ending."""


def run_parts(parts: Sequence[Part], out: Path, minutes: float, dry: bool) -> dict[str, Any]:
    """Measure parts, and return what became of them: what `gpu.json` holds.

    Args:
        parts: Some of `PARTS`.
        out: The folder for `gpu.json` and `log.txt`.
        minutes: For all of them together.
        dry: Whether it is a rehearsal.
    """
    end = time.monotonic() + 60 * minutes - RESERVE
    result: dict[str, Any] = {
        "dry": dry,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "minutes": minutes,
        "commit": code_commit(),
        "machine": {},
        "parts": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    context = _context(dry)
    for number, part in enumerate(parts):
        left = sum(each.share for each in parts[number:])
        run = PartRun(part, max(0.0, end - time.monotonic()) * part.share / left, dry, out / "log.txt")
        result["parts"].append(run.result)

        def tell(run: PartRun = run) -> None:
            result["parts"][-1] = run.result
            result["machine"] |= run.machine
            write_json(out / "gpu.json", result)

        print(f"{part.name} ...", flush=True)
        run.run(context, tell)
        tell()
    return result


def _context(dry: bool) -> Any:
    """Return what starts processes: from nothing, so CUDA is begun in each; or with all imports done."""
    os.environ |= {"KINETO_LOG_LEVEL": "6", "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
    if not dry:
        return multiprocessing.get_context("spawn")
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _python_path() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return [given] if given else []
