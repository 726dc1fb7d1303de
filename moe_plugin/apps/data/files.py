"""A user's text files, with a domain for each set of globs."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from moe_plugin.apps.data.documents import DECODING_ERRORS, Document, read_text
from moe_plugin.errors import ConfigError

_SHOWN = 5  # of the files that are no text


class Files:
    """One document per file that a domain's globs match; files that are not text are an error."""

    def __init__(
        self,
        sources: Mapping[str, str | Sequence[str]],
        root: str = ".",
        *,
        encoding: str = "utf-8",
        errors: str = "strict",
    ) -> None:
        """List the files; nothing is read yet.

        Args:
            sources: Domain -> a glob, or several, relative to `root`; `**` goes through folders.
            root: Folder the globs start from. The split depends only on names below it.
            encoding: The files', as in `open`.
            errors: What to do with bytes that are not text, as in `open`: strict (an error), replace or ignore.

        Raises:
            ConfigError: If `root` or a glob's folder does not exist, a glob matches no file or something that cannot
                be read as one, a domain has fewer than two files or only empty ones, or a file belongs to two
                domains.
        """
        _check_decoding(encoding, errors)
        self.encoding, self.errors = encoding, errors
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ConfigError("source.root", "must be a folder that exists", root)
        if not sources:
            rule = "must name at least one domain, such as {code: 'src/**/*.py'}"
            raise ConfigError("source.sources", rule, sources)
        self.files = {domain: self._match(domain, globs) for domain, globs in sources.items()}
        self._check_files()

    def _match(self, domain: str, globs: str | Sequence[str]) -> list[str]:
        names: set[str] = set()
        for pattern in [globs] if isinstance(globs, str) else globs:
            matched = matching_files(pattern, self.root, key=f"source.sources.{domain}")
            if not matched:
                rule, fix = _broken_rule(pattern, self.root)
                raise ConfigError(f"source.sources.{domain}", rule, pattern, fix)
            names.update(matched)
        return sorted(names)

    def _check_files(self) -> None:
        owner: dict[str, str] = {}
        for domain, names in self.files.items():
            for name in names:
                if owner.setdefault(name, domain) != domain:
                    rule = f"must match {name} in one domain only"
                    raise ConfigError("source.sources", rule, [owner[name], domain])
            key = f"source.sources.{domain}"
            if len(names) < 2:
                rule = "must match at least 2 files, as training and validation never share one"
                raise ConfigError(key, rule, names, "Widen the glob or split the file.")
            if not any((self.root / name).stat().st_size for name in names):
                raise ConfigError(key, f"must match a file with text; its {len(names)} files are empty")

    def fingerprint(self) -> str:
        """Return the encoding, and names, sizes and modification times."""
        stamps = {
            domain: file_stamps(self.root / name for name in names) for domain, names in self.files.items()
        }
        return f"files {json.dumps([self.encoding, self.errors, stamps])}"

    def documents(self) -> Iterator[Document]:
        """Yield domain by domain, files by name.

        Raises:
            ConfigError: If files of a domain are not text of the encoding; it names them and the first wrong byte.
        """
        for domain, names in self.files.items():
            wrong = []
            for name in names:
                text = self._read(name)
                if isinstance(text, str):
                    yield Document(name, domain, text)
                else:
                    wrong.append(f"{name}: {text.reason} at byte {text.start}")
            if wrong:
                rule = f"must match {self.encoding} text, but {len(wrong)} of {len(names)} files are not"
                fix = "Narrow the glob, or set source.encoding, or source.errors to replace or ignore."
                raise ConfigError(f"source.sources.{domain}", rule, wrong[:_SHOWN], fix)

    def _read(self, name: str) -> str | UnicodeDecodeError:
        try:
            return read_text((self.root / name).read_bytes(), self.encoding, self.errors)
        except UnicodeDecodeError as error:
            return error


def matching_files(pattern: str, root: Path, key: str) -> list[str]:
    """Return the names of the files that a glob matches; the folders it matches are left out.

    Args:
        pattern: The glob.
        root: Names are relative to it, unless the glob is absolute.
        key: The setting that holds the glob.

    Raises:
        ConfigError: If it matches something else, such as a pipe, which would be waited for, or what cannot be read.
    """
    matched = {Path(name).as_posix() for name in glob.glob(pattern, root_dir=root, recursive=True)}
    names = sorted(name for name in matched if not (root / name).is_dir())
    for name in names:
        if not ((root / name).is_file() and os.access(root / name, os.R_OK)):
            rule = "must match files that can be read: no pipe, socket, device or broken link"
            raise ConfigError(key, rule, name, "Remove it or narrow the glob.")
    return names


def file_stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return absolute name, size and modification time (ns) of each file."""
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _check_decoding(encoding: str, errors: str) -> None:
    try:
        "".encode(encoding)
    except LookupError as error:
        raise ConfigError("source.encoding", "must be one of Python's text encodings", encoding) from error
    if errors not in DECODING_ERRORS:
        raise ConfigError("source.errors", f"must be one of {', '.join(DECODING_ERRORS)}", errors)


def _broken_rule(pattern: str, root: Path) -> tuple[str, str]:
    """Return which rule a glob breaks that matches nothing, and the fix."""
    folder = root
    for part in Path(pattern).parts[:-1]:
        folder = folder / part
        if glob.has_magic(part):
            break
        if not folder.is_dir():
            return f"must start in a folder that exists, not in {folder}", "Correct the path or source.root."
    return f"must match a file under {root.resolve()}", "Correct it ('**' goes through folders)."
