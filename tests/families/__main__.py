"""Write docs/models.md: run every check on every transformers family with routed experts.

``python -m tests.families`` takes about five minutes on two cores, and needs no network.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

from tests.families.checks import default_rule_balances
from tests.families.models import build, families
from tests.families.survey import HEADER, Row, surveyed
from tests.strangers.table import BEGIN

TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def main() -> None:
    """Survey all families and write the table."""
    torch.set_num_threads(1)
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        rows = list(pool.map(surveyed, families()))
        list(pool.map(check_the_default_rule, [row.family for row in rows if row.verified is not None]))
    TABLE.parent.mkdir(exist_ok=True)
    kept = TABLE.read_text().partition(BEGIN) if TABLE.exists() else ("", "", "")
    TABLE.write_text("".join((page(rows), "\n" if kept[1] else "", *kept[1:])))
    verified = sum(row.verified is not None for row in rows)
    sys.stdout.write(f"{verified} verified, {len(rows) - verified} refused: {TABLE}\n")


def check_the_default_rule(family: str) -> None:
    """Check that the default rule balances the model of a family; see `default_rule_balances`."""
    default_rule_balances(build(family))


def page(rows: list[Row]) -> str:
    """Return the page around the table."""
    verified = sum(row.verified is not None for row in rows)
    counts = f"{len(rows)} of them: {verified} verified, {len(rows) - verified} refused"
    intro = INTRODUCTION.format(version=transformers.__version__, counts=counts)
    return "\n".join((intro, *HEADER, *map(str, rows), ""))


INTRODUCTION = """# Models

Find out whether your model is balanced right. Look for its family in the table, or run the checks on your own model:

```bash
moe-inspect my_project.models:build --verify
```

`python -m tests.families` made the table with transformers {version}. It has every family whose config names experts
({counts}). Each model is built small from its config, with random weights, and really run.

The code does not use this list. It finds routers by their structure (`moe_plugin/attach/discovery/survey.py`). Only
rows with *adapter* have a file in `moe_plugin/attach/families/`.

- *Driven*: what the updates move. It is a tensor that the model owns and saves in its checkpoint, or our bias, added
  in the named call.
- *Gate weights*: the function of the unbiased scores that an independent computation found, times one factor, or
  scaled to one sum per token.
- *Result*: *verified* if all checks below pass.
- *Fused*: whether `balance_(model, experts="fused")` replaces the experts, or why not. *yes* means equal outputs (to
  1e-4), gradients (to 2e-5 of the largest value), and checkpoints.

*Verified* means all of this:

- At zero bias, outputs, loss and gradients are bit-identical.
- A bias changes outputs only by the experts it selects. Random biases select the largest sums. A model without
  balancing that is made to select the same experts gives the same outputs and gradients.
- Counts equal unpadded tokens x k, also under both kinds of activation checkpointing.
- A large bias draws every token, with unbiased gate weights.
- Updates move every bias. 60 updates by the default rule halve MaxVio over 512 random tokens, or bring it below 0.3
  if so few can show it.
- The `state_dict` keys stay the same. Deepcopy, pickle, saving, loading and `remove()` work. In bf16 the bias stays
  fp32.

Most of these are checks of `moe_plugin/attach/verification/`, which `moe-inspect --verify` runs on your model.
"""


if __name__ == "__main__":
    main()
