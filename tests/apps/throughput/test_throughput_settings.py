from __future__ import annotations

import pytest

from moe_plugin.apps.throughput.throughput_settings import ThroughputSettings
from moe_plugin.errors import ConfigError


class TestLength:
    @pytest.mark.parametrize(("context_length", "length"), [(16, 16), (256, 32)])
    def test_usual_length_fits_the_model(self, context_length: int, length: int) -> None:
        assert ThroughputSettings().length_for(context_length) == length

    def test_length_that_the_model_does_not_read_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"'throughput.length' .* context_length \(16\), got 17"):
            ThroughputSettings(length=17).length_for(16)
