from __future__ import annotations

import pytest

from moe_plugin.plots.colors import amount_scale
from moe_plugin.plots.token_strip import CELL, COLUMNS, LEVELS, MARGIN, Scale, TokenStrip, draw_strips

FIRST = TokenStrip("even", ["ab", "c\n", "d"], [[1, 4, 2], [3, 4, 2]], [])
SECOND = TokenStrip("odd", ["x" * (COLUMNS + 1), "y"], [[9, 5], [1, 5]], [0.5, 1.5])


def background(image, top: int, line: int, column: int) -> list[int]:
    """A corner of a character's cell; the first line of a text is below its title."""
    return image[:, top + (line + 1) * CELL[1], MARGIN + column * CELL[0]].tolist()


class TestStrip:
    def test_means_are_over_layers(self):
        assert FIRST.means() == [2, 4, 2]
        assert TokenStrip.from_json(SECOND.as_json()) == SECOND


class TestScale:
    @pytest.mark.parametrize(
        ("number", "level"), [(2, 0), (2.37, 0), (2.38, 1), (4.99, 7), (5, 7), (9, 7), (1, 0)]
    )
    def test_numbers_fall_into_eighths_of_the_range(self, number, level):
        assert Scale(2, 5).level(number) == level
        assert Scale(2, 5).ends() == [2 + 3 * place / LEVELS for place in range(LEVELS + 1)]

    def test_texts_share_the_range_of_their_tokens(self):
        assert Scale.of([FIRST, SECOND]) == Scale(2, 5)
        assert Scale(3, 3).level(3) == 0


class TestDrawStrips:
    def test_each_character_is_on_the_background_of_its_token(self):
        image, shades = draw_strips([FIRST, SECOND]), amount_scale(LEVELS).tolist()
        low, high, middle = shades[0], shades[7], shades[5]  # means 2, 5 and 4 of a range from 2 to 5
        top, paper = MARGIN + 44, [255] * 3
        first_line = [background(image, top, 0, column) for column in range(5)]
        assert first_line == [low, low, middle, middle, paper]  # the end of a line takes a cell
        assert [background(image, top, 1, column) for column in range(2)] == [low, paper]
        top += (2 + 2) * CELL[1]
        assert [background(image, top, 0, column) for column in (0, COLUMNS - 1)] == [high, high]
        assert [background(image, top, 1, column) for column in range(3)] == [high, high, paper]
