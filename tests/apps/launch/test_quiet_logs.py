from __future__ import annotations

import logging

import pytest
from lightning_utilities.core import rank_zero

from moe_plugin.apps.launch.quiet_logs import quiet


class TestQuiet:
    @pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
    def test_what_lightning_says_is_not_heard_whichever_package_was_imported_last(
        self, package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        log = logging.getLogger(f"{package}.utilities.rank_zero")
        monkeypatch.setattr(log, "handlers", [caplog.handler])
        monkeypatch.setattr(rank_zero, "log", log)
        with caplog.at_level(logging.INFO, log.name):
            rank_zero.rank_zero_info("a tip")
            assert [record.getMessage() for record in caplog.records][-1:] == ["a tip"]
            caplog.clear()
            with quiet():
                rank_zero.rank_zero_info("a tip")
        assert not caplog.records
