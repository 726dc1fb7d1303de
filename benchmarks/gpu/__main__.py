"""Measure what only a GPU can tell: `python -m benchmarks.gpu --out DIR`; nothing is installed.

It keeps DIR/gpu.json up to date, and writes DIR/log.txt. A line that fails is noted and passed over. `--dry` rehearses
every part on the CPU at tiny sizes. `--table DIR/gpu.json` writes docs/gpu.md from a run.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.page import PAGE, page_of
from benchmarks.gpu.part_table import PARTS

NAMES = [part.name for part in PARTS]


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where gpu.json and log.txt go")
    parser.add_argument("--minutes", type=float, help="for everything (default: 10; a rehearsal has an hour)")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU at tiny sizes")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="PART", help=", ".join(NAMES))
    parser.add_argument(
        "--table",
        nargs="?",
        const="",
        metavar="JSON",
        help=f"write {PAGE.name} from a run; without JSON, from none",
    )
    arguments = parser.parse_args(words)
    if arguments.table is not None:
        result = json.loads(Path(arguments.table).read_text()) if arguments.table else None
        PAGE.write_text(page_of(result))
        return 0
    if arguments.out is None:
        parser.error("--out is required: where gpu.json and log.txt go")
    if (arguments.out / "gpu.json").exists():
        parser.error(f"--out must be a folder without a run, got {arguments.out}")
    return _run(parser, arguments)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    import torch

    from benchmarks.gpu.whole_run import run_parts

    if not arguments.dry and not torch.cuda.is_available():
        parser.error(f"there is no GPU that torch {torch.__version__} can use; --dry rehearses on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so what measures is ended too
    parts = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    minutes = arguments.minutes or (60.0 if arguments.dry else 10.0)
    result = run_parts(parts, arguments.out, minutes, arguments.dry)
    print(page_of(result))
    states = [line["state"] for part in result["parts"] for line in part["lines"]]
    broken = any(part["reason"] for part in result["parts"])
    return int(broken or "failed" in states or "not reached" in states)


if __name__ == "__main__":
    sys.exit(main())
