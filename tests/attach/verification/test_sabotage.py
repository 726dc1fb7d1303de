"""Each check fails when exactly that is broken which it is there for."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.attach import balanced_model
from moe_plugin.attach.site import Site
from moe_plugin.attach.site_counters import SiteCounters
from moe_plugin.attach.steering import bias, intercept, router
from moe_plugin.attach.token_mask import TokenMask
from moe_plugin.attach.verification.battery import CHECKS, verify_model
from moe_plugin.balancing import counts, tally
from moe_plugin.balancing.rules import Proportional
from tests.attach.verification.small_models import Layers, run

unbiased_result, biased, record_, count_ = (
    intercept._unbiased_result,
    intercept._biased,
    Site.record_,
    SiteCounters.count_,
)
ranked = intercept.Intercept._ranked
step = Proportional.step


def scaled_values(call, ids):
    values, ids = unbiased_result(call, ids)
    return values * (1 + 1e-6), ids


def detached_values(call, ids):
    values, ids = unbiased_result(call, ids)
    return values.detach(), ids


def biased_values(self, call):
    """Replace the scores in place by what is ranked, so values come from there."""
    scores_TE = ranked(self, call)
    call.scores.data.copy_(scores_TE)
    return scores_TE


def biased_by(factor):
    return lambda scores, bias_E, *rest: biased(scores, factor * bias_E, *rest)


def count_twice_(self, *args, **kwargs):
    count_(self, *args, **kwargs)
    count_(self, *args, **kwargs)


def record_unless(condition):
    def record(self, seen, output, **kwargs):
        if not condition(self, kwargs):
            record_(self, seen, output, **kwargs)

    return record


def forget_the_first_token_(self, seen, output, **kwargs):
    fewer = [
        each._replace(expert_ids_TK=each.expert_ids_TK[1:], selected_TK=each.selected_TK[1:]) for each in seen
    ]
    record_(self, fewer, output, **kwargs)


def keep_the_buffer_(module):
    bias.release_fp32_(module, bias.OWN_NAME)


def cast_too(self, fn, recurse=True):
    return super(bias.Fp32Bias, self)._apply(fn, recurse)


SABOTAGE = {
    "zero_bias": [
        (intercept, "_unbiased_result", scaled_values),
        (intercept, "_unbiased_result", detached_values),
    ],
    "counts": [(SiteCounters, "count_", count_twice_), (Site, "record_", forget_the_first_token_)],
    "large_bias": [(intercept, "_biased", biased_by(0)), (intercept, "_biased", biased_by(-1))],
    "random_bias": [(intercept, "_biased", biased_by(2)), (intercept, "_biased", biased_by(0))],
    "unbiased_gates": [
        (intercept.Intercept, "_ranked", biased_values),
        (intercept, "_unbiased_result", detached_values),
    ],
    "small_bias": [(intercept.Intercept, "_ranked", biased_values)],
    "update_moves_bias": [
        (Proportional, "step", lambda *args: 0 * step(*args)),
        (Proportional, "step", lambda *args: -step(*args)),
    ],
    "default_rule_balances": [(Proportional, "step", lambda *args: -step(*args))],
    "remove": [
        (bias, "remove_own_bias_", keep_the_buffer_),
        (TokenMask, "unwatch_", lambda _: None),
        (balanced_model, "detach_", lambda site: router.unwatch_(site.router)),
    ],
    "deepcopy": [(Site, "__deepcopy__", lambda site, memo: site)],
    "pickle": [
        (Site, "__setstate__", lambda site, state: vars(site).update(state, observer=lambda *_: None))
    ],
    "checkpointing": [
        (counts, "is_training_forward", lambda grad_enabled: grad_enabled),
        (tally, "is_training_forward", lambda grad_enabled: True),
    ],
    "bf16": [(bias.Fp32Bias, "_apply", cast_too)],
    "compile": [(Site, "record_", record_unless(lambda _, how: how["compiling"]))],
    "inference_mode": [(Site, "record_", record_unless(lambda *_: torch.is_inference_mode_enabled()))],
    "functional_call": [
        (
            Site,
            "record_",
            record_unless(lambda site, _: not isinstance(site.router.weight, torch.nn.Parameter)),
        )
    ],
}


class TestSabotage:
    def test_every_check_is_sabotaged(self):
        assert SABOTAGE.keys() == CHECKS.keys()

    @pytest.mark.parametrize(
        ("check", "number"),
        [(check, number) for check, ways in SABOTAGE.items() for number in range(len(ways))],
    )
    def test_broken_balancing_fails_its_check(self, check, number, monkeypatch):
        monkeypatch.setattr(*SABOTAGE[check][number], raising=False)
        (result,) = verify_model(Layers(), run, checks=[check])
        assert result.status == "failed"
        assert result.detail
