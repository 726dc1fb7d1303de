"""Text to token streams: bytes by default, a locally trained byte-pair encoding as an extra."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe_plugin.extras import require
from moe_plugin.number_checks import check_integer

SEPARATOR = 0
"""Token after each document, in every vocabulary: a text never holds a NUL."""

Encode = Callable[[Sequence[str]], Tensor]
"""Texts -> one flat stream of token ids, each text followed by `SEPARATOR`."""


class Tokenizer(Protocol):
    """A vocabulary, given or learned, and how texts are encoded in it."""

    vocab_size: int

    def fingerprint(self) -> str:
        """Return a text that changes whenever the encoding would."""
        ...

    def fit(self, texts: Iterable[str]) -> Encode:
        """Learn from the training texts how to encode."""
        ...


class Bytes:
    """The 256 bytes of UTF-8 are the vocabulary; there is nothing to learn. Streams are uint8."""

    vocab_size = 256

    def fingerprint(self) -> str:
        """Return the name: there are no settings."""
        return "bytes"

    @property
    def token_classes(self) -> tuple[list[str], Tensor]:
        """Names of the classes of bytes, and the class of each; int64 (256,)."""
        return list(BYTE_CLASSES), torch.tensor([_class_of(byte) for byte in range(256)])

    @property
    def token_bytes(self) -> list[bytes]:
        """The text of each token id."""
        return [bytes([byte]) for byte in range(256)]

    def fit(self, texts: Iterable[str]) -> Encode:
        """Return the encoding, the same for any `texts`."""
        return _encode_bytes


BYTE_CLASSES = ("letter", "capital", "digit", "space", "newline", "punctuation", "other")


def _class_of(byte: int) -> int:
    character = chr(byte)
    tests = (
        "a" <= character <= "z",
        "A" <= character <= "Z",
        "0" <= character <= "9",
        character in " \t",
        character in "\r\n",
        character in string.punctuation,
    )
    return next((place for place, is_so in enumerate(tests) if is_so), len(tests))


def _encode_bytes(texts: Sequence[str]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(text.encode() + b"\0" for text in texts)), dtype=torch.uint8)


class BytePairs:
    """Byte-pair encoding over bytes, trained on the training split only. Streams are int32.

    Needs the extra `moe_plugin[hf]` (the `tokenizers` package).
    """

    def __init__(self, vocab_size: int = 4096) -> None:
        """Create the tokenizer, not yet trained.

        Args:
            vocab_size: The 256 bytes, the separator, and the merges.

        Raises:
            ConfigError: If `vocab_size` is below 257 or `tokenizers` is missing.
        """
        check_integer("tokenizer.vocab_size", vocab_size, least=257)
        require("tokenizers", "tokenizer")
        self.vocab_size = vocab_size

    def fingerprint(self) -> str:
        """Return the settings and the trainer's version."""
        import tokenizers

        return f"byte pairs {self.vocab_size} by tokenizers {tokenizers.__version__}"

    def fit(self, texts: Iterable[str]) -> Encode:
        """Train on `texts` and return the encoding."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=["\0"],  # takes id 0, the separator
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)

        def encode(texts: Sequence[str]) -> Tensor:
            encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return torch.tensor([i for e in encodings for i in (*e.ids, SEPARATOR)], dtype=torch.int32)

        return encode
