"""A user's own text files, with a domain for each set of globs."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from moe_plugin.apps.data.documents import Document, read_text
from moe_plugin.errors import ConfigError


class Files:
    """One document per file that a domain's globs match; files that are not UTF-8 text are left out."""

    def __init__(self, sources: Mapping[str, str | Sequence[str]], root: str = ".") -> None:
        """List the files; nothing is read yet.

        Args:
            sources: Domain -> a glob, or several, relative to `root`; `**` goes through folders.
            root: Folder the globs start from. The split depends on names below it only, not on where it lies.

        Raises:
            ConfigError: If `root` or a glob's folder does not exist, a glob matches no file, a domain has fewer
                than two files or only empty ones, or a file belongs to two domains.
        """
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ConfigError(
                f"'source.root' must be a folder, but {root!r} does not exist; correct the path."
            )
        if not sources:
            raise ConfigError("'source.sources' must name at least one domain, e.g. {code: 'src/**/*.py'}.")
        self.files = {domain: self._match(domain, globs) for domain, globs in sources.items()}
        self._check_files()

    def _match(self, domain: str, globs: str | Sequence[str]) -> list[str]:
        names: set[str] = set()
        for pattern in [globs] if isinstance(globs, str) else globs:
            matched = matching_files(pattern, self.root)
            if not matched:
                raise ConfigError(f"'source.sources.{domain}': {_why_nothing(pattern, self.root)}")
            names.update(matched)
        return sorted(names)

    def _check_files(self) -> None:
        owner: dict[str, str] = {}
        for domain, names in self.files.items():
            for name in names:
                if owner.setdefault(name, domain) != domain:
                    raise ConfigError(
                        f"'source.sources': {name} is matched by '{owner[name]}' and '{domain}'; a file has one domain."
                    )
            if len(names) < 2:
                raise ConfigError(
                    f"'source.sources.{domain}' must match at least 2 files (training and validation never share one), "
                    f"got {len(names)}: {', '.join(names)}; widen the glob or split the file."
                )
            if not any((self.root / name).stat().st_size for name in names):
                raise ConfigError(
                    f"'source.sources.{domain}' matches {len(names)} files, all empty; give it text."
                )

    def fingerprint(self) -> str:
        """Return names, sizes and modification times."""
        stamps = {
            domain: file_stamps(self.root / name for name in names) for domain, names in self.files.items()
        }
        return f"files {json.dumps(stamps)}"

    def documents(self) -> Iterator[Document]:
        """Yield domain by domain, files by name."""
        for domain, names in self.files.items():
            for name in names:
                text = read_text((self.root / name).read_bytes())
                if text is not None:
                    yield Document(name, domain, text)


def matching_files(pattern: str, root: Path) -> list[str]:
    """Return names of the files a glob matches, relative to `root` (as they are for an absolute glob)."""
    names = glob.glob(pattern, root_dir=root, recursive=True)
    return sorted({Path(name).as_posix() for name in names if (root / name).is_file()})


def file_stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return absolute name, size and modification time (ns) of each file."""
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _why_nothing(pattern: str, root: Path) -> str:
    """Return names the first folder of a glob that does not exist, else says that no file matches."""
    folder = root
    for part in Path(pattern).parts[:-1]:
        folder = folder / part
        if glob.has_magic(part):
            break
        if not folder.is_dir():
            return f"glob {pattern!r} starts in {folder}, which does not exist; correct the path or 'source.root'."
    return f"glob {pattern!r} matches no file under {root.resolve()}; correct it ('**' goes through folders)."
