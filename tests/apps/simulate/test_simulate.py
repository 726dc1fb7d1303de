from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from moe_plugin.apps.simulate.__main__ import main
from moe_plugin.apps.simulate.sources import Bursty, Collapsing, Drifting, Fixed
from moe_plugin.apps.simulate.trial import Setting, try_rule
from moe_plugin.balancing.rules import Proportional, Quantile, Sign
from moe_plugin.errors import ConfigError
from moe_plugin.routing import Sigmoid

SOURCES = [Fixed(), Drifting(), Bursty(), Collapsing()]
sources = pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)


def setting(**changes):
    return Setting(
        **({"num_experts": 8, "top_k": 2, "tokens": 4096, "steps": 60, "score": Sigmoid()} | changes)
    )


def started(source, num_experts=8):
    return source.start(256, num_experts, torch.Generator().manual_seed(1))


def first_violations(sizes):
    """MaxVio of the population and of a batch at the first step, whose bias is 0."""
    stream = Fixed().start(sizes.population, sizes.num_experts, torch.Generator().manual_seed(sizes.seed))
    logits, drawn = stream.logits_NE().tolist(), stream.draw_N(sizes.tokens).tolist()
    loads = [0] * sizes.num_experts, [0] * sizes.num_experts
    for scores, times in zip(logits, drawn, strict=True):  # a sigmoid does not change the order
        for expert in sorted(range(sizes.num_experts), key=scores.__getitem__)[-sizes.top_k :]:
            loads[0][expert] += 1
            loads[1][expert] += times
    return tuple(max(load) / (sum(load) / sizes.num_experts) - 1 for load in loads)


class TestSources:
    @sources
    @pytest.mark.parametrize("tokens", [1, 100, 10**6])
    def test_batch_has_as_many_tokens_as_asked_for(self, source, tokens):
        assert started(source).draw_N(tokens).sum() == tokens

    @sources
    def test_same_seed_gives_the_same_stream(self, source):
        streams = [started(source), started(source)]
        for stream in streams:
            stream.advance_(1, torch.arange(8))
        assert torch.equal(*(stream.logits_NE() for stream in streams))
        assert torch.equal(*(stream.draw_N(100) for stream in streams))

    def test_fixed_scores_stay_and_drifting_ones_return_after_a_period(self):
        for source, halfway_differs in ((Fixed(), False), (Drifting(period=20), True)):
            stream = started(source)
            first = stream.logits_NE()
            stream.advance_(10, torch.arange(8))
            assert torch.allclose(stream.logits_NE(), first) is not halfway_differs
            stream.advance_(20, torch.arange(8))
            torch.testing.assert_close(stream.logits_NE(), first, rtol=0, atol=1e-5)

    def test_bursty_batches_differ_in_their_domains(self):
        stream, shares = started(Bursty(burst=2.0)), []
        for step in range(20):
            drawn_N = stream.draw_N(10_000)
            shares.append(torch.bincount(stream.domain_N, weights=drawn_N.double()) / 10_000)
            stream.advance_(step, torch.arange(8))
        assert torch.stack(shares).std(0).max() > 0.1

    def test_collapsing_router_comes_to_like_what_it_uses(self):
        stream = started(Collapsing(feedback=0.5))
        before_E = stream.taste_E.clone()
        stream.advance_(1, torch.tensor([14, 0, 0, 0, 0, 0, 1, 1]))
        assert (stream.taste_E - before_E)[0] == pytest.approx(0.5)
        assert (stream.taste_E - before_E)[1] == pytest.approx(-0.5)


class TestTrial:
    @sources
    def test_rule_that_does_nothing_leaves_the_load_uneven(self, source):
        trial = try_rule(Sign(rate=0.0), source, setting())
        assert trial.steps_to_balance is None
        assert trial.bias_range == trial.oscillation == 0
        assert trial.tail_expected > 0.5

    @pytest.mark.parametrize("rule", [Proportional(), Quantile()], ids=repr)
    def test_fixed_scores_are_balanced_to_the_sampling_floor(self, rule):
        trial = try_rule(rule, Fixed(), setting(tokens=2**20))
        assert trial.steps_to_balance is not None
        assert trial.expected[trial.steps_to_balance] < 0.1 <= min(trial.expected[: trial.steps_to_balance])
        assert trial.tail_batch < 0.1

    def test_floor_is_about_what_even_probabilities_give(self):
        generator, chances = torch.Generator().manual_seed(0), torch.ones(64) / 64
        violations = []
        for _ in range(50):
            counts_E = torch.bincount(
                torch.multinomial(chances, 10**5, True, generator=generator), minlength=64
            )
            violations.append((counts_E.max() / counts_E.double().mean() - 1).item())
        floor = setting(num_experts=64, top_k=1, tokens=10**5).floor
        assert floor == pytest.approx(math.sqrt(2 * math.log(64) * (63 / 64) * 64 / 10**5))
        assert sum(violations) / 50 == pytest.approx(floor, rel=0.25)

    @pytest.mark.parametrize("changes", [{"tokens": 256}, {"num_experts": 512, "top_k": 16}, {"top_k": 1}])
    def test_first_step_of_extreme_sizes_is_that_by_loops(self, changes):
        sizes = setting(**changes, steps=3)
        trial = try_rule(Quantile(), Fixed(), sizes)
        assert len(trial.batch) == len(trial.expected) == 3
        assert (trial.expected[0], trial.batch[0]) == pytest.approx(first_violations(sizes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": 0}, "'tokens' must be an integer >= 1, got 0."),
            ({"top_k": 8}, r"'top_k' must be < num_experts \(8\), got 8"),
        ],
    )
    def test_bad_setting_is_refused(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            setting(**changes)


class TestCommand:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        self.words = ["moe-simulate", "setting.num_experts=8", "setting.top_k=2", "setting.steps=5"]
        self.run = lambda *words: (monkeypatch.setattr(sys, "argv", [*self.words, *words]), main())

    def test_table_and_picture_show_every_rule(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "160")
        self.run("setting.tokens=256")
        shown = capsys.readouterr().out
        for name in (
            "sign",
            "proportional",
            "momentum",
            "pid",
            "quantile",
            "primal_dual",
            "adaptive",
            "drifting",
            "bursty",
        ):
            assert name in shown
        assert Path("runs/simulate/rules.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("setting.top_k=9", "'setting.top_k' must be < num_experts (8), got 9."),
            ("setting.steps=x", "'setting.steps' must be a whole number, got 'x'."),
            ("rules.sign.rate=-1", "'rules.sign.rate' must be a number >= 0 or 'auto', got -1."),
            ("rules.quantile.rate=-1", "'rules.quantile.rate' must be"),
        ],
    )
    def test_wrong_value_is_told_in_one_line(self, word, message, capsys):
        with pytest.raises(SystemExit, match="2"):
            self.run(word)
        assert message in capsys.readouterr().err
