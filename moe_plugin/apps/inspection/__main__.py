"""`moe-inspect WHAT`: the routing sites of a model, and how each would be balanced; nothing is trained or loaded.

WHAT is a checkpoint of a run (RUN/checkpoints/last.ckpt), a model type of transformers (mixtral), a folder with a
config.json, a name on the hub, or package.module:function that returns a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

WRONG_USE, NOTHING_TO_BALANCE = 2, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found; return 0 if the model can be balanced, 1 if not, 2 after one line for a wrong word."""
    parser = argparse.ArgumentParser(
        prog="moe-inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", metavar="WHAT")
    parser.add_argument("--every-layer", action="store_true", help="a line for each router, even if alike")
    options = parser.parse_args(arguments)
    from rich.console import Console

    from moe_plugin.apps.inspection.inspect_source import inspect_source
    from moe_plugin.apps.inspection.inspection_table import inspection_table
    from moe_plugin.errors import ConfigError

    try:
        inspection = inspect_source(options.what)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    Console().print(inspection_table(inspection, every_layer=options.every_layer))
    return 0 if inspection.sites and not inspection.strangers else NOTHING_TO_BALANCE


if __name__ == "__main__":
    sys.exit(main())
