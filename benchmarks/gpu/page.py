"""The figures of a run as a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.decisions import RULES, decisions
from benchmarks.gpu.goals import Goal, goals
from benchmarks.gpu.part_table import PARTS
from benchmarks.gpu.results import Results

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
INTRODUCTION = """\
# On a GPU

One command measures what a CPU cannot. It installs nothing, takes ten minutes, and writes `gpu.json` and `log.txt`:

```bash
make gpu                                          # into runs/gpu/DATE
python -m benchmarks.gpu --out DIR --minutes 9    # the same, with a limit of your own
python -m benchmarks.gpu --table DIR/gpu.json     # write this page from a run
make gpu-env                                      # an environment with CUDA for it, in build/gpu
make gpu DRY=1                                    # rehearse all of it on a CPU, at tiny sizes
```

A line that fails, hangs or lacks a package is noted, and the next one runs. `gpu.json` is up to date at any time.
`--only PART` runs one part: {parts}.
A machine without a network needs the packages of `pyproject.toml`. Without Hydra, `strategies` is passed over.
"""
NOTHING = """\
## Nothing measured yet

No GPU has run this. Every line is unmeasured: {titles}.
"""
DRY = """\
## A rehearsal on a CPU

**Nothing here is a measurement.** The same code ran at tiny sizes. In place of CUDA: tests are collected and not run,
NCCL is gloo, compiled code runs uncompiled, Triton is interpreted, and waits are counted by operation.
"""
COLUMNS = """\
"ms" is the median of a call with a cold L2 cache. "TFLOP/s" counts the products of the experts. "error" is the largest
distance of outputs and gradients from fp32, relative to their norm. "waits" is how often the host waited for the device
in one call. "products" are the six grouped products of a step alone, over sorted rows and equally full experts: the
limit. "us more" is what attaching adds to a call. "MFU %" is of the card's peak in bf16, if it is known.
"""


def page_of(result: Mapping[str, Any] | None) -> str:
    """Return the page of a run; None is one that has not been."""
    results = Results(result)
    is_run = result is not None and not result["dry"]
    parts = [_introduction(result), _goals(goals(results), is_run), "## Rules\n", RULES, _decisions(results)]
    if result is not None:
        parts += ["## Figures\n", COLUMNS, *(_part(part) for part in result["parts"])]
    return "\n".join(parts)


def _introduction(result: Mapping[str, Any] | None) -> str:
    text = INTRODUCTION.format(parts=", ".join(f"`{part.name}`" for part in PARTS))
    if result is None:
        titles = "; ".join(part.title for part in PARTS)
        return f"{text}\n{NOTHING.format(titles=titles)}"
    if result["dry"]:
        return f"{text}\n{DRY}"
    return f"{text}\n{_measured(result)}"


def _measured(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    packages = ("torch", "triton", "transformers", "lightning", "hydra-core")
    rows = {
        "card": f"{machine.get('gpu')}, {machine.get('gpu_gib')} GiB, capability {machine.get('capability')}",
        "driver": f"{machine.get('driver')}, CUDA {machine.get('cuda')}",
        "packages": ", ".join(f"{name} {machine.get(name)}" for name in packages),
        "commit": result["commit"],
        "command": f"`{result['command']}`",
        "time": result["time"],
    }
    return "## Measured\n\n" + _table(("what", "value"), rows.items())


def _goals(found: Iterable[Goal], is_run: bool) -> str:
    words = {None: "", True: "yes", False: "**no**"} if is_run else {}
    rows = [
        (
            goal.text,
            _short(goal.figure),
            _bounds(goal),
            words.get(goal.is_met, "" if goal.figure is None else "rehearsed"),
        )
        for goal in found
    ]
    return "## Goals\n\nFor cards like the H100 and H200.\n\n" + _table(
        ("what", "measured", "goal", "met"), rows
    )


def _bounds(goal: Goal) -> str:
    bounds = (("at least", goal.least), ("at most", goal.most))
    return ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


def _decisions(results: Results) -> str:
    return _table(("what", "by these rules"), decisions(results))


def _part(part: Mapping[str, Any]) -> str:
    title = next(each.title for each in PARTS if each.name == part["part"])
    columns = list(dict.fromkeys(key for line in part["lines"] for key in line.get("figures", {})))
    rows = [
        (line["name"], *(_short(line.get("figures", {}).get(key)) for key in columns), _note(line))
        for line in part["lines"]
    ]
    stopped = f"Stopped: {_escaped(part['reason'])}\n" if part["reason"] else ""
    return f"### {title}\n\n{_table(('what', *columns, 'note'), rows)}{stopped}"


def _note(line: Mapping[str, Any]) -> str:
    if line["state"] == "measured":
        return ""
    return f"{line['state']}: {line['reason']}" if line.get("reason") else line["state"]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "".join(f"| {' | '.join(map(_escaped, row))} |\n" for row in _with_rule(head, rows))


def _with_rule(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    yield head
    yield ["---"] * len(head)
    yield from rows


def _escaped(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _short(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
