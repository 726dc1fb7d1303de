"""The places of a heatmap's cells, in pixels.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

WIDTH, HEIGHT = 700, 440
"""Pixels of a picture across, twice those of a card in TensorBoard, and of its cells downwards, about."""
LEFT, TOP, RIGHT, BOTTOM = 108, 44, 130, 42
SHORTEST = 236
"""Height of a colour bar with its labels."""


@dataclass(frozen=True)
class Grid:
    """The places of all cells.

    Attributes:
        rows: R.
        columns: C.
        cell: Width and height of a cell, with the gap to the next one.
        origin: x and y of the first cell.
    """

    rows: int
    columns: int
    cell: tuple[int, int]
    origin: tuple[int, int] = (LEFT, TOP)

    @classmethod
    def fit(cls, rows: int, columns: int, left: int = LEFT, least: int = 2) -> Grid:
        """Return the grid of a picture that is near `WIDTH` x `HEIGHT`.

        Args:
            rows: R.
            columns: C.
            left: x of the first cell.
            least: The least height of a cell.
        """
        cell = max(1, round((WIDTH - left - RIGHT) / columns)), max(least, min(HEIGHT // rows, 48))
        return cls(rows, columns, cell, origin=(left, TOP))

    @property
    def gap(self) -> int:
        """Pixels of paper between cells: 0 if the cells are too narrow to spare one."""
        return 1 if min(self.cell) >= 8 else 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of all cells together."""
        return self.columns * self.cell[0], self.rows * self.cell[1]

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height of the picture with its labels and colour bar."""
        (x, y), (width, height) = self.origin, self.size
        return x + width + RIGHT, y + max(height, SHORTEST) + BOTTOM

    def center(self, row: int, column: int) -> tuple[int, int]:
        """Return the middle of a cell, x and y; see `heatmap` for rows and columns."""
        return (
            self.origin[0] + column * self.cell[0] + (self.cell[0] - self.gap) // 2,
            self.origin[1] + row * self.cell[1] + (self.cell[1] - self.gap) // 2,
        )
