from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path

import pytest
from safetensors import SafetensorError

from moe_plugin.apps.data import Bytes, Files
from moe_plugin.apps.data.cache import cache_folder, load_or_build
from moe_plugin.checkpoints.temporary import temporary_folder
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
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]

    def test_file_is_named_by_its_hash(self, texts, tmp_path):
        load(texts, tmp_path / "cache")
        (path,) = (tmp_path / "cache").glob("*.safetensors")
        assert path.stem.split("-")[-1] == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_damaged_file_is_built_again_and_said_once(self, texts, tmp_path, caplog):
        built = load(texts, tmp_path / "cache")
        (path,) = (tmp_path / "cache").glob("*.safetensors")
        content = bytearray(path.read_bytes())
        content[-9] ^= 4
        path.write_bytes(content)
        assert same(load(texts, tmp_path / "cache"), built)
        assert same(load(texts, tmp_path / "cache"), built)
        assert caplog.messages == [f"The data cache {path} was damaged and has been built again."]

    def test_whole_file_is_read_once_in_a_process(self, texts, tmp_path, monkeypatch):
        load(texts, tmp_path / "cache")
        load(texts, tmp_path / "cache")
        monkeypatch.setattr(hashlib, "file_digest", None)
        load(texts, tmp_path / "cache")

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

    def test_folder_that_cannot_be_written_is_found_before_the_work(self, texts, tmp_path, monkeypatch):
        (tmp_path / "a_file").write_text("")
        monkeypatch.setattr("moe_plugin.apps.data.cache.build_corpus", None)
        with pytest.raises(ConfigError, match=r"'data.cache' must be writable"):
            load(texts, tmp_path / "a_file")

    def test_full_disk_is_named_and_nothing_is_left(self, texts, tmp_path, monkeypatch):
        def write(tensors, path):
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("moe_plugin.apps.data.cache.save_file", write)
        with pytest.raises(ConfigError, match=r"'data.cache' must be writable \(I/O error: No space left"):
            load(texts, tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_error_of_the_text_is_not_one_of_the_cache(self, texts, tmp_path, monkeypatch):
        def build(*_):
            raise FileNotFoundError("gone.txt")

        monkeypatch.setattr("moe_plugin.apps.data.cache.build_corpus", build)
        with pytest.raises(FileNotFoundError, match="gone"):
            load(texts, tmp_path / "cache")


class TestLeftovers:
    def test_of_the_dead_are_removed_when_the_next_corpus_is_built(self, texts, tmp_path):
        folder = tmp_path / "cache"
        folder.mkdir()
        (folder / ".corpus.0123abcd.unfinished").touch()
        (folder / ".corpus.0123abcd.unfinished.d").mkdir()
        (folder / ".corpus.0123abcd.unfinished.d" / "corpus").write_text("half")
        load(texts, folder)
        assert [path.suffix for path in folder.iterdir()] == [".safetensors"]

    def test_of_the_dead_are_removed_when_the_corpus_is_there(self, texts, tmp_path):
        load(texts, tmp_path / "cache")
        (tmp_path / "cache" / ".corpus.0123abcd.unfinished").touch()
        load(texts, tmp_path / "cache")
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]

    def test_of_the_living_are_left_alone(self, texts, tmp_path):
        folder = tmp_path / "cache"
        folder.mkdir()
        with temporary_folder(folder / "corpus") as place:
            place.mkdir()
            load(texts, folder)
            assert place.exists()
