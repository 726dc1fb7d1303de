from __future__ import annotations

import pytest

from moe_plugin.apps.data.__main__ import main
from moe_plugin.errors import ConfigError


class TestMain:
    def test_own_globs_are_shown_with_their_seconds(self, tmp_path, monkeypatch, capsys):
        for i in range(20):
            (tmp_path / f"{i}.txt").write_text(f"note {i}" * 10)
        monkeypatch.chdir(tmp_path)
        main(["notes=*.txt"])
        shown = capsys.readouterr().out
        assert "notes" in shown
        assert "from the cache" in shown

    def test_glob_without_domain_is_refused(self):
        with pytest.raises(ConfigError, match=r"'argument' must be domain=glob, .*, got '\*.txt'"):
            main(["*.txt"])
