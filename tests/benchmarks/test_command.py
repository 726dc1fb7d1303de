from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.case import case_names, options_of, read_options, summary_of


@pytest.mark.parametrize("name", case_names())
class TestEveryCase:
    def test_says_what_it_measures_and_its_options_have_defaults(self, name: str) -> None:
        assert summary_of(name)
        assert all(isinstance(default, (int, float, str)) for default in options_of(name).values())


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

    def test_rows_are_written_with_the_machine(self, tmp_path: Path) -> None:
        out = tmp_path / "bench.json"
        assert main(["overhead", "rounds=2", "batch=1", "--malloc", "tuned", "--out", str(out)]) == 0
        result = json.loads(out.read_text())
        assert result["machine"]["torch"]
        (run,) = result["cases"]
        assert (run["case"], run["malloc"], len(run["rows"])) == ("overhead", "tuned", 2)
        assert run["rows"][0]["peer"] == "plain"
        assert run["load_after"] >= 0

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
