"""Labels of how hard a place in a text is, read from the text itself.

Shape legend: N bytes of a text, B sequences, S tokens in each.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_CPP = (
    "auto bool case catch char class const constexpr default delete do double else enum false float for if inline \
int long namespace new nullptr private protected public return short sizeof static struct switch template this throw \
true try typename unsigned using virtual void while"
)
KEYWORDS = frozenset(keyword.kwlist) | frozenset(_CPP.split())
BRANCHES = frozenset(
    ("if", "elif", "else", "for", "while", "except", "catch", "case", "switch", "match", "and", "or")
)

DIFFICULTY_NAMES: dict[str, tuple[str, ...]] = {
    "word": ("keyword", "identifier", "number", "punctuation", "space", "other"),
    "indentation": ("none", "1 to 4", "5 to 8", "more"),
    "digits in line": ("none", "1 to 3", "4 or more"),
    "branches": ("none", "1 or 2", "3 or more"),
}
"""By label, what its numbers mean: the word of a byte; the columns its line is indented by; the digits in its line;
the words in the text at which code branches."""

_WORDS = re.compile(
    r"(?P<name>[A-Za-z_]\w*)|(?P<number>\d[\w.]*)|(?P<space>\s+)|(?P<punctuation>[!-/:-@\[-`{-~]+)", re.ASCII
)
_KINDS = {"number": 2, "punctuation": 3, "space": 4}


def difficulty_of(text: bytes) -> dict[str, np.ndarray]:
    """Return the labels of each byte; int64 (N,) for each of `DIFFICULTY_NAMES`."""
    characters = text.decode("latin-1")  # one character a byte
    words_N = np.full(len(text), 5)
    branches = 0
    for word in _WORDS.finditer(characters):
        is_name = word.lastgroup == "name"
        words_N[word.start() : word.end()] = (
            int(word.group() not in KEYWORDS) if is_name else _KINDS[str(word.lastgroup)]
        )
        branches += is_name and word.group() in BRANCHES
    return {
        "word": words_N,
        "indentation": _by_line(characters, [0, 4, 8], _indentation),
        "digits in line": _by_line(characters, [0, 3], _digits),
        "branches": np.full(len(text), np.searchsorted([0, 2], branches)),
    }


def label_tokens(tokens_BS: Tensor, token_bytes: Sequence[bytes]) -> dict[str, Tensor]:
    """Return the labels of the first byte of each token, in the text of its sequence; int64 (B, S), on the host.

    Args:
        tokens_BS: Token ids.
        token_bytes: The text of each token id.
    """
    labels: dict[str, list[np.ndarray]] = {name: [] for name in DIFFICULTY_NAMES}
    for tokens in tokens_BS.tolist():
        pieces = [token_bytes[token] for token in tokens]
        starts_S = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
        # One more byte, for tokens without text at the end.
        for name, labels_N in difficulty_of(b"".join(pieces) + b"\0").items():
            labels[name].append(labels_N[starts_S])
    return {name: torch.from_numpy(np.stack(rows)) for name, rows in labels.items()}


def _by_line(characters: str, ends: Sequence[int], measure: Callable[[str], int]) -> np.ndarray:
    lines = characters.split("\n")
    labels = np.searchsorted(ends, [measure(line) for line in lines])
    return labels.repeat([len(line) + 1 for line in lines])[: len(characters)]


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _digits(line: str) -> int:
    return sum("0" <= character <= "9" for character in line)
