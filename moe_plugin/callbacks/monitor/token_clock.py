"""Tokens per second of training, without validation."""

from __future__ import annotations

import time


class TokenClock:
    """A stopwatch that is read once per window."""

    def __init__(self) -> None:
        """Start at rest."""
        self._seconds = 0.0
        self._since: float | None = None

    def go(self) -> None:
        """Begin or continue to measure."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Interrupt the measurement."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def rate(self, tokens: int) -> float:
        """Return tokens per second since the last reading; 0 if no time has passed."""
        is_running = self._since is not None
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        if is_running:
            self.go()
        return tokens / seconds if seconds else 0.0
