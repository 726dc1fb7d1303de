from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from moe_plugin.metrics.alarms import CHECKS, Limits, LoadAlarms
from moe_plugin.metrics.history import SiteHistory, SiteWindow
from moe_plugin.metrics.window import LayerLoad, LoadWindow

LIMITS = Limits(dead_steps=100, trend_steps=200)
EVEN = (25_000,) * 8
SKEWED = (120_000, 20_000, 10_000, 10_000, 10_000, 10_000, 10_000, 10_000)
LOAD_FIELDS = {field.name for field in fields(LayerLoad)}


def load_of(tokens, **others) -> LayerLoad:
    window = LoadWindow({"site": len(tokens)})
    window.add_({"site": torch.tensor(tokens)})
    (load,) = window.layer_loads().values()
    return replace(load, **{"steps": 20} | others)


def history(*windows: dict, top_k: int = 2) -> SiteHistory:
    """A site with a window every 20 steps; `tokens` and what `load_of` takes make its load, the rest is as given."""
    site = SiteHistory(8, top_k, LIMITS.trend_steps)
    for place, window in enumerate(windows):
        window = {"tokens": EVEN, "bias_range": 0.1, "score_range": 0.5} | window
        load = load_of(
            window.pop("tokens"),
            **{key: window.pop(key) for key in LOAD_FIELDS & window.keys()},
        )
        site.add_(SiteWindow(step=20 * (place + 1), load=load, **window))
    return site


DEAD = (0, 30, 30, 30, 30, 30, 25, 25)
COLLAPSED = (99, 99, 1, 1, 0, 0, 0, 0)
GROWING = [{"tokens": SKEWED, "bias_range": 0.05 * 1.2**i} for i in range(12)]
STUCK = [{"tokens": SKEWED, "bias_range": 0.1 + 0.001 * (i % 2)} for i in range(12)]

PROVOKED = {
    "dead expert": (history(*[{"tokens": DEAD}] * 5), "expert 0 got no token for 100 steps"),
    # exp of the entropy of shares 0.495, 0.495, 0.005 and 0.005: 2.12 experts.
    "collapse": (
        history({"tokens": COLLAPSED}),
        "the load of 8 experts is on 2.1 of them, and a token takes 2",
    ),
    "swinging bias": (
        history({"tokens": EVEN, "max_violation_batch": 0.9, "step_correlation": -0.8}),
        "load errors swing from step to step (correlation -0.80), at MaxVio 0.90 in a step and 0.00 over 20",
    ),
    "saturated bias": (
        history({"bias_range": 1.2}, {"bias_range": 1.3}),
        "biases span 1.3, the scores of a token 0.5: the bias alone decides between the experts at its ends",
    ),
    # The last 200 steps are 11 of the 12 windows: from 0.05 to 0.05 x 1.2**11, without the first.
    "runaway bias": (
        history(*GROWING),
        "the bias range grew from 0.06 to 0.372 and MaxVio did not fall",
    ),
    # 120000 tokens of 200000 over 8 experts: 3.8 times the mean above it.
    "no improvement": (history(*STUCK), "MaxVio is 3.80 and has not fallen for 200 steps"),
    "no tokens": (
        history({"tokens": [0] * 8, "empty_steps": 20}),
        "it saw no token in the last 20 steps, while other routers did",
    ),
    "diverging ranks": (history({"ranks_agree": False}), "its bias is not the same on every rank"),
    "NaN scores": (
        history({"scores_are_finite": False, "rejected_steps": 3}),
        "its scores are NaN; 3 of 20 steps moved no bias",
    ),
    "rejected steps": (
        history({"rejected_steps": 3, "empty_steps": 3}),
        "3 of 20 steps moved no bias: the loss or a score was NaN or infinite",
    ),
}
HEALTHY = {
    "dead expert": [
        history(*[{"tokens": DEAD}] * 4),  # not long enough
        history(*[{"tokens": DEAD}] * 4, {}, *[{"tokens": DEAD}] * 4),  # revived between
        history(*[{"tokens": [0] * 8, "empty_steps": 20}] * 9),  # nobody got a token
    ],
    "collapse": [
        history({"tokens": SKEWED}),
        history({"tokens": COLLAPSED}, top_k=8),
        history({"tokens": [0] * 8}),
    ],
    "swinging bias": [
        history({"tokens": SKEWED, "step_correlation": 0.9}),  # the same expert is overloaded all the time
        history({"tokens": EVEN, "step_correlation": -0.9}),  # swings, but hardly
        history({"tokens": EVEN, "max_violation_batch": 0.9, "step_correlation": 0.0}),  # changing batches
        history({"tokens": EVEN, "max_violation_batch": 0.9, "step_correlation": -0.9, "steps": 2}),
    ],
    "saturated bias": [
        history({"bias_range": 0.9}, {"bias_range": 0.9}),
        history({"bias_range": 9.0}),
        history({"bias_range": 9.0, "score_range": None}, {"bias_range": 9.0, "score_range": None}),
    ],
    "runaway bias": [
        history(*[window | {"tokens": EVEN} for window in GROWING]),  # it grows, and it works
        history(*STUCK),
        history(*GROWING[:9]),
    ],
    "no improvement": [
        history(*[window | {"tokens": EVEN} for window in STUCK]),
        history(*[window | {"bias_range": 0.0} for window in STUCK]),  # nobody balances
        history(*STUCK[:5]),
        history(
            *[{"tokens": ((200 - 9 * i) * 1000, *[10_000] * 7), "bias_range": 0.1 + i} for i in range(12)]
        ),
    ],
    "no tokens": [history({}), history({"tokens": [0] * 8, "empty_steps": 20, "rejected_steps": 20})],
    "diverging ranks": [history({})],
    "NaN scores": [history({"rejected_steps": 3})],
    "rejected steps": [history({}), history({"empty_steps": 3})],
}


