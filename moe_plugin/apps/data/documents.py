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


DECODING_ERRORS = {"strict": "", "replace": "\N{REPLACEMENT CHARACTER}", "ignore": ""}
"""Ways of `open` to treat bytes that are not text, and what becomes of a NUL."""


def sha256(text: str) -> str:
    """Return the hash of a text, the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_text(content: bytes, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Decode a file's content, without its byte order mark and with newlines as LF.

    Args:
        content: The file's bytes.
        encoding: That of `open`.
        errors: One of `DECODING_ERRORS`. A NUL, which separates documents, is such an error.

    Raises:
        UnicodeDecodeError: If it is not text of this encoding.
    """
    text = content.decode(encoding, errors)
    if "\0" in text and errors == "strict":
        start = len(text[: text.index("\0")].encode(encoding))
        raise UnicodeDecodeError(encoding, content, start, start + 1, "a NUL (binary, or UTF-16?)")
    text = text.replace("\0", DECODING_ERRORS[errors]).removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")
