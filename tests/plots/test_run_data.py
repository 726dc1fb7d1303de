from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from moe_plugin.errors import ConfigError
from moe_plugin.plots.run_data import read_run


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
        data = read_run(str(run))
        assert data.label == "run"
        assert data.scalars["load/max_violation_global"] == (
            list(range(300)),
            [step / 2 for step in range(300)],
        )
        assert [step for step, _ in data.counts["val"]] == list(range(12))
        assert np.array_equal(data.counts["val"][-1][1], [[2**53, 11], [3, -1]])
        assert data.counts["load"] == []

    def test_label_may_be_given(self, run):
        assert read_run(f"my run={run}").label == "my run"

    def test_csv_is_read_where_there_are_no_events(self, tmp_path):
        (tmp_path / "metrics.csv").write_text("epoch,step,a,b\n0,4,1.5,\n0,9,,2\n0,14,2.5,3\n")
        assert read_run(str(tmp_path)).scalars == {"a": ([4, 14], [1.5, 2.5]), "b": ([9, 14], [2.0, 3.0])}

    def test_missing_or_empty_folder_is_named(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r"'RUN' must be the folder of a run, got '.*missing'. There is no such folder"
        ):
            read_run(str(tmp_path / "missing"))
        with pytest.raises(
            ConfigError, match=rf"'RUN' must have TensorBoard events or metrics.csv, got '{tmp_path}'"
        ):
            read_run(str(tmp_path))
