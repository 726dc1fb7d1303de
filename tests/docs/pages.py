"""The pages that people read, and the code in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PLACEHOLDERS = re.compile(r"\b[A-Z]{3,}\b(?!=)|\.\.\.|\{")
"""What a reader is to replace: a command in a sentence that has one is not checked."""


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of a page, in blocks and in sentences."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line.replace("$", ""), comments=True)
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", text):
        if re.match(r"(moe-\w+|make|python -m) (?!-)", span) and not PLACEHOLDERS.search(span):
            yield shlex.split(" ".join(span.split()))
