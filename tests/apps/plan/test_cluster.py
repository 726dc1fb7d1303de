from __future__ import annotations

import pytest

from moe_plugin.apps.plan.cluster import Cluster, Group, Hardware
from moe_plugin.errors import ConfigError
from tests.apps.plan.plan_models import cluster_of


class TestCluster:
    @pytest.mark.parametrize(
        ("expert_parallel", "expert_group", "replica_group"),
        [
            (1, (1, 1), (4, 8)),
            (4, (1, 4), (4, 2)),
            (8, (1, 8), (4, 1)),
            (16, (2, 8), (2, 1)),
            (32, (4, 8), (1, 1)),
        ],
    )
    def test_groups_lie_on_their_nodes(self, expert_parallel, expert_group, replica_group):
        cluster = cluster_of(4, 8, expert_parallel)
        assert (cluster.expert_group, cluster.replica_group) == (Group(*expert_group), Group(*replica_group))

    @pytest.mark.parametrize(
        ("nodes", "devices", "expert_parallel", "message"),
        [
            (0, 8, 1, "'nodes' must be an integer >= 1, got 0."),
            (1, 0, 1, "'devices_per_node' must be an integer >= 1, got 0."),
            (2, 8, 3, r"'expert_parallel' must divide the ranks \(2 x 8 = 16\), got 3."),
            (
                2,
                6,
                4,
                r"'expert_parallel' must divide the devices of a node \(6\) or be a multiple of them, got 4.",
            ),
            (2, 8, 0, "'expert_parallel' must be an integer >= 1, got 0."),
        ],
    )
    def test_numbers_that_do_not_fit_are_refused(self, nodes, devices, expert_parallel, message):
        with pytest.raises(ConfigError, match=message):
            cluster_of(nodes, devices, expert_parallel)

    @pytest.mark.parametrize(
        ("memory", "reserved", "message"),
        [
            (8.0, 8.0, r"'reserved_gib' must be < memory_gib \(8.0\), got 8.0."),
            (8.0, -1.0, "'reserved_gib' must be a number >= 0, got -1.0."),
            (float("nan"), 0.0, "'memory_gib' must be a number > 0, got nan."),
        ],
    )
    def test_memory_that_leaves_nothing_is_refused(self, memory, reserved, message):
        with pytest.raises(ConfigError, match=message):
            Hardware("x", 1, memory, reserved, 1.0, 1.0, 1.0)


class TestUsableBytes:
    def test_leaves_out_the_reserve(self):
        assert Hardware("x", 1, 8.0, 3.0, 1.0, 1.0, 1.0).usable_bytes == 5 * 2**30

    def test_cluster_counts_all_devices(self):
        assert Cluster(Hardware("x", 4, 8.0, 0.0, 1.0, 1.0, 1.0), 3).ranks == 12
