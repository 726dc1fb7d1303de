"""Text from files and file names, made safe for a terminal."""

from __future__ import annotations


def printable(text: object) -> str:
    r"""Return a text in one line, with whatever a terminal would obey instead of showing it written out.

    That is every control character, also line breaks and those that turn the direction of writing: an escape sequence
    becomes ``\x1b[31m``. Pass the result to rich as a `Text`, which knows no markup.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
