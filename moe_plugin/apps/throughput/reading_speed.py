"""How fast a trained model reads many sequences at once: whole sequences, without a cache or decoding.

Shape legend: N sequences at most, S tokens of a sequence, B batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.table import Table
from torch import Tensor

from moe_plugin.apps.data import CorpusDataModule
from moe_plugin.apps.models.language_model import TokenModel
from moe_plugin.apps.throughput.peak_memory import PeakMemory
from moe_plugin.apps.throughput.throughput_settings import ThroughputSettings
from moe_plugin.errors import ConfigError

SHORTEST = 0.2
"""Seconds that are timed at least: one short read depends on what ran before it, whose data fill the caches."""


@dataclass(frozen=True)
class Reading:
    """Measures of reading some sequences at once; all None if they do not fit in memory.

    Attributes:
        sequences: Their number.
        tokens_per_second: Median over the rounds.
        relative_time_per_token: Over that of the smallest number of sequences in the same round; median.
        peak_memory_mib: What reading takes in addition to the model; None if it is not known.
    """

    sequences: int
    tokens_per_second: float | None = None
    relative_time_per_token: float | None = None
    peak_memory_mib: float | None = None


def check_throughput(settings: ThroughputSettings, model: LightningModule, data: LightningDataModule) -> None:
    """Check that the model and the text can be read in this way, without reading anything.

    Args:
        settings: How many sequences at once.
        model: The model; the meta device is enough.
        data: What holds the text.

    Raises:
        ConfigError: They can't, or sequences are longer than the model reads.
    """
    for key, value, kind in (("model", model, TokenModel), ("data", data, CorpusDataModule)):
        if not isinstance(value, kind):
            raise ConfigError(key, f"must be a {kind.__name__} for throughput=true", type(value).__name__)
    assert isinstance(model, TokenModel)
    settings.length_for(model.context_length)


def measure_throughput(trainer: Trainer, settings: ThroughputSettings) -> dict[str, Any]:
    """Read held-out text with the model that the trainer has validated, in the trainer's precision.

    Args:
        trainer: After `validate`.
        settings: How many sequences at once.

    Returns:
        ``device``, ``length``, ``rounds``, and ``readings``: a `Reading` for each number of sequences.
    """
    model, data, device = trainer.lightning_module, trainer.datamodule, trainer.strategy.root_device  # pyright: ignore
    assert isinstance(model, TokenModel)
    assert isinstance(data, CorpusDataModule)
    length = settings.length_for(model.context_length)
    tokens_NS = cut_text(data.val_dataloader(), settings.sequences[-1], length).to(device)
    model.to(device).eval()
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        readings = read_at_once(model, tokens_NS, settings.sequences, settings.rounds)
    measured = {"device": str(device), "length": length, "rounds": settings.rounds}
    return measured | {"readings": [asdict(reading) for reading in readings]}


def cut_text(batches: Iterable[Mapping[str, Tensor]], number: int, length: int) -> Tensor:
    """Cut batches into sequences, again from the beginning if there is too little text.

    Args:
        batches: Each with ``tokens``.
        number: How many sequences.
        length: Tokens of each.

    Returns:
        int64 (number, length).
    """
    parts, found = [], 0
    for batch in batches:
        tokens_BS = batch["tokens"][:, :-1]
        whole = tokens_BS.shape[1] // length * length
        parts.append(tokens_BS[:, :whole].reshape(-1, length))
        found += len(parts[-1])
        if found >= number:
            break
    return torch.cat(parts)[torch.arange(number) % found]


def read_at_once(
    read: Callable[[Tensor], object], tokens_NS: Tensor, sequences: Sequence[int], rounds: int
) -> list[Reading]:
    """Time reading the first 1, 4, ... of the sequences; all numbers take turns, after a first time that is not timed.

    Args:
        read: Takes int64 (B, S).
        tokens_NS: At least as many sequences as the largest number.
        sequences: Numbers of sequences, rising. Those that do not fit in memory are not timed.
        rounds: Times that each is read.
    """
    peaks = _peaks_until_memory_ends(read, tokens_NS, sequences)
    seconds: dict[int, list[float]] = {number: [] for number in peaks}
    for _ in range(rounds):
        for number in peaks:
            seconds[number].append(_seconds_of(partial(read, tokens_NS[:number]), tokens_NS.device))
    return [
        reading(number, seconds, peaks[number], tokens_NS.shape[1]) if number in peaks else Reading(number)
        for number in sequences
    ]


def _peaks_until_memory_ends(
    read: Callable[[Tensor], object], tokens_NS: Tensor, sequences: Sequence[int]
) -> dict[int, int | None]:
    """Return the bytes that each number of sequences takes, if known; without those that do not fit in memory."""
    memory, peaks = PeakMemory(tokens_NS.device), {}
    with suppress(torch.OutOfMemoryError):
        for number in sequences:
            peaks[number] = memory.of(partial(read, tokens_NS[:number]))
    return peaks


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of some work on a device: of doing it once if it is long, on average if it is short."""
    begin, times = time.perf_counter(), 0
    while True:
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= SHORTEST:
            return elapsed / times


def reading(number: int, seconds: Mapping[int, Sequence[float]], peak: int | None, length: int) -> Reading:
    """Return the measures of a number of sequences, relative to the smallest.

    Args:
        number: Of sequences.
        seconds: By number, of each round.
        peak: Bytes that the number takes, if known.
        length: Tokens of a sequence.
    """
    fewest = min(seconds)
    ratios = [
        (one / number) / (other / fewest) for one, other in zip(seconds[number], seconds[fewest], strict=True)
    ]
    return Reading(
        number,
        tokens_per_second=number * length / statistics.median(seconds[number]),
        relative_time_per_token=statistics.median(ratios),
        peak_memory_mib=None if peak is None else peak / 2**20,
    )


def throughput_table(throughput: Mapping[str, Any]) -> Table:
    """Return the table for the terminal of what `measure_throughput` returned."""
    readings = [Reading(**each) for each in throughput["readings"]]
    title = f"Reading held-out text at once, {throughput['length']} tokens a sequence, {throughput['device']}"
    table = Table(title=title, title_justify="left")
    beside = f"time per token / that of {readings[0].sequences:,}"
    for column in ("sequences", "tokens/s", beside, "peak MiB"):
        table.add_column(column, justify="right")
    for each in readings:
        speed = "out of memory" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}"
        memory = "" if each.peak_memory_mib is None else f"{each.peak_memory_mib:,.0f}"
        growth = "" if each.relative_time_per_token is None else f"{each.relative_time_per_token:.3f}"
        table.add_row(f"{each.sequences:,}", speed, growth, memory)
    return table
