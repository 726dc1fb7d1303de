"""Which commit the running code is."""

from __future__ import annotations

import subprocess
from pathlib import Path


def code_commit() -> str:
    """Return the commit of the code that runs, with a + if files differ from it; empty without a repository."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
