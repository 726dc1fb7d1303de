"""Compiles every kernel down to machine code for a GPU that need not be there: `python -m ... CAPABILITY`.

In a process of its own: where Triton interprets, it cannot compile. The interpreter knows no types, the compiler does.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_plugin.experts.kernels import permute_triton


def compile_for(target: GPUTarget, kernel: Any, arguments: dict[str, Any]) -> None:
    """Types of arguments are strings, all else is a constant. Prints the kernel, its GPU, and what the code is."""
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target)
    architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    print(kernel.__name__, architecture and architecture[1], compiled.asm["cubin"][1:4].decode())


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    sizes = {"dim": "i32", "COLUMNS": 1024}
    for dtype in ("*fp32", "*bf16", "*fp16"):
        rows = {"x_TD": dtype, "token_ids_P": "*i32", "out_PD": dtype}
        compile_for(target, permute_triton.gather_rows, rows | sizes)
        for weights in (None, dtype):
            sums = {"y_PD": dtype, "rows_TK": "*i32", "weights_TK": weights, "out_TD": dtype, "TOP_K": 8}
            compile_for(target, permute_triton.sum_rows, sums | sizes)
    places = {"pair_ids_P": "*i32", "rows_N": "*i32", "used": "i32", "PAIRS": 1024}
    compile_for(target, permute_triton.place_rows, places)


if __name__ == "__main__":
    main()
