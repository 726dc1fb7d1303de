from __future__ import annotations

import pytest

import moe_plugin


class TestPublicNames:
    def test_every_public_name_can_be_imported(self):
        assert all(hasattr(moe_plugin, name) for name in moe_plugin.__all__)
        assert set(moe_plugin.__all__) <= set(dir(moe_plugin))

    def test_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="module 'moe_plugin' has no attribute 'balancing_act'"):
            _ = moe_plugin.balancing_act
