"""Text with each token on a background that shows how many experts it used.

Shape legend: L layers, S tokens of a text, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from moe_plugin.plots.colors import amount_scale, ink_on
from moe_plugin.plots.heatmap import FAINT, INK, PAPER, font

LEVELS = 8
"""Different backgrounds."""
CELL, COLUMNS, MARGIN = (14, 30), 48, 14
"""Pixels of a letter, letters of a line: as wide as a heatmap, so a card in TensorBoard shows both well."""


@dataclass(frozen=True)
class TokenStrip:
    """A text, and the experts that each of its tokens used.

    Attributes:
        title: A name for the text, such as its domain.
        pieces: The text of each token (S).
        used: Experts by layer and token (L, S).
        losses: The loss at each token, of predicting the next one, in nats (S); empty if unknown.
    """

    title: str
    pieces: list[str]
    used: list[list[int]]
    losses: list[float]

    def means(self) -> list[float]:
        """Return the experts of each token, mean over layers (S)."""
        return [fmean(of_token) for of_token in zip(*self.used, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Return all fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TokenStrip:
        """Return the strip of fields from `as_json`."""
        return cls(**fields)


@dataclass(frozen=True)
class Scale:
    """The range of numbers that the backgrounds show."""

    low: float
    high: float

    @classmethod
    def of(cls, strips: Sequence[TokenStrip]) -> Scale:
        """Return the range from the smallest to the largest mean over layers in any of the texts."""
        means = [mean for strip in strips for mean in strip.means()]
        return cls(min(means), max(means))

    def level(self, number: float) -> int:
        """Return the background of a number, from 0 to `LEVELS` - 1."""
        width = self.high - self.low
        return min(LEVELS - 1, max(0, int(LEVELS * (number - self.low) / width))) if width else 0

    def ends(self) -> list[float]:
        """Return the numbers at which the backgrounds begin, and the last one's end."""
        return [self.low + (self.high - self.low) * place / LEVELS for place in range(LEVELS + 1)]


def draw_strips(strips: Sequence[TokenStrip]) -> np.ndarray:
    """Draw texts under one another, with backgrounds by the mean over layers; uint8 (3, H, W), RGB."""
    from PIL import Image, ImageDraw

    scale, places = Scale.of(strips), [list(_places(strip.pieces)) for strip in strips]
    lines = [max((line for line, _, _ in cells), default=0) + 1 for cells in places]
    height = 2 * MARGIN + 44 + sum((count + 2) * CELL[1] for count in lines)
    image = Image.new("RGB", (2 * MARGIN + COLUMNS * CELL[0], height), PAPER)
    draw = ImageDraw.Draw(image)
    grounds = amount_scale(LEVELS)
    _draw_legend_(draw, scale, grounds)
    top = MARGIN + 44
    for strip, cells, count in zip(strips, places, lines, strict=True):
        mean = fmean(strip.means())
        draw.text(
            (MARGIN, top + 3),
            f"{strip.title}: {mean:.2f} experts per token".lstrip(": "),
            fill=FAINT,
            font=font(),
        )
        levels = [scale.level(mean) for mean in strip.means()]
        for line, column, (character, token) in cells:
            ground = grounds[levels[token]]
            x, y = MARGIN + column * CELL[0], top + (line + 1) * CELL[1]
            draw.rectangle((x, y, x + CELL[0] - 1, y + CELL[1] - 2), fill=tuple(ground.tolist()))
            ink = PAPER if ink_on(ground) else INK
            draw.text((x + CELL[0] // 2, y + CELL[1] // 2), character, fill=ink, font=font(), anchor="mm")
        top += (count + 2) * CELL[1]
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _draw_legend_(draw: Any, scale: Scale, grounds: np.ndarray) -> None:
    draw.text((MARGIN, MARGIN), "experts per token:", fill=INK, font=font())
    x = MARGIN + round(font().getlength("experts per token:")) + 12
    for level, ground in enumerate(grounds):
        draw.rectangle((x, MARGIN, x + 52, MARGIN + 28), fill=tuple(ground.tolist()), outline=FAINT)
        label = f"{(scale.ends()[level] + scale.ends()[level + 1]) / 2:.1f}"
        draw.text(
            (x + 26, MARGIN + 14), label, fill=PAPER if ink_on(ground) else INK, font=font(), anchor="mm"
        )
        x += 54


def _places(pieces: Sequence[str]) -> Iterator[tuple[int, int, tuple[str, int]]]:
    """Yield line and column of each character, and its token; a line's end takes a cell, as a space."""
    line, column = 0, 0
    for token, piece in enumerate(pieces):
        for character in piece:
            if column == COLUMNS:
                line, column = line + 1, 0
            yield line, column, (character if character.isprintable() else " ", token)
            line, column = (line + 1, 0) if character == "\n" else (line, column + 1)
