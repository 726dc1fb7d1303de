from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from moe_plugin.apps.report.summary import RunSummary, read_summary, write_summary

SUMMARY = RunSummary(
    val_loss=2.2,
    perplexity=math.exp(2.2),
    max_violation_batch=0.5,
    max_violation_global=0.2,
    dead_experts=0,
    tokens_per_second=12345.6,
    seconds=100.5,
    seed=1,
    parameters_total=3_000_000,
    parameters_active=1_000_000,
)


class TestWriteSummary:
    def test_written_summary_reads_back(self, tmp_path):
        path = write_summary(SUMMARY, tmp_path)
        assert path.name == "summary.json"
        assert read_summary(path) == SUMMARY
        assert list(json.loads(path.read_text()))[:5] == [
            "val_loss",
            "perplexity",
            "max_violation_batch",
            "max_violation_global",
            "dead_experts",
        ]

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_numbers_that_json_lacks_become_null(self, tmp_path, value):
        path = write_summary(replace(SUMMARY, val_loss=value), tmp_path)
        assert json.loads(path.read_text())["val_loss"] is None

    def test_nothing_but_the_summary_is_left_behind(self, tmp_path):
        write_summary(SUMMARY, tmp_path)
        write_summary(SUMMARY, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
