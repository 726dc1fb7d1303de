"""A tokenised, split corpus: a token stream per split and domain, and the manifest of what was read."""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from moe_plugin.apps.data.documents import Document, Source, sha256
from moe_plugin.apps.data.split import file_sizes, validation_files
from moe_plugin.apps.data.tokenization import Encode, Tokenizer
from moe_plugin.errors import ConfigError

SPLITS = ("train", "validation")

Streams = dict[str, Tensor]
"""'split/domain' -> flat token ids (uint8 or int32), documents in order, each followed by the separator."""


class Corpus(NamedTuple):
    """Tokens in memory and where they came from.

    Attributes:
        streams: 'split/domain' -> flat token ids.
        manifest: `documents` (file, domain, split, bytes, sha256 of each), `totals` (split -> domain -> files,
            bytes, tokens), the settings, and a `digest` of what was read.
    """

    streams: Streams
    manifest: dict[str, Any]

    @property
    def domains(self) -> list[str]:
        """Names of the domains, sorted; a domain's label is its place here."""
        return sorted(self.manifest["totals"]["train"])


def build_corpus(source: Source, tokenizer: Tokenizer, validation_fraction: float) -> Corpus:
    """Read, deduplicate, split and tokenise a source, see `load_or_build`.

    Raises:
        ConfigError: If a domain has no text or cannot be split by file.
    """
    with _garbage_uncollected():
        documents = _distinct(source.documents())
    if not documents:
        raise ConfigError("source", "must give text, but has no file", fix="Point it at text files.")
    held_out = validation_files(file_sizes(documents), validation_fraction)
    splits = {
        name: [d for d in documents if (d.file in held_out) == (name == "validation")] for name in SPLITS
    }
    encode = tokenizer.fit(document.text for document in splits["train"])
    streams = {
        f"{split}/{domain}": stream for split in SPLITS for domain, stream in _encoded(splits[split], encode)
    }
    manifest = {
        "python": platform.python_version(),
        "source": source.fingerprint(),
        "tokenizer": tokenizer.fingerprint(),
        "validation_fraction": validation_fraction,
        "totals": {split: _totals(split, splits[split], streams) for split in SPLITS},
        "documents": [_entry(split, document) for split in SPLITS for document in splits[split]],
    }
    manifest["digest"] = sha256(json.dumps([manifest[k] for k in ("tokenizer", "documents")]))
    return Corpus(streams, manifest)


@contextmanager
def _garbage_uncollected() -> Iterator[None]:
    """Turn the garbage collector off: parsing makes millions of small objects and few cycles; it would take 40%."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _distinct(documents: Iterable[Document]) -> list[Document]:
    """Return the first of identical texts, as no copy of a training text is validated on; without blank ones.

    Raises:
        ConfigError: If nothing is left of a domain.
    """
    distinct: dict[str, Document] = {}
    domains = set()
    for document in documents:
        domains.add(document.domain)
        if document.text.strip():
            distinct.setdefault(sha256(document.text), document)
    for domain in sorted(domains - {document.domain for document in distinct.values()}):
        rule = f"must give text in domain '{domain}', but all of it is blank or already in another domain"
        raise ConfigError("source", rule, fix="Give it other files or leave the domain out.")
    return list(distinct.values())


def _encoded(documents: list[Document], encode: Encode) -> Iterable[tuple[str, Tensor]]:
    for domain in sorted({document.domain for document in documents}):
        yield domain, encode([document.text for document in documents if document.domain == domain])


def _totals(split: str, documents: list[Document], streams: Streams) -> dict[str, dict[str, int]]:
    totals = {}
    for domain in sorted({document.domain for document in documents}):
        texts = [document.text for document in documents if document.domain == domain]
        totals[domain] = {
            "files": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": streams[f"{split}/{domain}"].numel(),
        }
    return totals


def _entry(split: str, document: Document) -> dict[str, Any]:
    return {
        "file": document.file,
        "domain": document.domain,
        "split": split,
        "bytes": len(document.text.encode()),
        "sha256": sha256(document.text),
    }
