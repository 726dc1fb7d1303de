from __future__ import annotations

import pytest

from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertShape


class TestExpertShape:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"num_experts": 0}, "'num_experts' must be an integer >= 1, got 0"),
            ({"top_k": 0}, "'top_k' must be an integer >= 1, got 0"),
            ({"hidden_dim": -1}, "'hidden_dim' must be an integer >= 1, got -1"),
            ({"num_shared": -1}, "'num_shared' must be an integer >= 0, got -1"),
            ({"num_shared": 1.5}, "'num_shared' must be an integer >= 0, got 1.5"),
            ({"top_k": 9}, r"'top_k' must be <= num_experts \(8\), got 9"),
        ],
    )
    def test_bad_size_is_named(self, sizes, message):
        with pytest.raises(ConfigError, match=message):
            ExpertShape(**({"num_experts": 8, "top_k": 2, "hidden_dim": 16} | sizes))
