from __future__ import annotations

import json
import math

from moe_plugin.apps.report.json_file import write_json


class TestWriteJson:
    def test_numbers_that_json_lacks_become_null_at_any_depth(self, tmp_path):
        content = {"a": math.nan, "b": [1.5, math.inf, (-math.inf, "NaN")], "c": {"d": math.nan, "e": True}}
        write_json(tmp_path / "file.json", content)
        expected = {"a": None, "b": [1.5, None, [None, "NaN"]], "c": {"d": None, "e": True}}
        assert json.loads((tmp_path / "file.json").read_text()) == expected

    def test_link_in_the_place_is_replaced(self, tmp_path):
        target, victim = tmp_path / "a.json", tmp_path / "victim"
        victim.write_text("mine")
        target.symlink_to(victim)
        write_json(target, {"val_loss": 1.0})
        assert victim.read_text() == "mine"
        assert json.loads(target.read_text()) == {"val_loss": 1.0}
        assert not target.is_symlink()
