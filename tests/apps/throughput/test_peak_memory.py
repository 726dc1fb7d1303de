from __future__ import annotations

import sys

import pytest
import torch

from moe_plugin.apps.throughput.peak_memory import PeakMemory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
class TestProcess:
    def test_what_is_freed_within_the_work_counts_and_what_was_before_does_not(self) -> None:
        before = torch.ones(64 * MIB, dtype=torch.uint8)
        memory = PeakMemory(torch.device("cpu"))
        del before
        little = memory.of(lambda: None)
        much = memory.of(lambda: torch.ones(256 * MIB, dtype=torch.uint8))
        if little is None or much is None:
            pytest.skip("the peak cannot be reset here")
        assert little < 32 * MIB
        assert 160 * MIB < much < 288 * MIB


class TestOtherDevices:
    def test_peak_is_not_known(self) -> None:
        assert PeakMemory(torch.device("meta")).of(lambda: None) is None
