"""One part: its processes, their time, and what became of each line."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.part_process import run_lines
from benchmarks.gpu.part_table import Part

LONGEST = 400
"""Characters of a reason."""
LINE_SHARE, PATIENCE = 0.5, 30.0
"""A line may take this share of its part's time, and this many seconds in any case."""


class PartRun:
    """A part that is measured.

    A line that fails ends its process, and another process takes the next. A line that takes too long is ended too.
    At the end of the part's time the rest is left out.
    """

    def __init__(self, part: Part, seconds: float, dry: bool, log: Path) -> None:
        """Measure nothing yet.

        Args:
            part: Which.
            seconds: Its time.
            dry: Whether it is a rehearsal.
            log: Gets all that its processes print.
        """
        self.part, self.seconds, self.dry, self.log = part, seconds, dry, log
        self.machine: dict[str, Any] = {}
        self.names: list[str] = []
        self.found: dict[int, dict[str, Any]] = {}
        self.reason = ""

    @property
    def result(self) -> dict[str, Any]:
        """What became of the part so far, for the JSON."""
        unreached = {"state": "not reached"}
        lines = [{"name": name, **self.found.get(n, unreached)} for n, name in enumerate(self.names)]
        return {"part": self.part.name, "limit_s": round(self.seconds), "reason": self.reason, "lines": lines}

    def run(self, context: Any, tell: Callable[[], object]) -> None:
        """Measure.

        Args:
            context: Starts processes.
            tell: Called after each change of `result`.
        """
        until, first = time.monotonic() + self.seconds, 0
        while True:
            printed = self.log.stat().st_size if self.log.exists() else 0
            ended = self._run_process(context, first, until, tell)
            if not ended:
                return
            last = max(self.found, default=-1)
            why = f"{self._last_words(printed)} ({ended})"[-LONGEST:]
            if last < first or self.found[last]["state"] != "failed":  # It ended outside of any line.
                self.reason = why
                return
            self.found[last]["reason"] = why
            tell()
            first = last + 1
            if first >= len(self.names) or time.monotonic() > until:
                return

    def _run_process(self, context: Any, first: int, until: float, tell: Callable[[], object]) -> str:
        """Run lines from one on; return how the process ended; empty if it got to its own end."""
        with tempfile.TemporaryDirectory() as folder:
            events = Path(folder, "events")
            events.touch()
            process: Any = context.Process(
                target=run_lines, args=(self.part, first, self.dry, events, self.log)
            )
            process.start()
            try:
                too_long = self._watch(process, events, until, tell)
            finally:
                if process.is_alive():
                    _kill(process)
            self._read(events)
            return too_long or (f"exit code {process.exitcode}" if process.exitcode else "")

    def _watch(self, process: Any, events: Path, until: float, tell: Callable[[], object]) -> str:
        """Wait for the end of a process; return why it must be ended, empty if it has ended."""
        while process.is_alive():
            process.join(0.2)
            if self._read(events):
                tell()
            if time.monotonic() > until:
                return "out of time"
            noted = events.stat()
            if noted.st_size and time.time() - noted.st_mtime > max(PATIENCE, LINE_SHARE * self.seconds):
                return "it took too long"
        return ""

    def _read(self, events: Path) -> bool:
        """Take in what the process has noted; return whether that is anything new."""
        before = self.result
        whole_lines, _, _ = events.read_text().rpartition("\n")
        for text in whole_lines.splitlines():
            event = json.loads(text)
            if "lines" in event:
                self.names, self.machine = event["lines"], event["machine"]
            else:
                self.found[event.pop("number")] = event
        return self.result != before

    def _last_words(self, printed: int) -> str:
        text = self.log.read_bytes()[printed:].decode(errors="replace") if self.log.exists() else ""
        words = [line.strip() for line in text.splitlines() if line.strip()]
        return words[-1] if words else "nothing was printed"


def _kill(process: Any) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # It has not made its group yet.
        process.kill()
    process.join()
