from __future__ import annotations

import pytest

from moe_plugin.apps.launch.compose import compose_jobs, quote_option
from moe_plugin.apps.launch.validate_config import check
from moe_plugin.apps.study.arms import read_study, study_folder
from moe_plugin.errors import ConfigError

NAMES = sorted(path.stem for path in study_folder().glob("*.yaml"))


class TestReadStudy:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", NAMES)
    def test_arms_of_ours_are_configurations_that_could_run(self, name):
        study = read_study(name)
        for arm in study.arms:
            words = [f"experiment={study.experiment}", *arm.overrides]
            (config,) = compose_jobs([quote_option(word) for word in words], multirun=False)
            check(config)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "experiment: study\nseeds: 1\n",
                "'study' must have the keys arms, experiment, reference, seeds, and .arms",
            ),
            (
                "experiment: x\nseeds: 1\nreference: b\narms: {a: []}",
                "'reference' must name arms .a., got 'b'",
            ),
            (
                "experiment: x\nseeds: 1\nreference: a\nfewer_seeds: {b: 2}\narms: {a: []}",
                "'fewer_seeds' must name arms .a., got 'b'",
            ),
        ],
    )
    def test_wrong_file_is_told_what_is_wrong(self, text, message, tmp_path):
        path = tmp_path / "wrong.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_study(str(path))

    def test_unknown_study_is_told_which_there_are(self):
        with pytest.raises(ConfigError, match=r"'study' must be one of .*balancing.*, got 'no_such'"):
            read_study("no_such")


class TestRuns:
    def test_all_arms_take_a_seed_before_any_takes_the_next(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("experiment: x\nseeds: 2\nfewer_seeds: {b: 1}\nreference: a\narms: {a: [], b: [c=1]}")
        runs = [(arm.name, seed) for arm, seed in read_study(str(path)).runs()]
        assert runs == [("a", 0), ("b", 0), ("a", 1)]
