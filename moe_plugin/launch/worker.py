"""One process of a job that runs in several: ``python -m moe_plugin.launch.worker RUN_FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from moe_plugin.launch.command import one_line_errors
from moe_plugin.launch.job import train


def main(run_folder: Path) -> None:
    """Trains what the folder's ``config.yaml`` says."""
    config = OmegaConf.load(run_folder / "config.yaml")
    assert isinstance(config, DictConfig)
    train(config)


if __name__ == "__main__":
    with one_line_errors():
        main(Path(sys.argv[1]))
