from __future__ import annotations

import json
from importlib import import_module
from inspect import getdoc
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.case import case_names, options_of, read_options, summary_of


@pytest.mark.parametrize("name", case_names())
class TestEveryCase:
    def test_summary_is_the_first_line_and_options_have_defaults(self, name: str) -> None:
        summary, *options = summary_of(name).split("  ")
        assert summary == (getdoc(import_module(f"benchmarks.cases.{name}")) or "").splitlines()[0]
        assert all(isinstance(default, (int, float, str)) for default in options_of(name).values())
        assert options == [f"[{', '.join(f'{key}={value}' for key, value in options_of(name).items())}]"]


class TestOptions:
    def test_words_take_the_type_of_the_default(self) -> None:
        assert read_options("overhead", {"rounds": "7", "layers": "3"}) == {"rounds": 7}


class TestCommand:
    def test_case_that_is_not_there_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["rooter"])
        assert "got rooter" in capsys.readouterr().err

    def test_option_that_no_case_has_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["overhead", "layers=3"])
        assert "batch, rounds, got layers" in capsys.readouterr().err

    def test_rows_are_written_with_the_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("benchmarks.__main__.load", iter([1.5, 2.5]).__next__)
        out = tmp_path / "bench.json"
        assert main(["overhead", "rounds=2", "batch=1", "--malloc", "tuned", "--out", str(out)]) == 0
        result = json.loads(out.read_text())
        assert result["machine"]["torch"] == torch.__version__
        (run,) = result["cases"]
        assert (run["case"], run["malloc"]) == ("overhead", "tuned")
        assert [row["peer"] for row in run["rows"]] == ["plain", "a whole step"]
        assert (run["load_before"], run["load_after"]) == (1.5, 2.5)

    def test_cases_that_are_done_are_written_before_the_next_one_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def measure(name: str, malloc: str, *_: object) -> dict[str, object]:
            if malloc == "tuned":
                raise KeyboardInterrupt
            return {"case": name, "malloc": malloc, "failed": False}

        monkeypatch.setattr("benchmarks.__main__._measure", measure)
        with pytest.raises(KeyboardInterrupt):
            main(["router", "--out", str(tmp_path / "bench.json")])
        (run,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
        assert (run["case"], run["malloc"]) == ("router", "default")
