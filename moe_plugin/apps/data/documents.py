"""What a source of text gives a corpus: documents, each with a file and a domain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    """A piece of text of one domain.

    One file may give several documents (a module's code and its docstrings' prose); the split is by `file`, so
    they are always on the same side.
    """

    file: str
    domain: str
    text: str


class Source(Protocol):
    """Where documents come from. Bad settings raise `ConfigError` in the constructor."""

    def fingerprint(self) -> str:
        """Return a text that changes whenever `documents` would; cheap to make."""
        ...

    def documents(self) -> Iterable[Document]:
        """Return every document, in an order that is the same on every machine."""
        ...


def sha256(text: str) -> str:
    """Return the hash of a text, the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_text(content: bytes) -> str | None:
    """Decode a file's content, with newlines as LF.

    Args:
        content: The file's bytes.

    Returns:
        The text, or None when it is not UTF-8 or holds a NUL (a binary file).
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")
