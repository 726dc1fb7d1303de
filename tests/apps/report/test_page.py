from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from moe_plugin.apps.report.__main__ import main
from moe_plugin.apps.report.environment import describe_environment, read_environment, write_environment
from moe_plugin.apps.report.expert_use import PROFILES, profiles
from moe_plugin.apps.report.page import read_runs, report_page
from moe_plugin.apps.report.svg_charts import Line, line_chart, log_ticks, ticks
from moe_plugin.plots.run_data import EXPERT_USE_FILE
from tests.apps.report.test_summary import SUMMARY


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
        page = report_page(read_runs([str(sweep)]))
        assert re.findall(r"<tr><td>([01])</td>", page) == ["0", "1"]
        assert "<td>2.1</td>" in page
        assert "<td>rule.rate</td><td>0.1</td><td>0.2</td>" in page
        assert "paths.output" not in page
        assert page.count("<circle") == 2
        assert page.count("<img") == 6

    def test_nothing_is_fetched(self, sweep):
        page = report_page(read_runs([str(sweep)]))
        assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?:", page)

    def test_single_run_shows_its_whole_configuration_escaped(self, sweep):
        page = report_page(read_runs([f"first={sweep / '0'}"]))
        assert "<td>name</td><td>&lt;b&gt;</td>" in page
        assert "<title>Expert load: first</title>" in page
        assert "<circle" not in page

    def test_film_shows_violation_and_dead_experts(self, sweep):
        page = report_page(read_runs([str(sweep / "0")]))
        assert "step 21<br>MaxVio 0.50, 1 dead" in page

    def test_curves_begin_with_the_counts_of_the_first_step(self, tmp_path):
        with SummaryWriter(str(tmp_path / "run")) as writer:
            writer.add_tensor("load/tokens_per_expert", torch.tensor([[4.0, 4.0], [8.0, 0.0]]).double(), 0)
            for step in (4, 9):
                writer.add_scalar("load/dead_experts", 0, step)
        page = report_page(read_runs([str(tmp_path / "run")]))
        points = re.search(r'<polyline class="line c0" points="([^"]*)"', page).group(1).split()
        heights = [float(point.split(",")[1]) for point in points]
        assert len(heights) == 3
        assert heights[0] < heights[1] == heights[2]  # one dead expert, then none; y runs downwards

    def test_a_chart_of_two_measures_has_a_legend(self, tmp_path):
        with SummaryWriter(str(tmp_path / "run")) as writer:
            for step in (0, 1):
                writer.add_scalar("train/loss", 3 - step, step)
                writer.add_scalar("val/loss", 2 - step, step)
        page = report_page(read_runs([str(tmp_path / "run")]))
        assert re.search(r'key c0"></span>training.*key c1"></span>validation', page)

    def test_environment_is_what_each_run_wrote(self, sweep):
        (sweep / "0" / "environment.json").write_text('{"torch": "9.9", "machine": "m0"}')
        page = report_page(read_runs([str(sweep)]))
        assert "<td>torch</td><td>9.9</td><td>–</td>" in page  # noqa: RUF001
        assert torch.__version__ not in page

    def test_runs_of_before_show_nothing_they_did_not_write(self, sweep):
        page = report_page(read_runs([str(sweep)]))
        assert "ran on</h2>" not in page
        assert "What experts are for" not in page
        assert "rank correlation" not in page

    def test_command_writes_the_file(self, sweep, tmp_path, capsys):
        assert main([str(sweep), "--out", str(tmp_path / "page.html")]) == 0
        assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
        assert main([str(tmp_path / "nowhere")]) == 2
        assert "'RUN' must be the folder of a run" in capsys.readouterr().err


USE = {
    "step": 3,
    "experts": [
        {
            "layer": "router",
            "experts": [
                {
                    "expert": 0,
                    "load": 1.0,
                    "kinds": {"domain": [["code", 2.0]]},
                    "snippets": [["a<", "b", "\n"]],
                }
            ],
        }
    ],
    "experts_per_token": {
        "layers": ["router", "other"],
        "target": [2.0, 2.0],
        "means": [1.75, 2.0],
        "tokens": [[0, 1, 3], [0, 0, 4]],
        "by_kind": {"domain": {"names": ["code"], "tokens": [4], "means": [[1.75], [2.0]]}},
        "by_loss": {
            "losses": [0.5, 2.0],
            "means": [[1.5, 2.0], [2.0, 2.0]],
            "correlation": [0.25, None],
            "correlation_in_place": [0.5, None],
        },
        "text": [
            {
                "title": "code",
                "pieces": ["<", "\n", "b"],
                "used": [[0, 1, 2], [0, 1, 2]],
                "losses": [0.1, 2, 3],
            }
        ],
    },
}


class TestExpertUse:
    @pytest.fixture
    def page(self, sweep):
        (sweep / "0" / "tensorboard" / EXPERT_USE_FILE).write_text(json.dumps(USE))
        return report_page(read_runs([str(sweep / "0")]))

    def test_bars_are_the_shares_of_the_tokens(self, page):
        bars = re.findall(r'<div class="bar">(.*?)</div>', page, re.DOTALL)
        assert [re.findall(r"width:([\d.]+)%", bar) for bar in bars] == [["25.0", "75.0"], ["100.0"]]

    def test_each_token_stands_on_its_ground(self, page):
        tokens = re.search(r'<pre class="text">(.*?)</pre>', page, re.DOTALL).group(1)
        spans = re.findall(r'<span class="g(\d)" title="([^"]*)">(.*?)</span>', tokens, re.DOTALL)
        assert spans == [
            ("0", "0.00 experts, loss 0.10", "&lt;"),
            ("4", "1.00 experts, loss 2.00", "↵\n"),
            ("7", "2.00 experts, loss 3.00", "b"),
        ]

    def test_measures_and_kinds_are_shown(self, page):
        assert "<td>0</td><td>2.00</td><td>1.75</td><td>0.25</td><td>0.50</td>" in page
        assert "<td>1</td><td>2.00</td><td>2.00</td><td>–</td><td>–</td>" in page  # noqa: RUF001
        assert re.search(
            r'code \(4 tokens\)</td><td style="background:rgb\(\d+, \d+, \d+\);color:#\w+">1.75</td>', page
        )

    def test_experts_have_their_kinds_and_snippets_escaped(self, page):
        assert "code 2.0x" in page
        assert '<span class="snippet">a&lt;<b>b</b>↵</span>' in page

    def test_many_runs_share_the_room_for_experts(self):
        layer = {"layer": "r", "experts": [{"expert": place} for place in range(64)]}
        shown = profiles([{"experts": [layer] * 8}] * 20)
        assert sum(len(layer["experts"]) for run in shown for layer in run) <= PROFILES
        assert all(layer["experts"] for run in shown for layer in run)


class TestEnvironment:
    def test_written_environment_reads_back(self, tmp_path):
        environment = describe_environment(2, torch.device("cpu"))
        write_environment(environment, tmp_path)
        assert read_environment(tmp_path) == environment
        assert environment["torch"] == torch.__version__
        assert environment["device"].startswith("2 x cpu")


class TestCharts:
    def test_line_of_one_point_is_a_dot(self):
        assert "<circle" in line_chart([Line("a", [3], [1.0])], "step")

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


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0.08, 6, [0.1, 0.2, 0.5, 1, 2, 5]), (2, 20, [2, 5, 10, 20]), (0.5, 9e3, [1, 10, 100, 1000])],
)
def test_log_axis_has_round_ticks(low, high, marks):
    assert log_ticks(math.log10(low), math.log10(high)) == marks
