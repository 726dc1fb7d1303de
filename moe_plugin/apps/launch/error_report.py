"""Why a process of a run failed, for its parent: in torchrun's error file, since the run's folder may be the reason."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""By it torchrun's agent names the file to a process that it starts."""


def report_error(line: str) -> None:
    """Report a user's error in one line, as `reported_error` reads it; without an agent there is no one to read it."""
    if file := os.environ.get(VARIABLE):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


def reported_error(failure: ProcessFailure) -> str | None:
    """Return what a failed process reported; None if it reported nothing."""
    return failure.message if Path(failure.error_file).is_file() else None
