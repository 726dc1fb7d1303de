"""The end of a process that has used process groups."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End this process once everything is written, without taking the interpreter apart.

    Threads of gloo outlive their process group. One that frees a tensor's last Python reference while the
    interpreter ends calls `std::terminate`, and a run that has finished exits with -6.

    Args:
        code: The exit code.
    """
    atexit._run_exitfuncs()  # loggers such as wandb's finish there
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe or terminal: the rest is not read
            stream.flush()
    os._exit(code)


def run_and_end(task: Callable[[], object]) -> NoReturn:
    """Do a process's work, then end it; an unexpected error ends it as always."""
    try:
        task()
    except SystemExit as error:
        end_process(error.code if isinstance(error.code, int) else error.code is not None)
    end_process(os.EX_OK)
