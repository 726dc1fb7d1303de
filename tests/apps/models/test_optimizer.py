from __future__ import annotations

import math

import pytest
from torch.optim import AdamW

from moe_plugin.apps.models import AdamWWarmupCosine
from moe_plugin.errors import ConfigError
from tests.apps.models.small_models import language_model


class TestOptimizer:
    def test_norms_do_not_decay_and_matrices_do(self):
        model = language_model()
        model.network.embedding.weight.requires_grad_(False)
        optimizer = AdamWWarmupCosine(weight_decay=0.3).optimizer(model.parameters(), fused=True)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        names = {name: decay.get(id(p)) for name, p in model.named_parameters()}
        assert names.pop("network.embedding.weight") is None
        assert all(value == (0.0 if "norm" in name else 0.3) for name, value in names.items())

    def test_numbers_reach_adamw(self):
        numbers = AdamWWarmupCosine(learning_rate=0.5, betas=(0.8, 0.9))
        optimizer = numbers.optimizer(language_model().parameters(), fused=False)
        assert isinstance(optimizer, AdamW)
        assert optimizer.defaults["lr"] == 0.5
        assert optimizer.defaults["betas"] == (0.8, 0.9)


class TestFactor:
    def test_values_match_formula(self):
        schedule = AdamWWarmupCosine(warmup_steps=4, floor=0.1)
        factors = [schedule.factor(step, 24) for step in range(30)]
        assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert factors[14] == pytest.approx(0.1 + 0.9 * 0.5)
        assert factors[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
        assert factors[24:] == pytest.approx([0.1] * 6)

    @pytest.mark.parametrize("total_steps", [0, 1, 5])
    def test_run_shorter_than_warm_up_stays_below_peak(self, total_steps):
        schedule = AdamWWarmupCosine(warmup_steps=5)
        assert all(0 < schedule.factor(step, total_steps) <= 1 for step in range(10))


class TestValidation:
    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ({"learning_rate": 0.0}, "'learning_rate' must be a number > 0, got 0.0"),
            ({"learning_rate": math.nan}, "'learning_rate' must be a number > 0, got nan"),
            ({"weight_decay": -0.1}, "'weight_decay' must be a number >= 0, got -0.1"),
            ({"betas": (0.9, 1.0)}, "'betas' must be a number >= 0 and < 1, got 1.0"),
            ({"betas": (0.9,)}, r"'betas' must be two numbers, got \(0.9,\)"),
            ({"warmup_steps": -1}, "'warmup_steps' must be an integer >= 0, got -1"),
            ({"warmup_steps": 0.5}, "'warmup_steps' must be an integer >= 0, got 0.5"),
            ({"floor": 1.5}, "'floor' must be a number from 0 to 1, got 1.5"),
        ],
    )
    def test_bad_number_is_named(self, numbers, message):
        with pytest.raises(ConfigError, match=message):
            AdamWWarmupCosine(**numbers)
