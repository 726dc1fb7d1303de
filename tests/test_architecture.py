"""Hold docs/architecture.md against the code: its paths exist, its layer table is that of the test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_layering import MAY_IMPORT

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# What a reader is to write, and files that a run or a checkpoint has.
PLACEHOLDERS = re.compile(r"NAME|summary\.json")


def section(number: int) -> str:
    return re.split(r"^## \d+\. .*$", PAGE, flags=re.MULTILINE)[number]


def paths() -> list[str]:
    """Return every path in backticks; a folder ends with a slash."""
    words = re.findall(r"`([\w./]+(?:/|\.(?:py|md|yaml|toml)))(?:::\w+)*`", PAGE)
    return sorted({word for word in words if not PLACEHOLDERS.search(word)})


def layer_table() -> dict[str, set[str]]:
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|$", section(5), flags=re.MULTILINE)
    layers: dict[str, set[str]] = {}
    for parts, allowed in rows:
        for part in re.findall(r"`([\w.]+)`( itself)?", parts):
            layers[name_of(part)] = {name_of(each) for each in re.findall(r"`([\w.]+)`( itself)?", allowed)}
    return layers


def name_of(found: tuple[str, str]) -> str:
    name, itself = found
    return "__init__" if itself else name


class TestArchitecture:
    @pytest.mark.parametrize("path", paths())
    def test_every_path_exists(self, path: str) -> None:
        """Relative to the package, to the repository, or to the folder that its table's heading names."""
        headings = re.findall(r"file in `([\w/]+)`", PAGE)
        places = [ROOT / "moe_plugin", ROOT, *(ROOT / "moe_plugin" / heading for heading in headings)]
        assert any((place / path).exists() for place in places)

    def test_layer_table_is_that_of_the_test(self) -> None:
        known = {part: allowed for part, allowed in MAY_IMPORT.items() if part != "apps"}
        assert layer_table() == known

    def test_every_test_named_exists(self) -> None:
        for path, names in re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)+)`", PAGE):
            text = (ROOT / path).read_text()
            assert all(f"class {name}" in text or f"def {name}" in text for name in names.split("::")[1:]), (
                path
            )
