"""`python -m moe_plugin.plots RUN [RUN ...] --out load.png`: the load of runs as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_plugin.errors import ConfigError
from moe_plugin.extras import require
from moe_plugin.plots.picture import load_picture
from moe_plugin.plots.run_data import named, read_run


def main(arguments: list[str] | None = None) -> int:
    """Draw the runs named on the command line; return 0, or 2 after one line on stderr if one is wrong."""
    parser = argparse.ArgumentParser(prog="python -m moe_plugin.plots", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or label=folder")
    parser.add_argument(
        "--out", type=Path, default=Path("load.png"), help="picture to write (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        print(_draw(options.runs, options.out))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _draw(runs: list[str], out: Path) -> Path:
    require("matplotlib", "moe_plugin.plots")
    if not out.resolve().parent.is_dir():
        raise ConfigError("--out", "must be in an existing folder", str(out))
    return load_picture([read_run(*named(run)) for run in runs], out)


if __name__ == "__main__":
    sys.exit(main())
