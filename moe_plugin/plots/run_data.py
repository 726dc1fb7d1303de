"""The logs of a finished run: from its TensorBoard events, or from the CSV logger if there are none.

Shape legend: L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_plugin.errors import ConfigError
from moe_plugin.plots.event_file import count_events

EXPERT_USE_FILE = "expert_use.json"
"""File next to the logs with what experts take, and how many tokens use, in the last validation run."""

Series = tuple[list[int], list[float]]


@dataclass(frozen=True)
class RunData:
    """The logged load of a run.

    Attributes:
        label: The run's name in pictures.
        scalars: Steps and values of each scalar tag.
        counts: Steps and tokens per expert (L, E) under `load` (windows of training steps) and `val`
            (validation runs), with -1 past the last expert of a layer. Empty without events.
    """

    label: str
    scalars: dict[str, Series]
    counts: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)


def named(word: str) -> tuple[str, Path]:
    """Return the label and the folder that a word of the command line stands for.

    Args:
        word: A run's folder, or `label=folder`; the label is the folder's name if left out. A name with a `=` is that
            of a folder if there is one.
    """
    label, equals, path = word.partition("=")
    if equals and not Path(word).exists():
        return label, Path(path)
    return Path(word).resolve().name, Path(word)


def read_run(label: str, folder: Path) -> RunData:
    """Read the logs of a run.

    Args:
        label: The run's name in pictures, see `named`.
        folder: The run's folder.

    Raises:
        ConfigError: The folder is missing, or has neither events nor `metrics.csv`, or they are damaged.
    """
    if not folder.is_dir():
        raise ConfigError("RUN", "must be the folder of a run", str(folder), "There is no such folder.")
    events = sorted(folder.rglob("events.out.tfevents.*"))
    if sum(count_events(path) for path in events):
        return _read_events(label, events)
    if tables := sorted(folder.rglob("metrics.csv")):
        return RunData(label, _read_csv(tables[-1]))
    raise ConfigError("RUN", "must have TensorBoard events or metrics.csv", str(folder))


def _read_events(label: str, events: list[Path]) -> RunData:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    data = RunData(label, {}, {"load": [], "val": []})
    for folder in dict.fromkeys(path.parent for path in events):
        reader = EventAccumulator(
            str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 1}
        ).Reload()
        for tag in reader.Tags()["scalars"]:
            points = reader.Scalars(tag)
            data.scalars[tag] = [point.step for point in points], [point.value for point in points]
        for kind, loads in data.counts.items():
            if f"{kind}/tokens_per_expert" in reader.Tags()["tensors"]:
                tensors = reader.Tensors(f"{kind}/tokens_per_expert")
                loads += [(tensor.step, tensor_util.make_ndarray(tensor.tensor_proto)) for tensor in tensors]
    return data


def _read_csv(path: Path) -> dict[str, Series]:
    scalars: dict[str, Series] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                for tag, value in row.items():
                    if value and tag not in {"step", "epoch"}:
                        steps, values = scalars.setdefault(tag, ([], []))
                        steps.append(int(row["step"]))
                        values.append(float(value))
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            rule = f"must have a table of numbers by step (not so in line {rows.line_num})"
            raise ConfigError("RUN", rule, str(path)) from error
    return scalars
