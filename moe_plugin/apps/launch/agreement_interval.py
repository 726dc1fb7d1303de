"""How often ranks agree on something: about once a second, after equally many occasions on all of them."""

from __future__ import annotations

import time

SECONDS = 1.0


class AgreementInterval:
    """Lets occasions pass between agreements, so many that a second passes.

    Ranks measure different times, so each proposes a number, and the smallest holds for all.
    """

    def __init__(self) -> None:
        """Make the first occasion due."""
        self.start()

    def start(self) -> None:
        """Begin again, when occasions become longer or shorter: the next one is due."""
        self._stride = self._left = 1
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Count an occasion, and return whether to agree on it."""
        self._left -= 1
        return self._left == 0

    def proposal(self) -> int:
        """Return after how many occasions this rank would agree again; at most twice as many as this time."""
        elapsed = time.monotonic() - self._since
        return max(1, min(2 * self._stride, int(self._stride * SECONDS / max(elapsed, 1e-9))))

    def agreed(self, stride: int) -> None:
        """Take the number on which all ranks agreed."""
        self._stride = self._left = stride
        self._since = time.monotonic()
