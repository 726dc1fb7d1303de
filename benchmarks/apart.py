"""Sides of a comparison, each in a process of its own.

Sides of one process share what its libraries keep. oneDNN keeps 1,024 kernels, one for each number of rows a product
has had: a side that meets many of them would slow down the others.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

Side = Callable[[Any], Any]


class Apart:
    """A side that is built and called in another process."""

    seconds = 0.0
    """What its calls took so far, there: of the processor with one thread, by the clock with several."""

    def __init__(self, build: Callable[[], Side]) -> None:
        """Starts the process, and does not wait for the side to be built."""
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(build, other_end, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        other_end.close()

    def __call__(self, given: Any) -> Any:
        """What the side returns for this."""
        return self.do(_call, given)

    def do(self, action: Callable[[Side, Any], Any], given: Any) -> Any:
        """What an action returns, which gets the side and what is given.

        Raises:
            EOFError: The process has ended; it has printed why.
        """
        self._connection.send((action, given))
        result, seconds = self._connection.recv()
        self.seconds += seconds
        return result

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join()


@contextmanager
def apart(builders: Mapping[str, Callable[[], Side]]) -> Iterator[dict[str, Apart]]:
    """The sides that these build, by the same names; their processes end with the block."""
    sides = {name: Apart(build) for name, build in builders.items()}
    try:
        yield sides
    finally:
        for side in sides.values():
            side.close()


def _serve(build: Callable[[], Side], connection: Connection, threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    side, clock = build(), time.process_time if threads == 1 else time.perf_counter
    while True:
        try:
            action, given = connection.recv()
        except EOFError:
            return
        begin = clock()
        result = action(side, given)
        connection.send((result, clock() - begin))


def _call(side: Side, given: Any) -> Any:
    return side(given)
