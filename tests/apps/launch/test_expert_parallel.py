from __future__ import annotations

import pytest

from moe_plugin.apps.launch.expert_parallel import ExpertParallelStrategy
from moe_plugin.errors import ConfigError


class TestExpertParallelStrategy:
    @pytest.mark.parametrize(
        ("devices", "nodes", "size", "expected"),
        [(2, 1, "auto", 2), (4, 2, "auto", 4), (4, 2, 8, 8), (4, 1, 2, 2)],
    )
    def test_sizes(self, devices, nodes, size, expected):
        strategy = ExpertParallelStrategy(devices, nodes, size)
        assert strategy.expert_parallel_size == expected
        assert strategy._data_parallel_size == devices * nodes

    @pytest.mark.parametrize(
        ("size", "rule"), [(0, "be an integer >= 1"), (3, r"divide the number of processes \(4\)")]
    )
    def test_groups_that_do_not_fit_are_named(self, size, rule):
        with pytest.raises(ConfigError, match=rf"^'expert_parallel_size' must {rule}, got {size}\.$"):
            ExpertParallelStrategy(4, expert_parallel_size=size)
