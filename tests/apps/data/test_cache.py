from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from moe_plugin.apps.data import Bytes, Files
from moe_plugin.apps.data.cache import cache_folder, load_or_build
from moe_plugin.errors import ConfigError


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"text {i} " * 50)
    return folder


def load(texts, folder):
    return load_or_build(Files({"t": "*.txt"}, root=str(texts)), Bytes(), 0.1, folder)


def same(one, other):
    return one.manifest == other.manifest and all(
        (one.streams[k] == other.streams[k]).all() for k in one.streams
    )


class TestCacheFolder:
    def test_argument_comes_before_the_variable(self, monkeypatch):
        monkeypatch.setenv("MOE_PLUGIN_CACHE", "/from/variable")
        assert cache_folder("/given") == Path("/given")
        assert cache_folder() == Path("/from/variable")

    def test_default_is_the_users_cache(self, monkeypatch):
        monkeypatch.delenv("MOE_PLUGIN_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert cache_folder() == Path("/caches/moe_plugin")


class TestLoadOrBuild:
    def test_second_load_reads_the_same_without_the_source(self, texts, tmp_path, monkeypatch):
        built = load(texts, tmp_path / "cache")
        monkeypatch.setattr("moe_plugin.apps.data.cache.build_corpus", None)
        assert same(load(texts, tmp_path / "cache"), built)

    def test_changed_file_is_read_anew(self, texts, tmp_path):
        before = load(texts, tmp_path / "cache")
        (texts / "3.txt").write_text("changed, and longer than it was " * 30)
        assert load(texts, tmp_path / "cache").manifest["digest"] != before.manifest["digest"]

    def test_only_whole_files_are_left(self, texts, tmp_path):
        load(texts, tmp_path / "cache")
        assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".safetensors"]

    def test_many_processes_at_once_all_succeed(self, texts, tmp_path):
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=load, args=(texts, tmp_path / "cache")) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 6

    def test_folder_that_cannot_be_made_is_named(self, texts, tmp_path):
        (tmp_path / "a_file").write_text("")
        with pytest.raises(ConfigError, match=r"'data.cache' must be writable \(.*\), got '.*a_file.*'"):
            load(texts, tmp_path / "a_file" / "cache")
