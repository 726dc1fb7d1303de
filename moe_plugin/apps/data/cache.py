"""Corpora on disk: a safetensors file of token streams and a JSON manifest."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file

from moe_plugin.apps.data.corpus import Corpus, build_corpus
from moe_plugin.apps.data.documents import Source, sha256
from moe_plugin.apps.data.tokenization import Tokenizer
from moe_plugin.errors import ConfigError

_FORMAT = 1  # raise it when the same settings would give other tokens


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return where corpora are kept: `folder`, else `$MOE_PLUGIN_CACHE`, else the user's cache folder."""
    if folder is not None:
        return Path(folder).expanduser()
    if named := os.environ.get("MOE_PLUGIN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_plugin"


def load_or_build(source: Source, tokenizer: Tokenizer, validation_fraction: float, folder: Path) -> Corpus:
    """Load the corpus of these settings, or build and keep it.

    Both files are put in place whole, the tokens last: another process never reads half a corpus.

    Args:
        source: Where the text comes from.
        tokenizer: How it becomes tokens.
        validation_fraction: Share of each domain's bytes held out.
        folder: Where corpora are kept.

    Raises:
        ConfigError: If the corpus cannot be built or the folder cannot be written.
    """
    settings = [
        _FORMAT,
        platform.python_version(),
        source.fingerprint(),
        tokenizer.fingerprint(),
        validation_fraction,
    ]
    key = sha256(json.dumps(settings))[:20]
    tokens, manifest = folder / f"corpus-{key}.safetensors", folder / f"corpus-{key}.json"
    if tokens.exists():
        return Corpus(load_file(tokens), json.loads(manifest.read_text(encoding="utf-8")))
    corpus = build_corpus(source, tokenizer, validation_fraction)
    with _writable(folder):
        text = json.dumps(corpus.manifest, indent=1)
        _put(manifest, lambda path: path.write_text(text, encoding="utf-8"))
        _put(tokens, lambda path: save_file(corpus.streams, path))
    return corpus


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        fix = "Set data.cache or the variable MOE_PLUGIN_CACHE to another folder."
        raise ConfigError("data.cache", f"must be writable ({error})", str(folder), fix) from error


def _put(target: Path, write: Callable[[Path], object]) -> None:
    """Write next to the target and rename: a reader finds the whole file or none."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as folder:
        written = Path(folder) / target.name
        write(written)
        written.replace(target)
