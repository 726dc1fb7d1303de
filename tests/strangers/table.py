"""The section of docs/models.md about repositories beyond transformers: a block of each one's shape, really run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from moe_plugin.attach.balance import balance_
from moe_plugin.errors import AttachError, EffectError
from tests.attach.discovery.real_blocks import REAL
from tests.strangers.blocks import BLOCKS
from tests.strangers.host import Model, clear_, first, kept_outside, step
from tests.strangers.stranger import E, Stranger

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin: python -m tests.strangers -->", "<!-- end: python -m tests.strangers -->"


def section() -> str:
    """Return the section, with its marks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [_row(name, block) for name, block in BLOCKS.items()]
    return "\n".join((BEGIN, INTRODUCTION, *HEADER, *rows, *_packages(), END))


def with_section(page: str, made: str) -> str:
    """Return the page with the section in its place, or at the end.

    Args:
        page: The page.
        made: The section, with its marks.
    """
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{made}\n"
    return page.split(BEGIN)[0] + made + page.split(END)[1]


def result(block: Stranger) -> str:
    """Return 'balanced', why the block is refused, or what is wrong.

    Args:
        block: The block.
    """
    torch.manual_seed(0)
    clear_(block.shared)
    try:
        _balance_and_compare(block)
    except (AttachError, EffectError) as error:
        return f"refused: {_in_a_cell(error)}"
    except (AssertionError, RuntimeError) as error:
        return f"wrong: {_in_a_cell(error)}"
    return "balanced"


def _balance_and_compare(block: Stranger) -> None:
    """Compare a step without a bias with the plain block's, and a biased forward with the reference."""
    model, x = Model(block), block.inputs()
    plain, _ = step(copy.deepcopy(model), block, x)
    clear_(block.shared)
    balanced = balance_(model)
    assert not any(map(len, kept_outside(block.shared)[2:])), "balance_ left tensors in globals"
    assert torch.equal(step(model, block, x)[0], plain), "other output at zero bias"
    assert block.reference is not None
    layer, site = model.layers[0], next(iter(balanced.values()))
    site.bias.copy_(torch.randn(E) / 3)
    balanced.discard_counts_()
    torch.manual_seed(1)
    output = first(layer(x))
    torch.manual_seed(1)
    with torch.no_grad():
        ids_TK, expected = block.reference(layer, x, site.bias)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    assert site.counts.tolist() == ids_TK.flatten().bincount(minlength=E).tolist(), "other counts"


def _row(name: str, block: Stranger) -> str:
    link = f"[{block.repository}](https://github.com/{block.repository}/blob/{block.commit}/{block.path})"
    checked = "the refusal" if block.refused else "everything"
    cells = (name, link, block.commit[:7], "block of the same shape", checked, result(block))
    return f"| {' | '.join(cells)} |"


def _packages() -> Iterator[str]:
    """Yield a row for each package that tests/attach/discovery/real_blocks.py builds."""
    for package in dict.fromkeys(name.split()[0] for name in REAL):
        found = find_spec(package) is not None
        outcome = "see `tests/attach/discovery/test_real_blocks.py`" if found else "not installed here"
        yield f"| {package} | {package} | - | the package itself | {'yes' if found else 'no'} | {outcome} |"


def _in_a_cell(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].replace("|", "/") if lines else type(error).__name__


HEADER = (
    "| block | read | commit | what runs | checked | result |",
    "|---|---|---|---|---|---|",
)
INTRODUCTION = """
## Beyond transformers

`python -m tests.strangers` made this table. Each block is written anew, with the routing, the names and the side
effects of the file that the row links to. It is made small and really run; `tests/strangers/` holds the blocks.

The command checks:

- bit-identical outputs at zero bias;
- under a random bias, output and counts equal to a slow reference, with gate weights from unbiased scores;
- no tensor that `balance_` leaves in the block's globals.

Counts are from before tokens are dropped. For blocks with *everything*, tests also check the numbers of experts;
gradients; ids, also under a large bias and in a second forward; updates; `remove()`; deepcopy; both kinds of
activation checkpointing; compiled code; bf16 with an fp32 bias.
"""
