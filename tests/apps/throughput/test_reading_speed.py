from __future__ import annotations

from collections import Counter

import pytest
import torch

from moe_plugin.apps.throughput import reading_speed
from moe_plugin.apps.throughput.reading_speed import (
    Reading,
    cut_text,
    read_at_once,
    reading,
    throughput_table,
)


@pytest.fixture(autouse=True)
def one_read_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_speed, "SHORTEST", 0.0)


class TestText:
    def test_sequences_are_pieces_of_the_batches_in_order(self) -> None:
        tokens_BS = torch.arange(2 * 12).view(2, 12)  # 11 inputs each, of which two pieces of 5 are whole
        text_NS = cut_text([{"tokens": tokens_BS}, {"tokens": tokens_BS + 100}], number=5, length=5)
        assert [row.tolist() for row in text_NS] == [
            [0, 1, 2, 3, 4],
            [5, 6, 7, 8, 9],
            [12, 13, 14, 15, 16],
            [17, 18, 19, 20, 21],
            [100, 101, 102, 103, 104],
        ]

    def test_too_little_text_begins_again(self) -> None:
        text_NS = cut_text([{"tokens": torch.arange(5)[None]}], number=5, length=2)
        assert text_NS.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]


class TestReading:
    def test_each_number_is_read_once_before_and_once_a_round(self) -> None:
        seen: Counter[tuple[int, ...]] = Counter()
        tokens_NS = torch.arange(8 * 3).view(8, 3)
        readings = read_at_once(lambda t: seen.update([tuple(t.shape)]), tokens_NS, (1, 2, 8), rounds=4)
        assert seen == {(1, 3): 5, (2, 3): 5, (8, 3): 5}
        assert [each.sequences for each in readings] == [1, 2, 8]
        assert readings[0].relative_time_per_token == 1.0

    def test_numbers_for_which_memory_does_not_suffice_are_left_out(self) -> None:
        def read(tokens_BS: torch.Tensor) -> None:
            if len(tokens_BS) > 2:
                raise torch.OutOfMemoryError("too much")

        readings = read_at_once(read, torch.zeros(8, 3), (1, 2, 4, 8), rounds=1)
        assert [each.tokens_per_second is None for each in readings] == [False, False, True, True]
        assert readings[2:] == [Reading(4), Reading(8)]

    def test_numbers_are_medians_of_the_rounds(self) -> None:
        seconds = {2: [1.0, 2.0, 4.0], 8: [1.0, 4.0, 8.0]}
        result = reading(8, seconds, peak=3 * 2**20, length=16)
        assert result == Reading(8, 8 * 16 / 4.0, relative_time_per_token=0.5, peak_memory_mib=3.0)


class TestTable:
    def test_each_number_has_a_line_and_what_is_not_known_is_empty(self) -> None:
        readings = [vars(Reading(1, 100.0, 1.0)), vars(Reading(1024))]
        table = throughput_table({"device": "cpu", "length": 32, "readings": readings})
        cells = [list(column.cells) for column in table.columns]
        assert cells == [["1", "1,024"], ["100", "out of memory"], ["1.000", ""], ["", ""]]
