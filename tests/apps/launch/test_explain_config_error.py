"""Tests of errors about a constructor's argument as errors about a key of the configuration."""

from __future__ import annotations

import pytest
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from moe_plugin.apps.launch.explain_config_error import explain_composition, locate
from moe_plugin.errors import ConfigError, Value

CONFIG = OmegaConf.create(
    {
        "model": {"dim": 8, "experts": {"top_k": 2}},
        "router": {"top_k": 9, "scale": "${model.dim}"},
        "data": {"_target_": "tests.apps.launch.test_explain_config_error.refuse", "size": 3},
    }
)


def refuse(size: int) -> None:
    """Stands for a constructor that allows nothing."""
    raise ConfigError("size", "must be even", size, "Add one.")


class TestLocate:
    @pytest.mark.parametrize(
        ("near", "key"),
        [("router", "router.top_k"), ("model", "model.experts.top_k"), ("data", "model.experts.top_k")],
    )
    def test_key_below_the_node_comes_before_others(self, near: str, key: str) -> None:
        error = locate(ConfigError("top_k", "must be <= 4", 9, "Lower it."), CONFIG, near)
        assert (error.name, error.rule, error.value, error.fix) == (key, "must be <= 4", 9, "Lower it.")

    def test_end_of_a_key_is_enough_and_a_part_of_a_name_is_not(self) -> None:
        assert (
            locate(ConfigError("experts.top_k", "must be 1"), CONFIG, "router").name == "model.experts.top_k"
        )
        assert locate(ConfigError("k", "must be 1"), CONFIG, "router").name == "router"

    def test_parameter_without_a_key_is_named_in_the_rule(self) -> None:
        error = locate(ConfigError("depth", "must be >= 1", 0, "Raise it."), CONFIG, "model")
        assert str(error) == "'model' has a parameter 'depth' that must be >= 1, got 0. Raise it."

    def test_key_that_only_points_to_another_is_not_meant(self) -> None:
        assert locate(ConfigError("scale", "must be > 0", 0), CONFIG, "router").name == "router"

    def test_other_error_is_about_the_node(self) -> None:
        error = locate(ValueError("no such\n  device."), CONFIG, "trainer")
        assert (error.name, error.value) == ("trainer", Value.NOT_SHOWN)
        assert str(error) == "'trainer' cannot be used: no such device."

    def test_error_that_hydra_wraps_keeps_its_parts(self) -> None:
        with pytest.raises(InstantiationException) as wrapped:
            instantiate(CONFIG.data)
        assert str(locate(wrapped.value, CONFIG, "model")) == "'data.size' must be even, got 3. Add one."

    def test_hydras_own_error_names_the_node_that_it_names(self) -> None:
        with pytest.raises(InstantiationException) as wrapped:
            instantiate(OmegaConf.create({"logger": {"_target_": "fractions.Nothing"}}).logger)
        assert str(locate(wrapped.value, CONFIG, "model")).startswith("'logger' cannot be used: ")


class TestExplainComposition:
    def test_what_is_not_understood_is_hydras_text_in_one_line(self) -> None:
        error = explain_composition(HydraException("Interpolation key 'x'\n  not found."), ["seed=1"], "plan")
        assert str(error) == "'plan' cannot be composed: Interpolation key 'x' not found."
