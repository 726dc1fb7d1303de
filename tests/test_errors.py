from __future__ import annotations

import pickle

import pytest

from moe_plugin.errors import ConfigError, MoEPluginError


class TestConfigError:
    def test_message_gives_name_rule_value_and_fix(self) -> None:
        error = ConfigError("top_k", "must be <= num_experts (8)", 9, "Lower it.")
        assert str(error) == "'top_k' must be <= num_experts (8), got 9. Lower it."

    def test_text_is_quoted_as_a_value(self) -> None:
        error = ConfigError("frozen_routers", "must be 'auto', 'balance' or 'keep'", "thaw")
        assert str(error) == "'frozen_routers' must be 'auto', 'balance' or 'keep', got 'thaw'."

    def test_none_is_a_value(self) -> None:
        assert (
            str(ConfigError("rule", "must be an update rule", None))
            == "'rule' must be an update rule, got None."
        )

    def test_value_that_is_not_given_is_not_shown(self) -> None:
        assert str(ConfigError("data.files", "must be given")) == "'data.files' must be given."

    def test_pickling_keeps_every_part(self) -> None:
        for error in (ConfigError("k", "must be > 0", 0, "Raise it."), ConfigError("k", "must be given")):
            copy = pickle.loads(pickle.dumps(error))
            assert vars(copy) == vars(error)
            assert str(copy) == str(error)

    def test_renaming_changes_the_name_alone(self) -> None:
        error = ConfigError("top_k", "must be <= 8", 9, "Lower it.").renamed("experts.top_k")
        assert str(error) == "'experts.top_k' must be <= 8, got 9. Lower it."

    def test_is_a_value_error_of_ours(self) -> None:
        with pytest.raises(ValueError, match="'k' must be > 0") as caught:
            raise ConfigError("k", "must be > 0", 0)
        assert isinstance(caught.value, MoEPluginError)
