from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from moe_plugin.report.__main__ import main
from moe_plugin.report.charts import Line, line_chart, ticks
from moe_plugin.report.page import read_runs, report_page
from tests.report.test_summary import SUMMARY


def make_run(folder, *, rate: float, violation: float):
    """A run's folder: events with load at three steps, a configuration and a summary."""
    folder.mkdir(parents=True)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step in (0, 10, 20):
            writer.add_scalar("load/max_violation_global", violation + 20 - step, step)
            writer.add_tensor("load/tokens_per_expert", torch.tensor([[4.0, 4.0], [8.0, 0.0]]).double(), step)
    (folder / "config.yaml").write_text(f"name: <b>\nrule: {{rate: {rate}}}\npaths: {{output: {folder}}}\n")
    measures = {**vars(SUMMARY), "val_loss": 2.0 + rate, "max_violation_global": violation}
    (folder / "summary.json").write_text(json.dumps(measures))
    return folder


@pytest.fixture
def sweep(tmp_path):
    for job, rate in enumerate((0.1, 0.2)):
        make_run(tmp_path / "sweep" / str(job), rate=rate, violation=1 + rate)
    return tmp_path / "sweep"


class TestPage:
    def test_sweep_shows_every_job_its_numbers_and_what_differs(self, sweep):
        page = report_page(read_runs([str(sweep)]), {"torch": "x"})
        assert re.findall(r"<tr><td>([01])</td>", page) == ["0", "1"]
        assert "<td>2.1</td>" in page
        assert "<td>rule.rate</td><td>0.1</td><td>0.2</td>" in page
        assert "paths.output" not in page
        assert page.count("<circle") == 2
        assert page.count("<img") == 6

    def test_nothing_is_fetched(self, sweep):
        page = report_page(read_runs([str(sweep)]), {})
        assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?:", page)

    def test_single_run_shows_its_whole_configuration_escaped(self, sweep):
        page = report_page(read_runs([f"first={sweep / '0'}"]), {})
        assert "<td>name</td><td>&lt;b&gt;</td>" in page
        assert "<title>Expert load: first</title>" in page
        assert "<circle" not in page

    def test_film_shows_violation_and_dead_experts(self, sweep):
        page = report_page(read_runs([str(sweep / "0")]), {})
        assert "step 21<br>MaxVio 0.50, 1 dead" in page

    def test_command_writes_the_file(self, sweep, tmp_path, capsys):
        assert main([str(sweep), "--out", str(tmp_path / "page.html")]) == 0
        assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
        assert main([str(tmp_path / "nowhere")]) == 2
        assert "'RUN' must be the folder of a run" in capsys.readouterr().err


class TestCharts:
    def test_points_lie_inside_and_the_last_is_kept(self):
        xs = list(range(5000))
        svg = line_chart([Line("a", xs, [1 + x for x in xs])], "step")
        points = re.search(r"points=\"([^\"]+)", svg).group(1).split()
        assert len(points) <= 402
        places = np.array([point.split(",") for point in points], dtype=float)
        assert (places[:, 0] >= 52).all()
        assert (places[:, 0] <= 520).all()
        assert (places[:, 1] >= 0).all()
        assert (places[:, 1] <= 240).all()
        assert places[-1, 0] == places[:, 0].max()

    @pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.6, 12.6), (4, 59), (1e-7, 3e-7), (100, 101)])
    def test_ticks_are_few_and_within(self, low, high):
        shown = ticks(low, high)
        assert 3 <= len(shown) <= 9
        assert all(low <= tick <= high for tick in shown)

    def test_nan_is_left_out(self):
        assert "nan" not in line_chart([Line("a", [0, 1, 2], [1.0, float("nan"), 2.0])], "step")
