"""Where a run measures: on the GPU, or for a dry run on the CPU at tiny sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

Size = TypeVar("Size")

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}
"""Dense bf16 products at most, 1e12 operations per second, by what the card's name has in it: NVIDIA's data sheets.

The PCIe card and the NVL pair of this generation are slower, so they have no peak here.
"""
SLOWER = ("PCIe", "NVL")


@dataclass(frozen=True)
class Place:
    """A device and how large things are on it.

    Attributes:
        dry: Whether this is the rehearsal on a CPU.
    """

    dry: bool

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return torch.device("cpu" if self.dry else "cuda")

    def size(self, real: Size, dry: Size) -> Size:
        """Return a size, or that of the rehearsal."""
        return dry if self.dry else real

    @property
    def peak_tflops(self) -> float | None:
        """The card's peak of dense bf16 products, if it is known."""
        return None if self.dry else peak_tflops(torch.cuda.get_device_name())

    def wait(self) -> None:
        """Wait until the device is done."""
        if not self.dry:
            torch.cuda.synchronize()


def peak_tflops(card: str) -> float | None:
    """Return the peak of a card by its name; None if it is not known."""
    if any(word in card for word in SLOWER):
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in card), None)
