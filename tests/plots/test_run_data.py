from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from moe_plugin.errors import ConfigError
from moe_plugin.plots.run_data import named, read_run


@pytest.fixture
def run(tmp_path):
    writer = SummaryWriter(str(tmp_path / "run" / "tensorboard"))
    for step in range(300):
        writer.add_scalar("load/max_violation_global", step / 2, step)
    for step in range(12):
        writer.add_tensor("val/tokens_per_expert", torch.tensor([[2.0**53, step], [3, -1]]).double(), step)
    writer.close()
    return tmp_path / "run"


class TestReadRun:
    def test_events_give_every_point_and_exact_counts(self, run):
        data = read_run(*named(str(run)))
        assert data.label == "run"
        assert data.scalars["load/max_violation_global"] == (
            list(range(300)),
            [step / 2 for step in range(300)],
        )
        assert [step for step, _ in data.counts["val"]] == list(range(12))
        assert np.array_equal(data.counts["val"][-1][1], [[2**53, 11], [3, -1]])
        assert data.counts["load"] == []

    def test_label_may_be_given(self, run):
        assert read_run(*named(f"my run={run}")).label == "my run"

    def test_csv_is_read_where_there_are_no_events(self, tmp_path):
        (tmp_path / "metrics.csv").write_text("epoch,step,a,b\n0,4,1.5,\n0,9,,2\n0,14,2.5,3\n")
        assert read_run(*named(str(tmp_path))).scalars == {
            "a": ([4, 14], [1.5, 2.5]),
            "b": ([9, 14], [2.0, 3.0]),
        }

    def test_missing_or_empty_folder_is_named(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r"'RUN' must be the folder of a run, got '.*missing'. There is no such folder"
        ):
            read_run(*named(str(tmp_path / "missing")))
        with pytest.raises(
            ConfigError, match=rf"'RUN' must have TensorBoard events or metrics.csv, got '{tmp_path}'"
        ):
            read_run(*named(str(tmp_path)))

    def test_damaged_event_is_named_and_a_cut_off_end_is_not(self, run):
        (path,) = run.rglob("events.*")
        whole = path.read_bytes()
        path.write_bytes(whole[:-3])
        assert len(read_run("run", run).scalars["load/max_violation_global"][0]) == 300
        for place in range(0, len(whole), len(whole) // 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(ConfigError, match=r"'RUN' must have whole events \(record \d+ is damaged\)"):
                read_run("run", run)

    @pytest.mark.parametrize("row", ["0,one,1.5", "0,4,low", "0"])
    def test_damaged_table_is_named_with_the_line(self, row, tmp_path):
        (tmp_path / "metrics.csv").write_text(f"epoch,step,a\n0,1,1.0\n{row}\n0,,2.5\n")
        with pytest.raises(
            ConfigError, match=r"'RUN' must have a table of numbers by step \(not so in line [34]\)"
        ):
            read_run("run", tmp_path)


class TestNamed:
    def test_folder_with_an_equals_sign_is_not_a_label(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert named("seed=1") == ("seed", Path("1"))
        Path("seed=1").mkdir()
        assert named("seed=1") == ("seed=1", Path("seed=1"))
