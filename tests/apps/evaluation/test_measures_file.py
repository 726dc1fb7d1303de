from __future__ import annotations

import pytest

from moe_plugin.apps.evaluation.measures_file import measures_file
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
