from __future__ import annotations

import pytest

from moe_plugin.metrics.router_names import short_names, with_short_tags


class TestShortNames:
    @pytest.mark.parametrize(
        ("names", "short"),
        [
            (["net.layers.0.ffn.router", "net.layers.10.ffn.router"], ["layers.0", "layers.10"]),
            (["encoder.0.mlp.gate", "decoder.0.mlp.gate"], ["encoder", "decoder"]),
            (["a.layers.3.moe.gate", "a.layers.4.mlp.gate"], ["layers.3.moe", "layers.4.mlp"]),
            (["router", "layers.0.router"], ["router", "layers.0.router"]),
            (["layers.0.gate", "layers.0.gate.layers.0.gate"], ["0.gate", "0.gate.layers.0.gate"]),
            (["model.layers.3.gate"], ["model.layers.3.gate"]),
            ([], []),
        ],
    )
    def test_what_all_share_is_cut_and_names_still_differ(self, names, short):
        assert short_names(names) == dict(zip(names, short, strict=True))


def test_tags_end_in_short_names_and_others_stay():
    scalars = {"load_layers/entropy/a.b": 1.0, "load/entropy": 2.0}
    assert with_short_tags(scalars, {"a.b": "b"}) == {"load_layers/entropy/b": 1.0, "load/entropy": 2.0}
