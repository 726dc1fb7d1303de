"""Corpora on disk: a safetensors file each, with the SHA-256 of its content in its name."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_plugin.apps.data.corpus import Corpus, build_corpus
from moe_plugin.apps.data.documents import Source, sha256
from moe_plugin.apps.data.tokenization import Tokenizer
from moe_plugin.checkpoints.temporary import remove_leftovers, temporary_folder
from moe_plugin.errors import ConfigError

_FORMAT = 2  # raise it when the same settings would give other tokens, or another file
_MANIFEST = "manifest"  # its JSON as a tensor of bytes; streams have a slash in their names
_LOG = logging.getLogger(__name__)


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return where corpora are kept: `folder`, else `$MOE_PLUGIN_CACHE`, else the user's cache folder."""
    if folder is not None:
        return Path(folder).expanduser()
    if named := os.environ.get("MOE_PLUGIN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_plugin"


def load_or_build(source: Source, tokenizer: Tokenizer, validation_fraction: float, folder: Path) -> Corpus:
    """Load the corpus of these settings, or build and keep it.

    A damaged file is built again, and a warning is logged. A file is put in place whole: another process never reads
    half a corpus. What killed processes were writing is removed.

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
    name = f"corpus-{sha256(json.dumps(settings))[:20]}"
    remove_leftovers(folder)
    kept = sorted(folder.glob(f"{name}-*.safetensors"))
    for path in kept:
        if _is_whole(path):
            return _read(path)
    with _workplace(folder) as place:  # before the work: a folder that cannot be written is found now
        corpus = build_corpus(source, tokenizer, validation_fraction)
        with _writable(folder):
            written = _write(corpus, place)
            target = folder / f"{name}-{written.name}.safetensors"
            if target.is_dir():
                _remove(target)
            written.replace(target)
            for path in set(kept) - {target}:
                _remove(path)
    for path in kept:
        _LOG.warning("The data cache %s was damaged and has been built again.", path)
    return corpus


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """Yield a new folder inside the cache folder."""
    with ExitStack() as stack:
        with _writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            place = stack.enter_context(temporary_folder(folder / "corpus"))
            place.mkdir()
        yield place


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turn errors of writing in its block into one about the cache folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fix = "Set data.cache or the variable MOE_PLUGIN_CACHE to another folder."
        raise ConfigError("data.cache", f"must be writable ({error})", str(folder), fix) from error


def _write(corpus: Corpus, place: Path) -> Path:
    """Write a corpus to a file that is named by its hash."""
    manifest = torch.frombuffer(bytearray(json.dumps(corpus.manifest).encode()), dtype=torch.uint8)
    path = place / "corpus"
    save_file({**corpus.streams, _MANIFEST: manifest}, path)
    return path.rename(place / _hash(path))


def _read(path: Path) -> Corpus:
    """Map the file's tokens into memory; they stay readable if the file is replaced."""
    streams = load_file(path)
    return Corpus(streams, json.loads(streams.pop(_MANIFEST).numpy().tobytes()))


def _is_whole(path: Path) -> bool:
    """Return whether a file's content is what its name says."""
    try:
        return path.is_file() and path.stem.endswith(f"-{_hash(path)}")
    except OSError:  # blocks that cannot be read
        return False


def _hash(path: Path) -> str:
    """Return the hash of a file, which a process reads once unless it changes."""
    status = path.stat()
    return _hash_now(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.cache
def _hash_now(path: Path, *_stamp: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
