"""The tests that a CPU skips; a rehearsal only collects them, so no name is wrong."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.line import Figures, Line
from benchmarks.gpu.place import Place

TESTS = {
    "the layer, waiting is an error": "tests/experts/test_cuda.py",
    "compiled kernels against their twins": "tests/experts/kernels/test_permute_triton.py",
    "a captured graph": "tests/attach/steering/test_modes.py::TestCudaGraphs",
}
"""Each in a pytest of its own: what one of them breaks on the device does not reach the others."""
LONGEST = 160
"""Characters of a test's message."""


def lines(place: Place) -> Iterator[Line]:
    """Yield each group of tests, in a rehearsal all together."""
    groups = {name: [tests] for name, tests in TESTS.items()}
    for name, tests in place.size(groups, {"all of them": list(TESTS.values())}).items():
        yield Line(name, partial(run_tests, place, tests), ("pytest", "hypothesis"))


def run_tests(place: Place, tests: Sequence[str]) -> Figures:
    """Run tests, and count them by outcome.

    Args:
        place: Where.
        tests: What pytest is to run.

    Raises:
        RuntimeError: None passed; in a rehearsal, none was found in one of the places.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"),
                *(*tests, f"--junitxml={report}"),
                *place.size([], ["--collect-only"]),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout)
        return collected(done.stdout) if place.dry else outcomes(report)


def collected(output: str) -> Figures:
    """Return how many tests pytest names.

    Raises:
        RuntimeError: One of the places has none.
    """
    named = [line for line in output.splitlines() if "::" in line]
    if empty := [tests for tests in TESTS.values() if not any(line.startswith(tests) for line in named)]:
        raise RuntimeError(f"no test was found in {', '.join(empty)}")
    return {"collected": len(named)}


def outcomes(report: Path) -> Figures:
    """Return how many tests passed, failed and were skipped, and which failed and why.

    Args:
        report: As pytest's `--junitxml` writes it.

    Raises:
        RuntimeError: None passed.
    """
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = {
        f"{case.get('name')}: {(found.get('message') or '')[:LONGEST]}"
        for case in cases
        for found in (*case.iter("failure"), *case.iter("error"))
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failures) - skipped
    if not passed:
        raise RuntimeError(f"no test of {len(cases)} passed: {'; '.join(sorted(failures))}")
    figures = {"passed": passed, "failed": len(failures), "skipped": skipped}
    return {**figures, "failures": "; ".join(sorted(failures))}
