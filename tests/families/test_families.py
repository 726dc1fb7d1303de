"""Every transformers family with routed experts is verified or refused with a reason, and docs/models.md says which."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.families.models import families
from tests.families.survey import surveyed

TABLE = Path(__file__).parents[2] / "docs" / "models.md"


class TestFamilies:
    @pytest.mark.parametrize("family", families())
    def test_family_is_verified_or_refused_as_the_table_says(self, family):
        assert str(surveyed(family)) in TABLE.read_text().splitlines()

    def test_table_holds_every_family_and_enough_of_them_verified(self):
        rows = [
            line for line in TABLE.read_text().splitlines() if line.startswith("| ") and "family" not in line
        ]
        assert {row.split(" | ")[0].removeprefix("| ") for row in rows} == set(families())
        assert sum("| verified" in row for row in rows) >= 70
