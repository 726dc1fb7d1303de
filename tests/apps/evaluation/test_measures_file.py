from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_plugin.apps.evaluation.measures_file import finite, measures_file, write_measures
from moe_plugin.errors import ConfigError


class TestMeasuresFile:
    def test_measures_go_next_to_the_checkpoints_folder(self, tmp_path):
        assert measures_file(tmp_path / "checkpoints" / "best.ckpt") == tmp_path / "eval_best.json"

    @pytest.mark.parametrize("kind", ["link", "folder"])
    def test_place_that_is_taken_is_refused(self, tmp_path, kind):
        target = tmp_path / "eval_best.json"
        target.mkdir() if kind == "folder" else target.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match=r"must leave .*eval_best.json free"):
            measures_file(tmp_path / "checkpoints" / "best.ckpt")

    def test_link_made_in_the_meantime_is_replaced(self, tmp_path):
        target, victim = tmp_path / "eval_best.json", tmp_path / "victim"
        victim.write_text("mine")
        target.symlink_to(victim)
        write_measures({"val_loss": 1.0}, target)
        assert victim.read_text() == "mine"
        assert json.loads(target.read_text()) == {"val_loss": 1.0}
        assert not Path(target).is_symlink()

    def test_numbers_that_json_lacks_become_null(self, tmp_path):
        measures = {"a": float("nan"), "b": [float("inf"), 1], "c": {"d": -float("inf")}, "e": None}
        assert finite(measures) == {"a": None, "b": [None, 1], "c": {"d": None}, "e": None}
