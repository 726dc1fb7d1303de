"""Write docs/models.md: run every check on every transformers family with routed experts.

``python -m tests.families`` takes about two minutes on two cores, and needs no network.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

from tests.families.models import families
from tests.families.survey import HEADER, Row, surveyed

TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def main() -> None:
    """Survey all families and write the table."""
    torch.set_num_threads(1)
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        rows = list(pool.map(surveyed, families()))
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(page(rows))
    verified = sum(row.verified is not None for row in rows)
    sys.stdout.write(f"{verified} verified, {len(rows) - verified} refused: {TABLE}\n")


def page(rows: list[Row]) -> str:
    """Return the page around the table."""
    verified = sum(row.verified is not None for row in rows)
    counts = f"{len(rows)} of them: {verified} verified, {len(rows) - verified} refused"
    intro = INTRODUCTION.format(version=transformers.__version__, counts=counts)
    return "\n".join((intro, *HEADER, *map(str, rows), ""))


INTRODUCTION = """# Models

Made by `python -m tests.families` with transformers {version}: every family that has a config naming experts, {counts}.
Each is built small from its config, with random weights, and really run.

The code does not use this list: it finds routers by their structure, see `moe_plugin/attach/discovery/survey.py`. Only
rows with *adapter* have a file in `moe_plugin/attach/families/`.

*Driven* is what the updates move: a tensor that the model owns and saves in its checkpoint, or our bias, added in the
named selecting call. *Gate weights* names the function of the unbiased scores that an independent computation found,
times one factor, or scaled to one sum per token.

*Verified* means: bit-identical outputs, loss and gradients at zero bias; outputs that a bias changes only by the
experts it selects; counts equal to unpadded tokens x k, also under both kinds of activation checkpointing; a large bias
draws every token, with unbiased gate weights; updates move every bias; the same `state_dict` keys; deepcopy and pickle;
saving and loading; bf16 with an fp32 bias; `remove()`.

*Fused* shows whether `balance_(model, experts="fused")` replaces the experts, or why not. *yes* means equal outputs (to
1e-4), gradients (to 2e-5 of the largest value), and checkpoints.
"""


if __name__ == "__main__":
    main()
