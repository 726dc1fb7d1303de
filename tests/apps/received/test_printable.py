from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from moe_plugin.apps.received.printable import printable


class TestPrintable:
    @pytest.mark.parametrize("text", ["run 1", "größer → ½ × µ", "日本", "a[/b] [bold] \\ :smile:"])  # noqa: RUF001
    def test_letters_and_signs_stay(self, text):
        assert printable(text) == text

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("\x1b[31m", "\\x1b[31m"),
            ("a\r\nb\tc", "a\\r\\nb\\tc"),
            ("\x9b2J", "\\x9b2J"),
            ("\u202etxt", "\\u202etxt"),
            ("\udcff", "\\udcff"),
            ("\x07\x00", "\\x07\\x00"),
        ],
    )
    def test_what_a_terminal_obeys_is_written_out(self, text, shown):
        assert printable(text) == shown

    def test_every_character_reaches_a_console_as_it_is(self):
        shown = printable("".join(map(chr, range(0x3000))))
        file = io.StringIO()
        Console(file=file, width=10**6).print(Text(shown))
        assert file.getvalue() == f"{shown}\n"
        assert shown.isprintable()
