"""Tries many command lines in one process: ``python -m tests.faults.line_battery moe-train wrong`` in an empty folder.

Each line runs twice at most: first while torch and Lightning cannot be imported, which shows whether it is answered
before that takes seconds, and only if it needs them once more.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tests.faults.right_lines import RIGHT
from tests.faults.wrong_lines import WRONG, Line

MODULES = {
    "moe-train": "moe_plugin.apps.train",
    "moe-simulate": "moe_plugin.apps.simulate.__main__",
    "moe-study": "moe_plugin.apps.study.__main__",
    "moe-plan": "moe_plugin.apps.plan.command",
    "moe-report": "moe_plugin.apps.report.__main__",
}
TABLES = {"wrong": WRONG, "right": RIGHT}
SLOW = {"torch", "lightning", "transformers", "matplotlib"}


class Answer(NamedTuple):
    """What came of a line.

    Attributes:
        words: The line.
        part: What its one line should hold; of a right line, a file that it leaves.
        code: Exit code; None if the program ended with a trace.
        out: Standard output.
        err: Standard error.
        created: What is there afterwards and was not before, or has other content.
        before_torch: Whether it was answered without importing torch or Lightning.
        seconds: Processor time, without that of importing torch and Lightning.
    """

    words: list[str]
    part: str
    code: int | None
    out: str
    err: str
    created: list[str]
    before_torch: bool
    seconds: float


class WantsTorch(BaseException):
    """Something slow would have been imported."""


class _Closed(Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        raise WantsTorch(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        raise WantsTorch(module.__name__)


class _Gate(MetaPathFinder):
    """Lets slow packages be found but not imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name.partition(".")[0] in SLOW else None
        if spec is not None:
            spec.loader = _Closed()
        return spec


def tried(command: str, words: list[str], part: str, *, before_torch: bool) -> Answer | None:
    """Runs a line and removes what it leaves; None if it wants torch."""
    before = _files()
    try:
        answer = _answer(command, words, part, before, before_torch=before_torch)
        _remove_(answer.created, before)
    except WantsTorch:
        return None
    return answer


def _answer(
    command: str, words: list[str], part: str, before: dict[Path, bytes | None], *, before_torch: bool
) -> Answer:
    out, err, clock = io.StringIO(), io.StringIO(), time.process_time()
    sys.argv = [command, *words]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _limit(),
        warnings.catch_warnings(),
    ):
        try:
            code = importlib.import_module(MODULES[command]).main(words) or 0
        except SystemExit as end:
            code = end.code
        except Exception as error:
            code = None
            err.write(f"TRACE {type(error).__name__}: {error}")
    seconds = time.process_time() - clock
    after = _files()
    created = sorted(str(path) for path in after if after[path] != before.get(path, b"not there"))
    created += sorted(f"{path} is gone" for path in before if path not in after)
    return Answer(words, part, code, out.getvalue(), err.getvalue(), created, before_torch, seconds)


def _files() -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path().rglob("*"))}


def _remove_(created: list[str], before: dict[Path, bytes | None]) -> None:
    for path in map(Path, created):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    for path, content in before.items():
        if content is not None and (not path.is_file() or path.read_bytes() != content):
            path.write_bytes(content)


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def end(*_: object) -> None:
        raise TimeoutError("still running")

    # Processor time for loops, and time for waiting.
    for kind, timer, seconds in (
        (signal.SIGPROF, signal.ITIMER_PROF, 20),
        (signal.SIGALRM, signal.ITIMER_REAL, 120),
    ):
        signal.signal(kind, end)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


def split(line: Line) -> list[str]:
    """Returns a line's words."""
    return line.split() if isinstance(line, str) else line


def main(command: str, kind: str) -> None:
    """Prints one JSON line per command line."""
    first, lines = TABLES[kind][command]
    waiting = [([*first, *split(line)], part) for line, part in lines]
    sys.meta_path.insert(0, gate := _Gate())
    waiting = [(words, part) for words, part in waiting if not _told(command, words, part, before_torch=True)]
    sys.meta_path.remove(gate)
    importlib.import_module("moe_plugin.apps.launch.validate_config")
    for words, part in waiting:
        _told(command, words, part, before_torch=False)


def _told(command: str, words: list[str], part: str, *, before_torch: bool) -> bool:
    """Tries a line and prints what came of it, unless it wants torch."""
    answer = tried(command, words, part, before_torch=before_torch)
    if answer is not None:
        print(json.dumps(answer._asdict()), flush=True)
    return answer is not None


if __name__ == "__main__":
    main(*sys.argv[1:])
