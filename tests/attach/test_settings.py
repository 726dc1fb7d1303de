from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from moe_plugin import LossFreeBalancing, Proportional, RateSchedule, Sign, balance_
from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.settings import BalanceSettings, rule_or_default
from moe_plugin.errors import AttachError, ConfigError
from tests.hosts import Host

OWN = {"model", "process_group", "calibration", "resume_from", "detail"}


def trainer_callback() -> Callable[..., object]:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'moe_plugin[hf]'")
    from moe_plugin.callbacks.hugging_face import LossFreeTrainerCallback

    return LossFreeTrainerCallback


class TestSignatures:
    @pytest.mark.parametrize(
        "find",
        [lambda: balance_, lambda: LossFreeBalancing, trainer_callback],
        ids=["plain", "Lightning", "HF"],
    )
    def test_all_take_the_settings_in_their_order_by_keyword_after_the_rule(self, find: Callable) -> None:
        given = {n: p for n, p in inspect.signature(find()).parameters.items() if n not in OWN}
        expected = inspect.signature(BalanceSettings).parameters
        assert list(given) == list(expected)
        assert [p.kind for p in given.values()] == [p.kind for p in expected.values()]
        assert [p.default for p in given.values()] == [p.default for p in expected.values()]


class TestBalanceSettings:
    @pytest.mark.parametrize(
        ("wrong", "text"),
        [
            (
                {"frozen_routers": "thaw"},
                r"'frozen_routers' must be 'auto', 'balance' or 'keep', got 'thaw'\.",
            ),
            ({"experts": "grouped_mm"}, r"'experts' must be 'fused' or None, got 'grouped_mm'\."),
            *(
                (
                    {"sites": sites},
                    r"'sites' must be a glob that is not empty, .* each '\[' needs its '\]', got ",
                )
                for sites in ("", "[unclosed", ["*", "a[0-"], ["*", ""], 3, [None])
            ),
        ],
    )
    @pytest.mark.parametrize(
        "use", [BalanceSettings, LossFreeBalancing, lambda **wrong: balance_(Host(), **wrong)]
    )
    def test_wrong_value_is_refused_everywhere(self, use: Callable, wrong: dict, text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            use(**wrong)

    def test_equal_settings_are_equal_however_they_are_given(self) -> None:
        adapter = Adapter(block="Odd", refused="is odd")
        one = BalanceSettings(Sign(rate=0.1), schedule=None, adapters=[adapter])
        assert one == BalanceSettings(Sign(rate=0.1), schedule=RateSchedule(), adapters=(adapter,))
        assert one != BalanceSettings(Sign(rate=0.2), adapters=[adapter])

    @pytest.mark.parametrize(
        ("sites", "wanted"),
        [
            (None, ["a.router", "b.router", "b.gate"]),
            ("b.*", ["b.router", "b.gate"]),
            (["a.*", "*.gate"], ["a.router", "b.gate"]),
            (lambda name: name.endswith("gate"), ["b.gate"]),
            ([], []),
            ("[ab].[!r]*", ["b.gate"]),
        ],
    )
    def test_sites_choose_by_glob_globs_or_predicate(self, sites: object, wanted: list[str]) -> None:
        settings = BalanceSettings(sites=sites)  # pyright: ignore[reportArgumentType]
        assert [name for name in ("a.router", "b.router", "b.gate") if settings.wants(name)] == wanted

    def test_first_glob_that_matches_gives_the_rule(self) -> None:
        settings = BalanceSettings({"a.*": Sign(rate=0.1), "*.router": Proportional()})
        assert settings.rule_for("a.router") == Sign(rate=0.1)
        assert settings.rule_for("b.router") == Proportional()
        with pytest.raises(
            AttachError, match=r"a glob that matches router 'b.gate', got \['a.\*', '\*.router'\]"
        ):
            settings.rule_for("b.gate")

    def test_one_rule_is_that_of_every_router(self) -> None:
        assert BalanceSettings(None).rule_for("a.router") is None
        assert BalanceSettings(Sign(rate=0.1)).rule_for("a.router") == Sign(rate=0.1)

    def test_factor_follows_the_schedule_and_is_one_without(self) -> None:
        schedule = RateSchedule(freeze_after=2)
        steps = range(1, 5)
        assert [BalanceSettings(schedule=schedule).rate_factor(step) for step in steps] == [
            1.0,
            1.0,
            0.0,
            0.0,
        ]
        assert [BalanceSettings().rate_factor(step) for step in steps] == [1.0] * 4


class TestRuleOrDefault:
    def test_no_rule_gives_the_default_and_a_rule_itself(self) -> None:
        assert rule_or_default(None) == inspect.signature(balance_).parameters["rule"].default
        for rule in (Sign(rate=0.1), {"a.*": Sign(rate=0.1)}):
            assert rule_or_default(rule) is rule