class TestChecks:
    def test_every_check_is_provoked_and_spared_here(self):
        assert list(PROVOKED) == list(HEALTHY) == list(CHECKS)

    @pytest.mark.parametrize("kind", PROVOKED)
    def test_provoked_site_raises_it(self, kind):
        site, finding = PROVOKED[kind]
        assert CHECKS[kind][0](site, LIMITS) == finding

    @pytest.mark.parametrize(("kind", "site"), [(kind, s) for kind, sites in HEALTHY.items() for s in sites])
    def test_healthy_site_does_not(self, kind, site):
        assert CHECKS[kind][0](site, LIMITS) is None

    def test_balanced_site_raises_nothing_at_all(self):
        assert LoadAlarms(LIMITS).new({"site": history(*[{}] * 20)}) == []

    def test_stuck_bias_is_not_called_too_slow_when_it_runs_away(self):
        assert CHECKS["no improvement"][0](history(*GROWING), LIMITS) is None


class TestLoadAlarms:
    def test_alarm_comes_once_for_a_site(self):
        alarms, site = LoadAlarms(LIMITS), history({"tokens": COLLAPSED})
        assert [alarm.kind for alarm in alarms.new({"a": site})] == ["collapse"]
        assert alarms.new({"a": site}) == []
        (alarm,) = alarms.new({"a": site, "b": site})
        assert alarm.sites == ("b",)

    def test_sites_of_a_kind_come_together(self):
        site = history({"tokens": COLLAPSED})
        (alarm,) = LoadAlarms(LIMITS).new({"a": site, "b": site, "c": history({})})
        assert alarm.sites == ("a", "b")
        assert str(alarm).startswith(
            "collapse at step 20: a and 1 more router: the load of 8 experts is on 2.1 of them"
        )
        assert "'rate'" in str(alarm)


class TestSwing:
    @pytest.mark.parametrize(("rate", "swings"), [(0.5, True), (0.1, True), (0.01, False), (0.002, False)])
    def test_sign_rule_swings_with_a_rate_beyond_the_scores_only(self, rate, swings):
        from moe_plugin.balancing.rules import Load, Sign

        torch.manual_seed(0)
        bias_E, window = torch.zeros(8), LoadWindow({"site": 8})
        for _ in range(50):
            scores_TE = (torch.randn(512, 8) * 0.5 + torch.linspace(-0.2, 0.2, 8)).sigmoid()
            counts_E = (scores_TE + bias_E).topk(2).indices.flatten().bincount(minlength=8)
            window.add_({"site": counts_E})
            bias_E += Sign(rate=rate).step(Load(counts_E, bias_E), rate, {})
        (load,) = window.layer_loads().values()
        site = SiteHistory(8, 2, 200)
        site.add_(SiteWindow(50, load, 0.1))
        assert (CHECKS["swinging bias"][0](site, LIMITS) is not None) == swings
