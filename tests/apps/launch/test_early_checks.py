"""A sample of the wrong lines; tests/faults tries them all, as whole commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moe_plugin.apps.launch.bounds import check_bounds
from moe_plugin.apps.launch.rate_bounds import check_rates
from moe_plugin.apps.outputs import check_output_file, check_output_folder
from moe_plugin.errors import ConfigError


class TestCheckBounds:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("seed", -1), ("seed", 2**32), ("trainer.gradient_clip_val", float("nan"))),
            *(("trainer.val_check_interval", 0), ("trainer.val_check_interval", 0.0)),
            *(("trainer.limit_train_batches", 1.5), ("trainer.limit_val_batches", float("nan"))),
            *(("trainer.max_time", "00:00:00:00"), ("trainer.max_time", "soon"), ("trainer.max_steps", 0)),
        ],
    )
    def test_number_out_of_range_is_named(self, key, value):
        with pytest.raises(ConfigError, match=f"'{key}' must be"):
            check_bounds(_nested(key, value))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("seed", 2**32 - 1), ("trainer.gradient_clip_val", 0), ("trainer.gradient_clip_val", None)),
            *(("trainer.val_check_interval", 1), ("trainer.val_check_interval", 1.0)),
            *(
                ("trainer.limit_val_batches", 0),
                ("trainer.max_time", {"hours": 1}),
                ("trainer.max_steps", -1),
            ),
        ],
    )
    def test_number_at_the_border_passes(self, key, value):
        check_bounds(_nested(key, value))


def _nested(key, value):
    config = OmegaConf.create({})
    OmegaConf.update(config, key, value, force_add=True)
    return config


class TestCheckRates:
    @staticmethod
    def check(score, **rule):
        nodes = OmegaConf.create(
            {"rule": {"_target_": "x.Sign", **rule}, "score": {"_target_": f"x.{score}"}}
        )
        check_rates(nodes.rule, nodes.score, "rule")

    def test_step_larger_than_the_range_of_the_scores_is_refused(self):
        for score, rate, most in (("Sigmoid", 1.01, "1, the range"), ("SoftmaxAfterTopK", 10_001, "10000")):
            with pytest.raises(ConfigError, match=f"'rule.rate' must be <= {most}"):
                self.check(score, rate=rate)
        self.check("SoftmaxAfterTopK", rate=5.0)

    def test_large_one_is_mentioned_and_a_usual_one_is_not(self, capsys):
        self.check("Sigmoid", rate=0.5)
        assert capsys.readouterr().err == "warning: 'rule.rate' is large for scores from 0 to 1, got 0.5.\n"
        self.check("Sigmoid", rate=0.001)
        self.check("Sigmoid", rate="auto")
        self.check("Sigmoid", _target_="x.Quantile", rate=1.0)
        assert capsys.readouterr().err == ""


class TestOutputs:
    def test_places_that_can_be_written_pass_and_nothing_is_left(self, tmp_path):
        check_output_file("--out", tmp_path / "new" / "a.csv")
        check_output_folder("--folder", tmp_path / "new" / "deep")
        assert list(tmp_path.iterdir()) == []

    def test_others_are_named(self, tmp_path):
        (tmp_path / "file").touch()
        for path in (tmp_path, tmp_path / "file" / "a.csv", Path("/dev/null/a.csv")):
            with pytest.raises(ConfigError, match="'--out' must be a file that can be written"):
                check_output_file("--out", path)
        with pytest.raises(ConfigError, match="'--folder' must be a folder that can be written"):
            check_output_folder("--folder", tmp_path / "file")


def test_early_checks_import_neither_torch_nor_lightning():
    code = (
        "import sys; from moe_plugin.apps.launch.early_checks import check_early;"
        "from moe_plugin.apps.launch.compose import compose_jobs;"
        "check_early(*compose_jobs([], multirun=False)); print({'torch', 'lightning'} & set(sys.modules))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "set()\n"
