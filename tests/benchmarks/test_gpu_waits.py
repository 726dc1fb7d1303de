from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks.gpu.place import Place
from benchmarks.gpu.waits import counted_waits, waits_of


class TestOnCpu:
    def test_each_wait_counts(self) -> None:
        x = torch.tensor([1.0, 0.0])
        assert waits_of(Place(dry=True), lambda: x + 1) == 0
        assert waits_of(Place(dry=True), lambda: (x.nonzero(), x.sum().item())) == 2


class TestOnGpu:
    def test_torchs_warnings_about_waits_count_and_the_mode_is_set_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modes: list[str] = []
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        with counted_waits(Place(dry=False)) as waits:
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
        assert waits.count == 2
        assert modes == ["warn", "default"]
