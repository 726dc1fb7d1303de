"""The section of docs/models.md names every block, and no block is wrong."""

from __future__ import annotations

import re

from tests.strangers.blocks import BLOCKS
from tests.strangers.table import BEGIN, END, PAGE, with_section


class TestTable:
    def test_section_names_every_block_with_its_commit_and_none_is_wrong(self):
        made = PAGE.read_text().split(BEGIN)[1].split(END)[0]
        rows = re.findall(
            r"^\| (.+?) \| (\S+) \| (\w{7}) \| block .*\| (balanced|refused|wrong)", made, re.MULTILINE
        )
        assert [(name, commit) for name, _, commit, _ in rows] == [
            (name, block.commit[:7]) for name, block in BLOCKS.items()
        ]
        may_refuse = {name for name, block in BLOCKS.items() if block.refused or block.may_refuse}
        assert {name for name, _, _, outcome in rows if outcome != "balanced"} <= may_refuse

    def test_written_again_the_section_stays_in_its_place(self):
        page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
        assert with_section(page, f"{BEGIN}new{END}") == f"before\n{BEGIN}new{END}\nafter\n"
        assert with_section("page\n", "new") == "page\n\nnew\n"
