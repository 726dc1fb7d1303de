from __future__ import annotations

import logging
from pathlib import Path

import pytest

from moe_plugin.apps import train
from moe_plugin.apps.launch.build import build_data
from moe_plugin.apps.launch.compose import compose_jobs, quote_option
from moe_plugin.apps.launch.validate_config import check, check_data
from moe_plugin.errors import ConfigError
from tests.apps.launch.small_job import WORDS, configuration

pytestmark = pytest.mark.usefixtures("workplace")


def composed(*words):
    (config,) = compose_jobs([quote_option(word) for word in (*WORDS, *words)], multirun=False)
    return config


class TestCheckData:
    def test_text_is_read_once_for_check_and_run(self, monkeypatch, caplog):
        check_data(composed())
        monkeypatch.setattr("moe_plugin.apps.data.cache.build_corpus", None)
        data = build_data(configuration(folder=Path("run")))
        data.prepare_data()
        data.setup("fit")
        assert next(iter(data.train_dataloader()))
        assert caplog.messages == []

    def test_damaged_cache_is_said_before_the_run_only(self, caplog):
        check_data(composed())
        (path,) = Path("cache").iterdir()
        path.write_bytes(path.read_bytes()[:-1])
        with caplog.at_level(logging.WARNING):
            check_data(composed())
            build_data(configuration(folder=Path("run"))).setup("fit")
        assert len(caplog.messages) == 1

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["data.cache=texts/a0.txt"], r"'data.cache' must be writable"),
            (["data.context_length=9999"], r"'data.context_length' must be < the \d+ tokens of domain"),
            (["data.val_batch_size=9999"], r"'data.val_batch_size' must be <= \d+, the validation sequences"),
            (
                ["data.source.encoding=utf-32"],
                "'data.source.sources.letters' must match utf-32 text, but 8 of 8 files are not",
            ),
            (
                [
                    *("data._target_=moe_plugin.apps.data.in_turn.DomainsInTurn", "+data.first=letters"),
                    *("+data.then=prose", "+data.change_after=1"),
                ],
                "'data.then' must be one of digits, letters, got 'prose'",
            ),
        ],
    )
    def test_text_that_cannot_be_trained_on_is_refused(self, words, message):
        with pytest.raises(ConfigError, match=f"^{message}"):
            check_data(composed(*words))

    def test_domain_that_ends_up_empty_is_refused(self):
        for path in Path("texts").glob("d*.txt"):
            path.write_text(" \n")
        with pytest.raises(ConfigError, match=r"^'data.source' must give text in domain 'digits'"):
            check_data(composed())

    def test_jobs_on_other_machines_read_their_text_there(self):
        check_data(composed("hydra/launcher=slurm", "data.context_length=9999"))
        assert not Path("cache").exists()

    def test_command_creates_no_run_folder(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            train.main([*WORDS, "data.context_length=9999"])
        assert capsys.readouterr().err.count("\n") == 1
        assert {path.name for path in Path().iterdir()} == {"cache", "texts"}


def test_validation_batch_that_ranks_cannot_share_is_refused():
    words = ["strategy=ddp", "strategy.devices=2", "data.val_batch_size=7"]
    with pytest.raises(ConfigError, match=r"'data.val_batch_size' must be a multiple of strategy.devices x"):
        check(composed(*words))
