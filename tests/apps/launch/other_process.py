"""Another process that does something within a block, and then waits for its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


@contextmanager
def in_other_process(held: Callable[[], AbstractContextManager[object]]) -> Iterator[int]:
    """Enter a block in a forked process, which is killed at the end; yield its number."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with held():
                os.write(writer, b"entered")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 7) == b"entered"
        yield process
    finally:
        os.close(reader)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
