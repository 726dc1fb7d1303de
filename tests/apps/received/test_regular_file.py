from __future__ import annotations

import json
import os

import pytest

from moe_plugin.apps.received.regular_file import read_json, read_text
from moe_plugin.errors import ConfigError


class TestReadText:
    def test_text_of_the_largest_size_is_read(self, tmp_path):
        (tmp_path / "a").write_text("ä" * 50)
        assert read_text(tmp_path / "a", "key", most=100) == "ä" * 50
        with pytest.raises(ConfigError, match=r"'key' must have at most 99 bytes, got '.*/a'"):
            read_text(tmp_path / "a", "key", most=99)

    def test_link_to_a_regular_file_is_followed(self, tmp_path):
        (tmp_path / "a").write_text("text")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        assert read_text(tmp_path / "b", "key") == "text"

    def test_pipe_is_refused_without_waiting_for_its_writer(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ConfigError, match="must be a regular file, not a folder, pipe or device"):
            read_text(tmp_path / "pipe", "key")

    def test_device_is_refused(self, tmp_path):
        (tmp_path / "zero").symlink_to("/dev/zero")
        with pytest.raises(ConfigError, match="must be a regular file"):
            read_text(tmp_path / "zero", "key")

    @pytest.mark.parametrize("name", ["absent", "."])
    def test_what_cannot_be_opened_is_named(self, tmp_path, name):
        with pytest.raises(ConfigError, match="'key' must be a"):
            read_text(tmp_path / name, "key")

    def test_other_encodings_are_refused_with_the_place(self, tmp_path):
        (tmp_path / "a").write_bytes("aä".encode("latin-1"))
        with pytest.raises(ConfigError, match=r"must be UTF-8 text \(not at byte 1\)"):
            read_text(tmp_path / "a", "key")


class TestReadJson:
    def test_mapping_is_read(self, tmp_path):
        (tmp_path / "a").write_text(json.dumps({"a": [1, None]}))
        assert read_json(tmp_path / "a", "key") == {"a": [1, None]}

    @pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000, "{'a': 1}", "1" * 5000])
    def test_anything_else_is_refused(self, tmp_path, text):
        (tmp_path / "a").write_text(text)
        with pytest.raises(ConfigError, match="'key' must be JSON"):
            read_json(tmp_path / "a", "key")
