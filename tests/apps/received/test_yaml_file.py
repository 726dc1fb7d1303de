from __future__ import annotations

import pytest

from moe_plugin.apps.received.yaml_file import read_config, read_yaml
from moe_plugin.errors import ConfigError

GREEDY = {
    "aliases": "a: &a [1]\nb: [*a, *a]",
    "merge": "a: &a {b: 1}\nc: {<<: *a}",
    "deep list": "[" * 51 + "]" * 51,
    "deep mapping": "{a: " * 51 + "1" + "}" * 51,
    "python": "!!python/object/apply:os.getcwd []",
    "tag": "!mine 1",
    "digits": "a: " + "1" * 5000,
    "control": "a: \x07",
    "open": "a: [1",
    "unhashable": "? [a]\n: 1",
}


class TestReadYaml:
    def test_plain_values_are_read(self, tmp_path):
        (tmp_path / "a").write_text("- a=1\n- {b: [null, true]}\n")
        assert read_yaml(tmp_path / "a", "key") == ["a=1", {"b": [None, True]}]

    def test_fifty_levels_are_read(self, tmp_path):
        (tmp_path / "a").write_text("[" * 50 + "]" * 50)
        assert read_yaml(tmp_path / "a", "key")

    def test_date_that_is_none_is_refused(self, tmp_path):
        (tmp_path / "a").write_text("a: 2001-13-45")
        with pytest.raises(ConfigError, match="must be plain YAML"):
            read_yaml(tmp_path / "a", "key")

    @pytest.mark.parametrize("read", [read_yaml, read_config])
    @pytest.mark.parametrize("name", GREEDY)
    def test_what_grows_or_means_more_is_refused(self, tmp_path, name, read):
        (tmp_path / "a").write_text(GREEDY[name])
        with pytest.raises(ConfigError, match=r"'key' must (have no|be plain) YAML") as caught:
            read(tmp_path / "a", "key")
        assert len(str(caught.value)) < 300


class TestReadConfig:
    def test_numbers_are_those_of_hydra_and_nothing_is_looked_up(self, tmp_path):
        (tmp_path / "a").write_text("a: 1e-3\nb: ${oc.env:HOME}\nc: ${a}\n")
        assert read_config(tmp_path / "a", "key") == {"a": 0.001, "b": "${oc.env:HOME}", "c": "${a}"}

    @pytest.mark.parametrize("text", ["[1]", "- a"])
    def test_list_is_refused(self, tmp_path, text):
        (tmp_path / "a").write_text(text)
        with pytest.raises(ConfigError, match="must be YAML with names and values"):
            read_config(tmp_path / "a", "key")
