"""Shows a corpus: what it holds and how long it takes to build.

python -m moe_plugin.apps.data                                         the standard library
python -m moe_plugin.apps.data code='src/**/*.py' prose='docs/**/*.md'  your files
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_plugin.apps.data.cache import load_or_build
from moe_plugin.apps.data.corpus import SPLITS, Corpus
from moe_plugin.apps.data.documents import Source
from moe_plugin.apps.data.files import Files
from moe_plugin.apps.data.standard_library import StandardLibrary
from moe_plugin.apps.data.tokenization import Bytes
from moe_plugin.errors import ConfigError


def main(arguments: list[str]) -> None:
    """Build the corpus in a fresh folder, load it again, and print domains, sizes and seconds."""
    source = _source(arguments)
    with tempfile.TemporaryDirectory() as folder:
        cold, corpus = _timed_load(source, Path(folder))
        cached, _ = _timed_load(source, Path(folder))
    console = Console()
    console.print(table(corpus))
    console.print(f"{cold:.2f} s to build, {cached:.3f} s from the cache")


def table(corpus: Corpus) -> Table:
    """Return files, bytes and tokens of each domain by split, and the share held out."""
    result = Table("domain", title="Corpus")
    for column in (
        *(f"{split} {what}" for split in SPLITS for what in ("files", "bytes", "tokens")),
        "held out",
    ):
        result.add_column(column, justify="right")
    totals = [corpus.manifest["totals"][split] for split in SPLITS]
    for domain in corpus.domains:
        _add_row(result, domain, [split[domain] for split in totals])
    result.add_section()
    sums = [
        {key: sum(row[key] for row in split.values()) for key in ("files", "bytes", "tokens")}
        for split in totals
    ]
    _add_row(result, "all", sums)
    return result


def _add_row(result: Table, name: str, splits: list[dict[str, int]]) -> None:
    train, validation = splits
    share = validation["bytes"] / (train["bytes"] + validation["bytes"])
    numbers = [f"{split[key]:,}" for split in splits for key in ("files", "bytes", "tokens")]
    result.add_row(name, *numbers, f"{share:.1%}")


def _source(arguments: list[str]) -> Source:
    if not arguments:
        return StandardLibrary()
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError("argument", "must be domain=glob, such as code='src/**/*.py'", argument)
    return Files(dict(argument.split("=", 1) for argument in arguments))


def _timed_load(source: Source, folder: Path) -> tuple[float, Corpus]:
    start = time.perf_counter()
    corpus = load_or_build(source, Bytes(), 0.09, folder)
    return time.perf_counter() - start, corpus


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(str(error))
