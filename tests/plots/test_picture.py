from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from moe_plugin.errors import ConfigError
from moe_plugin.plots.__main__ import main
from moe_plugin.plots.colors import DEAD, load_colors
from moe_plugin.plots.picture import _spread, load_picture
from moe_plugin.plots.run_data import RunData

SKEWED_LE = np.array([[64.0, 0, 16, 16], [24, 24, 24, -1]])
EVEN_LE = np.array([[24.0, 24, 24, 24], [24, 24, 24, -1]])
CURVE = ([0, 10, 20], [2.0, 0.5, 0.1])
LINE, IDEAL = (0xC4, 0x57, 0x0C), (0xF5, 0xF3, 0xEE)
"""The colour of the first curve, and that of an ideal load."""


def run(label: str, **counts) -> RunData:
    scalars = {"load/max_violation_global": CURVE, "load_layers/max_violation/a": CURVE}
    return RunData(label, scalars, {"load": [], "val": []} | counts)


def colors_of(path) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return set(map(tuple, np.unique(pixels.reshape(-1, 3), axis=0).tolist()))


def pieces(is_set: np.ndarray) -> list[np.ndarray]:
    """The places that are set, in runs without a gap."""
    places = np.flatnonzero(is_set)
    return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)


class TestLoadPicture:
    def test_one_run_shows_its_first_and_last_load(self, tmp_path):
        path = load_picture([run("a", load=[(0, SKEWED_LE), (20, EVEN_LE)])], tmp_path / "load.png")
        shown = colors_of(path)
        for octaves in (np.log2(64 / 24), np.log2(16 / 24), 0.0):
            assert tuple(load_colors(np.array([octaves]))[0].tolist()) in shown
        assert DEAD in shown

    def test_several_runs_show_held_out_load_where_there_is_one(self, tmp_path):
        validated = run("a", load=[(0, SKEWED_LE)], val=[(20, EVEN_LE)])
        path = load_picture([validated, run("b", load=[(20, EVEN_LE)])], tmp_path / "load.png")
        assert tuple(load_colors(np.array([np.log2(64 / 24)]))[0].tolist()) not in colors_of(path)

    def test_half_of_the_data_is_enough(self, tmp_path):
        curves = colors_of(load_picture([run("curves only")], tmp_path / "curves.png"))
        counts = RunData("counts only", {}, {"load": [(0, EVEN_LE)]})
        cells = colors_of(load_picture([counts], tmp_path / "counts.png"))
        assert (LINE in curves, LINE in cells) == (True, False)
        assert (IDEAL in curves, IDEAL in cells) == (False, True)

    def test_each_of_many_runs_has_a_panel_three_in_a_row(self, tmp_path):
        runs = [run(f"run {i}", load=[(0, np.ones((60, 256)))]) for i in range(7)]
        path = load_picture(runs, tmp_path / "load.png")
        is_ideal_HW = (np.asarray(Image.open(path).convert("RGB")) == IDEAL).all(-1)
        bands = [rows for rows in pieces(is_ideal_HW.sum(1) > 100) if len(rows) > 20]
        assert [len(pieces(is_ideal_HW[rows[5]])) for rows in bands] == [3, 3, 1]

    def test_runs_without_load_are_refused(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r"'RUN' must have logged its load with LoadMonitor, got \['a'\]"
        ):
            load_picture([RunData("a", {"loss": CURVE})], tmp_path / "load.png")
        assert list(tmp_path.iterdir()) == []


class TestSpread:
    def test_crowded_labels_move_apart_and_stay_inside(self):
        assert _spread([0.1, 0.95, 0.97, 0.99], 0.1) == pytest.approx([0.1, 0.8, 0.9, 1.0])


class TestMain:
    def test_picture_of_a_csv_run_is_written_and_named(self, tmp_path, capsys):
        (tmp_path / "metrics.csv").write_text("step,load/max_violation_global\n4,1.5\n9,0.5\n")
        out = tmp_path / "load.png"
        assert main([str(tmp_path), "--out", str(out)]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        assert out.exists()

    def test_bad_run_is_one_line_on_stderr(self, tmp_path, capsys):
        assert main([str(tmp_path / "missing"), "--out", str(tmp_path / "load.png")]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_bad_out_folder_fails_before_reading(self, tmp_path, capsys):
        assert main([str(tmp_path), "--out", str(tmp_path / "no" / "load.png")]) == 2
        folder = tmp_path / "no"
        assert capsys.readouterr().err == f"'--out' must be in an existing folder, got '{folder}/load.png'.\n"
