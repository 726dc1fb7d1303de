"""The places of a heatmap's cells, in pixels.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    origin: tuple[int, int] = (52, 30)

    @classmethod
    def fit(cls, rows: int, columns: int, left: int = 52) -> Grid:
        """Return the grid of a picture near 800 x 500 whose cells are large enough to see.

        Args:
            rows: R.
            columns: C.
            left: x of the first cell.
        """
        cell = (_within(800 // columns, 4, 44), _within(480 // rows, 4 if rows > 60 else 8, 36))
        return cls(rows, columns, cell, origin=(left, 30))

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
        return max(x + width + 92, 380), max(y + height, 190) + 40

    def center(self, row: int, column: int) -> tuple[int, int]:
        """Return the middle of a cell, x and y; see `heatmap` for rows and columns."""
        return (
            self.origin[0] + column * self.cell[0] + (self.cell[0] - self.gap) // 2,
            self.origin[1] + row * self.cell[1] + (self.cell[1] - self.gap) // 2,
        )


def _within(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
