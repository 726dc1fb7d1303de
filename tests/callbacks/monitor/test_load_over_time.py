from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_plugin.callbacks.monitor import load_over_time
from moe_plugin.callbacks.monitor.load_over_time import LAYERS, ROWS, LoadOverTime, spread
from moe_plugin.callbacks.monitor.router_sample import Decisions
from moe_plugin.metrics import layer_loads


def window(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([step, 3, step % 7]), torch.tensor([step / 8, 0.0])


def rows_of(steps: range, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """What is drawn after windows at these steps, by tag."""
    for name in ("load_over_time", "bias_over_time", "flips_over_time"):
        monkeypatch.setattr(load_over_time, name, lambda rows, steps, *_: (rows, steps))
    over_time = LoadOverTime(["a"])
    for step in steps:
        tokens_E, bias_E = window(step)
        seen = {"a": Decisions(0.5, step / 1000, 1.0, True)}
        over_time.add_(step, layer_loads({"a": tokens_E}), {"a": bias_E}, seen)
    return dict(over_time.images())


class TestRows:
    @pytest.mark.parametrize("windows", [5, ROWS - 1, ROWS, 5 * ROWS])
    def test_row_has_the_tokens_since_the_last_row_and_the_bias_at_its_end(self, windows, monkeypatch):
        steps = range(4, 5 * windows, 5)
        drawn = rows_of(steps, monkeypatch)
        tokens_NE, ends = drawn["load_over_time/a"]
        assert ends[-1] == steps[-1]
        assert len(ends) < ROWS
        before = -1
        for tokens_E, end in zip(tokens_NE, ends, strict=True):
            joined = [window(step)[0] for step in steps if before < step <= end]
            assert tokens_E.tolist() == sum(joined).tolist()
            before = end
        assert drawn["bias_over_time/a"][0].tolist() == [window(step)[1].tolist() for step in ends]
        assert drawn["flips_over_time/all"][0].tolist() == [[step / 1000] for step in ends]

    def test_few_windows_have_a_row_each(self, monkeypatch):
        assert rows_of(range(ROWS - 1), monkeypatch)["load_over_time/a"][1] == list(range(ROWS - 1))

    def test_bias_that_never_moves_and_layers_that_were_not_seen_are_not_drawn(self):
        over_time = LoadOverTime(["a"])
        over_time.add_(0, layer_loads({"a": torch.tensor([3, 1])}), {"a": torch.zeros(2)}, {})
        assert [tag for tag, _ in over_time.images()] == ["load_over_time/a"]


class TestSpread:
    @pytest.mark.parametrize("count", [1, LAYERS, 9, 61])
    def test_first_and_last_are_among_few_even_places(self, count):
        places = spread(count, LAYERS)
        assert (places[0], places[-1], len(places)) == (0, count - 1, min(count, LAYERS))
        gaps = np.diff(places)
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
