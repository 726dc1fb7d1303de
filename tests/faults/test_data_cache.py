"""Damages caches of tokens in every way, at random places, and kills processes that build them."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from moe_plugin.apps.data import Bytes, Files
from moe_plugin.apps.data.cache import load_or_build
from moe_plugin.errors import ConfigError

PLACES, KILLS, PROCESSES = 6, 24, 8
NOBODY = 65534


def source(folder):
    return Files({"letters": "a*.txt", "digits": "d*.txt"}, root=str(folder))


def load(texts, folder):
    return load_or_build(source(texts), Bytes(), 0.1, folder)


def write_texts(folder, seed):
    folder.mkdir()
    generator = random.Random(seed)
    for i in range(20):
        for letter, alphabet in (("a", "abcdefgh \n"), ("d", "0123456789 ")):
            (folder / f"{letter}{i}.txt").write_text("".join(generator.choices(alphabet, k=5000)))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts", seed=0)


@pytest.fixture(scope="module")
def others_file(tmp_path_factory):
    """The cache of another corpus."""
    folder = tmp_path_factory.mktemp("other")
    load(write_texts(folder / "texts", seed=1), folder / "cache")
    return only_file(folder / "cache")


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def same(one, other):
    return one.manifest == other.manifest and all(
        (one.streams[k] == v).all() for k, v in other.streams.items()
    )


def in_place(change):
    """Turns a function that changes a bytearray into one that changes a file."""

    def damage(path):
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return damage


def instead(make):
    """Turns a function that makes something of a name into one that does so where a file was."""

    def damage(path):
        path.unlink()
        make(path)

    return damage


@in_place
def flip_a_bit(content):
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)


@in_place
def lose_a_block(content):
    start = random.randrange(0, len(content), 4096)
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))


@in_place
def misplace_a_block(content):
    from_, to = random.sample(range(0, len(content) - 4096, 4096), 2)
    content[to : to + 4096] = content[from_ : from_ + 4096]


@in_place
def exchange_two_bytes(content):
    while True:
        i, j = random.sample(range(len(content)), 2)
        if content[i] != content[j]:
            content[i], content[j] = content[j], content[i]
            return


@in_place
def truncate(content):
    del content[random.randrange(1, len(content)) :]


@in_place
def append(content):
    content += random.randbytes(random.randrange(1, 9999))


@in_place
def break_the_header(content):
    content[random.randrange(8)] ^= 1 << random.randrange(8)


@in_place
def break_the_manifest(content):
    start = content.index(b'"documents"')
    content[random.randrange(start, start + 2000)] ^= 1 << random.randrange(8)


@in_place
def empty(content):
    content.clear()


@instead
def folder(path):
    path.mkdir()
    (path / "file").write_text("text")


@instead
def pipe(path):
    os.mkfifo(path)


@instead
def broken_link(path):
    path.symlink_to("nowhere")


DAMAGES = [
    *(flip_a_bit, lose_a_block, misplace_a_block, exchange_two_bytes, truncate, append, break_the_header),
    *(break_the_manifest, empty, folder, pipe, broken_link),
]


def repaired(texts, cache, built, caplog):
    """Returns whether the damage is noticed, said once, and gone afterwards."""
    damaged = only_file(cache)
    caplog.clear()
    noticed = same(load(texts, cache), built)
    said = caplog.messages == [f"The data cache {damaged} was damaged and has been built again."]
    path = only_file(cache)
    whole = path.stem.split("-")[-1] == hashlib.sha256(path.read_bytes()).hexdigest()
    return noticed and said and whole and same(load(texts, cache), built) and len(caplog.messages) == 1


def test_damaged_caches_are_noticed_and_built_again(texts, others_file, tmp_path, caplog, figure):
    random.seed(0)
    built = load(texts, tmp_path / "good")
    damages = [*DAMAGES, lambda path: shutil.copyfile(others_file, path)]
    results = []
    for number, damage in enumerate(damages * PLACES):
        cache = tmp_path / str(number)  # a process reads a file once: each has its own name
        shutil.copytree(tmp_path / "good", cache)
        damage(only_file(cache))
        results.append(repaired(texts, cache, built, caplog))
    figure(f"damaged caches: {sum(results)} of {len(results)} noticed and rebuilt, {len(damages)} kinds")
    assert all(results)


def child(work):
    """Starts a process that does the work, and returns its id; its exit code is 0 if nothing was raised."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except ConfigError as error:
        print(error, flush=True)
        os._exit(2)
    finally:
        os._exit(1)


def one_line(capfd):
    (line,) = capfd.readouterr().out.splitlines()
    return line


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_builders_leave_nothing_that_stays(texts, tmp_path, figure):
    random.seed(0)
    built = load(texts, tmp_path / "good")
    start = time.perf_counter()
    exit_code(child(lambda: load(texts, tmp_path / "timed")))
    seconds = time.perf_counter() - start
    good, hit = 0, 0
    while hit < KILLS:
        cache = tmp_path / str(time.time_ns())
        pid = child(lambda cache=cache: load(texts, cache))
        time.sleep(random.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if exit_code(pid) == -signal.SIGKILL:  # else it was faster
            hit += 1
            good += same(load(texts, cache), built) and only_file(cache).suffix == ".safetensors"
    figure(f"SIGKILL while building a cache: {good} of {KILLS} go on and leave nothing")
    assert good == KILLS


def test_processes_that_find_one_damaged_cache_do_not_disturb_each_other(texts, tmp_path, figure):
    random.seed(0)
    built = load(texts, tmp_path / "cache")
    codes = []
    for damage in (flip_a_bit, truncate, empty, folder):
        damage(only_file(tmp_path / "cache"))
        pids = [child(lambda: load(texts, tmp_path / "cache")) for _ in range(PROCESSES)]
        codes += [exit_code(pid) for pid in pids]
    assert same(load(texts, tmp_path / "cache"), built)
    assert only_file(tmp_path / "cache")
    figure(f"processes that repair one cache at once: {codes.count(0)} of {len(codes)} succeed")
    assert set(codes) == {0}


def test_disk_that_is_full_is_one_line_and_leaves_nothing(texts, tmp_path, capfd):
    def build():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        load(texts, tmp_path / "cache")

    assert exit_code(child(build)) == 2
    assert "'data.cache' must be writable (" in one_line(capfd)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def open_folder():
    """A folder that every user can enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("forbidden", ["text", "cache"])
def test_without_permission_is_one_line(open_folder, forbidden, capfd):
    texts = write_texts(open_folder / "texts", seed=0)
    (open_folder / "cache").mkdir(mode=0o755 if forbidden == "cache" else 0o777)
    (open_folder / "cache").chmod(0o555 if forbidden == "cache" else 0o777)
    if forbidden == "text":
        (texts / "a3.txt").chmod(0)

    def build():
        if os.getuid() == 0:
            os.setuid(NOBODY)
        load(texts, open_folder / "cache")

    assert exit_code(child(build)) == 2
    keys = {
        "text": "'source.sources.letters' must match files that can be read",
        "cache": "'data.cache' must be",
    }
    assert keys[forbidden] in one_line(capfd)
