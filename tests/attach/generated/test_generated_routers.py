"""Routers drawn at random are balanced right, or refused by an error that names them: none is silently wrong.

`make test-faults` draws ten times as many. A failure ends with the plainest `RouterSpec` that fails too.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, event, given, note, settings

from moe_plugin.attach import site_group
from moe_plugin.attach.site_counters import SiteCounters
from moe_plugin.attach.steering import intercept
from moe_plugin.errors import AttachError, EffectError
from tests.attach.generated.checks import UNSTEERABLE, Trial
from tests.attach.generated.spec import RouterSpec, plainest, specs

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning"
)  # of dynamo, in plain models too
USUAL = 200
EXAMPLES = int(os.environ.get("GENERATED_ROUTERS", USUAL))
PARTS = max(1, EXAMPLES // 500)  # for several workers


def check(spec: RouterSpec) -> str:
    """Assert that the router of this spec is balanced right or refused by name, and return which."""
    refusal = refusal_of(Trial(spec))
    if refusal is not None:
        assert not spec.is_ordinary, f"an ordinary router was refused: {refusal}"
        assert "layers." in refusal, f"no router is named: {refusal}"
        return "refused"
    assert spec.select not in UNSTEERABLE, "balanced, although no bias can steer it"
    return "balanced"


def refusal_of(trial: Trial) -> str | None:
    try:
        trial.check()
    except (AttachError, EffectError) as refusal:
        return str(refusal)
    return None


def fails(spec: RouterSpec) -> bool:
    try:
        check(spec)
    except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return True
    return False


class TestGeneratedRouters:
    @pytest.mark.parametrize("part", range(PARTS))
    @settings(
        max_examples=EXAMPLES // PARTS,
        deadline=None,
        derandomize=EXAMPLES == USUAL,
        phases=[Phase.reuse, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(spec=specs())
    def test_any_router_is_balanced_right_or_refused_by_name(self, part, spec):
        if fails(spec):
            note(f"{spec!r} fails; the plainest that fails too is {plainest(spec, fails)!r}")
        event(f"{check(spec)}: {spec.select}")

    @pytest.mark.parametrize(
        ("spec", "outcome"),
        [
            (RouterSpec(select="max in rounds", second="same again"), "balanced"),
            (RouterSpec(select="argmax times zero", second="values of topk"), "refused"),
            (RouterSpec(k=1, score="sigmoid", second="logged max", early=True), "balanced"),
            (RouterSpec(k=1, second="switch loss", early=True), "balanced"),
            (
                RouterSpec(k=1, select="argmax times zero", second="same again", early=True, look="nonzero"),
                "balanced",
            ),
            (
                RouterSpec(
                    experts=6, k=1, mask="groups by zero", select="max", second="same again", early=True
                ),
                "balanced",
            ),
        ],
        ids=repr,
    )
    def test_ranking_of_which_nothing_is_returned_does_not_select(self, spec, outcome):
        assert check(spec) == outcome


def add_bias_twice(monkeypatch):
    once = intercept._biased

    def twice(scores, bias_E, *rest):
        return once(scores, 2 * bias_E, *rest)

    monkeypatch.setattr(intercept, "_biased", twice)


def return_biased_values(monkeypatch):
    ranked, unbiased, last = intercept.Intercept._ranked, intercept._unbiased_result, []

    def keep(self, call):
        last[:] = [ranked(self, call).to(call.scores.dtype)]
        return last[0]

    def biased(call, ids):
        return unbiased(call._replace(scores=last[0]), ids)

    monkeypatch.setattr(intercept.Intercept, "_ranked", keep)
    monkeypatch.setattr(intercept, "_unbiased_result", biased)


def count_twice(monkeypatch):
    once = SiteCounters.count_

    def twice(self, *args, **kwargs):
        once(self, *args, **kwargs)
        once(self, *args, **kwargs)

    monkeypatch.setattr(SiteCounters, "count_", twice)


def never_move(monkeypatch):
    monkeypatch.setattr(site_group.GroupStep, "apply_", lambda *args, **kwargs: None)


class TestSabotage:
    @pytest.mark.parametrize(
        "spec",
        [
            RouterSpec(),
            *(
                pytest.param(spec, marks=pytest.mark.slow)
                for spec in (
                    RouterSpec(select="end of sort", stacked=True, place="block"),
                    RouterSpec(experts=6, k=1, select="max", combine="loop", mode="checkpoint"),
                    RouterSpec(mode="compiled"),
                )
            ),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("sabotage", [add_bias_twice, return_biased_values, count_twice, never_move])
    def test_sabotaged_balancing_is_noticed(self, monkeypatch, sabotage, spec):
        assert not fails(spec)
        sabotage(monkeypatch)
        with pytest.raises(AssertionError):
            assert check(spec) == "balanced"
