from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.parts.skipped_tests import TESTS, run_tests
from benchmarks.gpu.place import Place

SOURCE = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip
def test_skipped(): pass
"""


class TestOutcomes:
    def test_failures_are_told(self, tmp_path: Path) -> None:
        path = tmp_path / "test_some.py"
        path.write_text(SOURCE)
        figures = dict(run_tests(Place(dry=False), [str(path)]))
        assert str(figures.pop("failures")).startswith("test_bad: AssertionError: one is not two")
        assert figures == {"passed": 1, "failed": 1, "skipped": 1}

    def test_nothing_passed_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "test_some.py"
        path.write_text("def test_bad(): raise ValueError('no device')")
        with pytest.raises(RuntimeError, match="no test of 1 passed: test_bad: ValueError: no device"):
            run_tests(Place(dry=False), [str(path)])

    def test_every_place_exists(self) -> None:
        root = Path(__file__).parents[2]
        assert all((root / tests.partition("::")[0]).is_file() for tests in TESTS.values())
