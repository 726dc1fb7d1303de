"""Sides of a comparison, each in its own process.

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
from typing import Any, TypeVar

import torch

Side = Callable[[Any], Any]


class Apart:
    """A side that is built and called in another process."""

    seconds = 0.0
    """Processor time that its calls took so far."""

    def __init__(self, build: Callable[[], Side], threads: int) -> None:
        """Start the process; does not wait until the side is built."""
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, other_end, threads), daemon=True)
        self._process.start()
        other_end.close()

    def __call__(self, given: Any) -> Any:
        """Return what the side returns for this."""
        return self.do(call, given)

    def do(self, action: Callable[[Any, Any], Any], given: Any) -> Any:
        """Return the result of an action on the side and what is given; see `answer`."""
        self.tell(action, given)
        return self.answer()

    def tell(self, action: Callable[[Any, Any], Any], given: Any) -> None:
        """Start an action; its `answer` must be fetched before the next."""
        self._connection.send((action, given))

    def answer(self) -> Any:
        """Return the result of the action.

        Raises:
            EOFError: The process has ended; it has printed why.
        """
        result, seconds = self._connection.recv()
        self.seconds += seconds
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


Key = TypeVar("Key")


@contextmanager
def apart(
    builders: Mapping[Key, Callable[[], Side]], threads: int | None = None
) -> Iterator[dict[Key, Apart]]:
    """Yield the sides that these build, by the same names; their processes end with the block.

    Args:
        builders: Called in the new processes.
        threads: Of torch, in each of them; None is as many as here.
    """
    sides = {name: Apart(build, threads or torch.get_num_threads()) for name, build in builders.items()}
    try:
        yield sides
    finally:
        for side in sides.values():
            side.close()


def call(side: Side, given: Any) -> Any:
    """Call the side: the plainest action."""
    return side(given)


def _serve(build: Callable[[], Side], connection: Connection, threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    side = build()
    while True:
        try:
            action, given = connection.recv()
        except EOFError:
            return
        begin = time.process_time()
        result = action(side, given)
        connection.send((result, time.process_time() - begin))
