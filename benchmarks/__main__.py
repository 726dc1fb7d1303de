"""Measure speed: `python -m benchmarks [CASE ...] [OPTION=VALUE ...]` prints tables and writes JSON.

Without a case it runs all of them. Each runs in its own process, once with the C library's memory allocator as it
is and once tuned to keep what was freed. Options, such as rounds=200, reach every named case that has them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.case import case_names, options_of, summary_of
from benchmarks.machine import MALLOC, describe, load
from benchmarks.row import Row
from benchmarks.table import as_table

SILENT = {"KINETO_LOG_LEVEL": "6"}
"""Keeps torch's profiler, which measures memory, from printing every start and stop."""
CONSOLE = Console() if sys.stdout.isatty() else Console(width=150)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the number of cases that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["cases:", *(f"  {name:<16} {summary_of(name)}" for name in case_names())]),
    )
    parser.add_argument("words", nargs="*", metavar="CASE or OPTION=VALUE")
    parser.add_argument("--malloc", choices=[*MALLOC, "both"], default="both")
    parser.add_argument("--threads", type=int, default=1, help="of torch; times are of all threads together")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    arguments = parser.parse_args(words)
    options = dict(word.split("=", 1) for word in arguments.words if "=" in word)
    names = [word for word in arguments.words if "=" not in word] or case_names()
    if wrong := _wrong_words(names, options):
        parser.error(wrong)
    settings = list(MALLOC) if arguments.malloc == "both" else [arguments.malloc]
    runs: list[dict[str, Any]] = []
    for name, malloc in product(names, settings):
        runs.append(_measure(name, malloc, arguments.threads, options))
        _write(arguments.out, arguments.threads, options, runs)  # each time: all cases take an hour or two
    CONSOLE.print(f"Written to {arguments.out}", soft_wrap=True, highlight=False)
    return sum(run["failed"] for run in runs)


def _wrong_words(names: Sequence[str], options: Mapping[str, str]) -> str | None:
    if unknown := sorted(set(names) - set(case_names())):
        return f"cases must be among {', '.join(case_names())}, got {', '.join(unknown)}"
    known = {option for name in names for option in options_of(name)}
    if unknown := sorted(set(options) - known):
        return f"options of {', '.join(names)} are {', '.join(sorted(known))}, got {', '.join(unknown)}"
    return None


def _measure(name: str, malloc: str, threads: int, options: Mapping[str, str]) -> dict[str, Any]:
    """Run a case in its own process and print its table."""
    environment = os.environ | SILENT | MALLOC[malloc] | {"OMP_NUM_THREADS": str(threads)}
    words = [f"{key}={value}" for key, value in options.items()]
    before = load()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows"
        command = [sys.executable, "-m", "benchmarks.case", name, str(target), str(threads), *words]
        failed = subprocess.run(command, env=environment).returncode != 0
        lines = target.read_text().splitlines() if target.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    CONSOLE.print(as_table(f"{name}, malloc {malloc}" + (", FAILED" if failed else ""), rows))
    return {
        "case": name,
        "malloc": malloc,
        "failed": failed,
        "load_before": before,
        "load_after": load(),
        "rows": [vars(row) | {"met": row.is_met} for row in rows],
    }


def _write(target: Path, threads: int, options: Mapping[str, str], runs: list[dict[str, Any]]) -> None:
    result = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": describe(),
        "threads": threads,
        "options": dict(options),
        "malloc_settings": MALLOC,
        "cases": runs,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
