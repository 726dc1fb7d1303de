"""A user's text files, with a domain for each set of globs."""

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
            root: Folder the globs start from. The split depends only on names below it.

        Raises:
            ConfigError: If `root` or a glob's folder does not exist, a glob matches no file, a domain has fewer
                than two files or only empty ones, or a file belongs to two domains.
        """
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
            matched = matching_files(pattern, self.root)
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
    """Return the names of the files that a glob matches.

    Args:
        pattern: The glob.
        root: Names are relative to it, unless the glob is absolute.
    """
    names = glob.glob(pattern, root_dir=root, recursive=True)
    return sorted({Path(name).as_posix() for name in names if (root / name).is_file()})


def file_stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return absolute name, size and modification time (ns) of each file."""
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


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
