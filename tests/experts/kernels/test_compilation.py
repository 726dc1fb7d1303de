from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install 'moe_plugin[triton]'")
ROOT = Path(__file__).parents[3]


class TestKernels:
    @pytest.mark.parametrize(
        ("capability", "architecture"), [("80", "sm_80"), ("90", "sm_90a")], ids=["A100", "H100"]
    )
    def test_every_kernel_compiles_to_machine_code(
        self, capability: str, architecture: str, tmp_path: Path
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.experts.kernels.compile_kernels", capability],
            cwd=ROOT,
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        compiled = set(done.stdout.splitlines())
        assert compiled == {
            f"{name} {architecture} ELF" for name in ("gather_rows", "sum_rows", "place_rows")
        }
