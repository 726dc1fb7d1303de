"""Texts of a Hugging Face dataset, local or streamed. Needs the extra `moe_plugin[hf]`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_plugin.apps.data.documents import Document
from moe_plugin.apps.data.files import file_stamps, matching_files
from moe_plugin.errors import ConfigError
from moe_plugin.extras import require
from moe_plugin.number_checks import check_integer

_HERE = Path()


class HuggingFace:
    """One document per row; the split is made by row, as each row is a text."""

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        data_files: str | Sequence[str] | None = None,
        revision: str | None = None,
        text: str = "text",
        domain: str | None = None,
        streaming: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        """Check the settings; nothing is loaded yet.

        Args:
            path: A folder written by `save_to_disk`, a builder (`json`, `parquet`, `text`) for `data_files`, or a
                dataset on the Hub.
            name: The dataset's configuration.
            split: The dataset's split to read; training and validation are both taken from it.
            data_files: Files or globs for the builder.
            revision: Version on the Hub; name one, as the cache does not notice that the dataset has changed.
            text: Column of the text.
            domain: Column of the domain's name; without it all rows are of the domain `text`.
            streaming: Read row by row instead of downloading all of it.
            max_bytes: Stop after this many bytes of text (UTF-8; a token each for `Bytes`).

        Raises:
            ConfigError: If `datasets` is missing, `max_bytes` is not positive, streaming has no limit, or a local
                file is not there.
        """
        require("datasets", "source")
        check_integer("source.max_bytes", max_bytes, or_none=True)
        if streaming and max_bytes is None:
            raise ConfigError("source.max_bytes", "must be given with source.streaming=true", max_bytes)
        self.path, self.name, self.split, self.revision = path, name, split, revision
        self.data_files = [data_files] if isinstance(data_files, str) else list(data_files or ())
        self.text, self.domain, self.streaming, self.max_bytes = text, domain, streaming, max_bytes
        self.local_files = self._local_files()

    def _local_files(self) -> list[Path]:
        if Path(self.path).is_dir():
            return sorted(path for path in Path(self.path).rglob("*") if path.is_file())
        files = []
        for pattern in self.data_files:
            if "://" in pattern or "/" in self.path:  # files of a dataset on the Hub
                continue
            matched = matching_files(pattern, _HERE, key="source.data_files")
            if not matched:
                raise ConfigError("source.data_files", "must match a file", pattern, "Correct the path.")
            files += [_HERE / name for name in matched]
        return files

    def fingerprint(self) -> str:
        """Return settings, and sizes and times of local files; a dataset on the Hub counts as unchanging."""
        settings = {k: v for k, v in vars(self).items() if k != "local_files"}
        return f"hugging face {json.dumps([settings, file_stamps(self.local_files)])}"

    def documents(self) -> Iterator[Document]:
        """Yield rows in order, up to `max_bytes`.

        Raises:
            ConfigError: If the dataset cannot be loaded, or a column is missing or holds no text.
        """
        total = 0
        for index, row in enumerate(self._rows()):
            text = self._column(row, "text", self.text)
            domain = "text" if self.domain is None else self._column(row, "domain", self.domain)
            total += len(text.encode())
            if self.max_bytes is not None and total > self.max_bytes:
                return
            yield Document(f"{self.split}/{index:09d}", domain, text.replace("\0", ""))

    def _column(self, row: dict[str, Any], key: str, column: str) -> str:
        if not isinstance(row.get(column), str):
            texts = [name for name, value in row.items() if isinstance(value, str)]
            raise ConfigError(f"source.{key}", f"must be a column of text, one of {texts}", column)
        return row[column]

    def _rows(self) -> Iterable[dict[str, Any]]:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            if (Path(self.path) / "state.json").exists() or (Path(self.path) / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(self.path)
                return loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded  # pyright: ignore
            return datasets.load_dataset(  # pyright: ignore[reportReturnType]
                self.path,
                self.name,
                split=self.split,
                data_files=self.data_files or None,
                revision=self.revision,
                streaming=self.streaming,
            )
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            rule = f"must name a dataset that can be loaded (split {self.split!r}: {error})"
            fix = "Correct source.path, source.name, source.split or source.data_files."
            raise ConfigError("source.path", rule, self.path, fix) from error
