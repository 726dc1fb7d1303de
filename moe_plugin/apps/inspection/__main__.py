"""`moe-inspect WHAT`: the routing sites of a model, and how each would be balanced; nothing is trained or loaded.

WHAT is a checkpoint of a run (RUN/checkpoints/last.ckpt), a model type of transformers (mixtral), a folder with a
config.json, a name on the hub, or package.module:function that returns a model. Such a function is imported and called,
so its code runs; everything else is read as data, and no code of it runs unless --trust is given.

With --verify every check of moe_plugin.attach.verification runs on copies of the model: the function's own, with inputs
if it returns (model, inputs); of transformers a small model with random weights. Nothing is downloaded then.
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from moe_plugin.apps.command_parser import WRONG_USE, CommandParser
from moe_plugin.apps.received.printable import printable

NOTHING_TO_BALANCE, CHECK_FAILED = 1, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found; return 0 if the model can be balanced, 1 if not, 2 after one line for a wrong word.

    With ``--verify`` 0 means that no check failed.
    """
    parser = CommandParser(
        prog="moe-inspect", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("what", metavar="WHAT")
    parser.add_argument("--every-layer", action="store_true", help="a line for each router, even if alike")
    parser.add_argument(
        "--verify", action="store_true", help="run the model and check what balancing does to it"
    )
    parser.add_argument(
        "--trust", action="store_true", help="the checkpoint and its run are yours: code of theirs may run"
    )
    options = parser.parse_args(arguments)
    from moe_plugin.errors import AttachError, MoEPluginError

    try:
        if options.verify:
            return _verify(options.what)
        return _inspect(options.what, options.every_layer, options.trust)
    except MoEPluginError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return NOTHING_TO_BALANCE if isinstance(error, AttachError) else WRONG_USE


def _inspect(what: str, every_layer: bool, trusted: bool) -> int:
    from rich.console import Console

    from moe_plugin.apps.inspection.inspect_source import inspect_source
    from moe_plugin.apps.inspection.inspection_table import inspection_table

    inspection = inspect_source(what, trusted=trusted)
    Console().print(inspection_table(inspection, every_layer=every_layer))
    return 0 if inspection.sites and not inspection.strangers else NOTHING_TO_BALANCE


def _verify(what: str) -> int:
    from rich.console import Console

    from moe_plugin.apps.inspection.verification_table import verification_table
    from moe_plugin.apps.inspection.verify_source import verify_source

    results = verify_source(what)
    Console().print(verification_table(results))
    return CHECK_FAILED if any(result.status == "failed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
