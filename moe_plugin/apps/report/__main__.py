"""`moe-report RUN...`: one HTML file for a run, a sweep or a comparison, without network or server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_plugin.apps.command_parser import WRONG_USE, CommandParser
from moe_plugin.apps.outputs import check_output_file
from moe_plugin.apps.received.printable import printable
from moe_plugin.errors import ConfigError
from moe_plugin.extras import require


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return 0, or 2 after one line on stderr for a wrong word."""
    parser = CommandParser(prog="moe-report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run or of a sweep, or label=folder"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        _write(options.runs, options.out)
    except ConfigError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return WRONG_USE
    print(printable(options.out))
    return 0


def _write(runs: Sequence[str], out: Path) -> None:
    require("jinja2", "moe-report")
    if not out.resolve().parent.is_dir():
        raise ConfigError("--out", "must be in a folder that exists", str(out))
    check_output_file("--out", out)
    # Torch and Lightning are imported only now: a wrong place is reported at once.
    from moe_plugin.apps.report.atomic_write import write_atomically
    from moe_plugin.apps.report.page import read_runs, report_page

    write_atomically(out, report_page(read_runs(runs)))


if __name__ == "__main__":
    sys.exit(main())
