from __future__ import annotations

import torch

from benchmarks.memory import peak_mib


class TestPeak:
    def test_what_is_freed_before_counts_no_more(self) -> None:
        def action() -> None:
            for _ in range(3):
                torch.zeros(4, 2**18)  # 4 MiB, freed at once
            held = torch.zeros(2, 2**18)
            torch.zeros(4, 2**18)
            del held

        assert 6.0 <= peak_mib(action) < 6.1
