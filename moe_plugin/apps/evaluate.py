"""Validates a checkpoint on its run's validation split: ``moe-eval ckpt_path=RUN/checkpoints/last.ckpt``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.launch.overrides import parse
from moe_plugin.apps.launch.signature import unknown_key
from moe_plugin.apps.throughput.concurrency import Concurrency, take_concurrency_
from moe_plugin.errors import ConfigError

HELP = """moe-eval: the validation metrics of a checkpoint, of the model and data that its run's config.yaml describes.

  moe-eval ckpt_path=runs/demo/DATE/checkpoints/last.ckpt
  moe-eval ckpt_path=runs/demo/DATE/checkpoints/best.ckpt trainer.accelerator=cpu data.max_val_tokens=100000
  moe-eval ckpt_path=runs/demo/DATE/checkpoints/last.ckpt throughput=true

Any key of the run's config.yaml can be given another value. Evaluates in one process, prints the metrics and
writes them beside the checkpoint's folder: RUN/eval_last.json. With throughput=true it then reads held-out text, 1 to
1,024 sequences at once, and tells tokens per second, time per token and memory; throughput.sequences=[1,64],
throughput.length=128 and throughput.rounds=9 change that.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words after the program's name; by default the program's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(HELP)
        return
    with one_line_errors():
        changes = {override.get_key_element(): override.value() for override in parse(words)}
        concurrency = take_concurrency_(changes)
        config = read_config(changes)
        from moe_plugin.apps.launch.validate_config import check

        check(config)
        if concurrency is not None:
            from moe_plugin.apps.throughput.reading_speed import check_throughput

            check_throughput(concurrency, config)
    evaluate(config, concurrency)


def read_config(changes: Mapping[str, Any]) -> DictConfig:
    """Return the configuration of a checkpoint's run with the given keys changed.

    Raises:
        ConfigError: No checkpoint is given, it isn't there or lies in no run, or a key is unknown.
    """
    checkpoint = changes.get("ckpt_path")
    if not isinstance(checkpoint, str) or not Path(checkpoint).exists():
        raise ConfigError(f"'ckpt_path' must be an existing checkpoint, got {checkpoint!r}.")
    source = run_folder(checkpoint) / "config.yaml"
    if not source.exists():
        raise ConfigError(
            f"'ckpt_path' must lie in a run's folder, beside its config.yaml; {source} isn't there."
        )
    config = OmegaConf.load(source)
    assert isinstance(config, DictConfig)
    for key, value in changes.items():
        change_(config, key, value)
    config.strategy = {"devices": 1, "lightning": "auto"}
    config.trainer.num_nodes = 1
    return config


def change_(config: DictConfig, key: str, value: object) -> None:
    """Give a key another value.

    Raises:
        ConfigError: There is no such key.
    """
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig) or name not in node:
        raise ConfigError(unknown_key(key, value, list(node) if isinstance(node, DictConfig) else []))
    OmegaConf.update(config, key, value)


def run_folder(checkpoint: str) -> Path:
    """Return the folder of the run that made a checkpoint."""
    return Path(checkpoint).resolve().parent.parent


def evaluate(config: DictConfig, concurrency: Concurrency | None = None) -> Mapping[str, Any]:
    """Validate a checkpoint, prints its metrics and writes them down.

    Args:
        config: A run's configuration with ``ckpt_path``.
        concurrency: How many sequences to read at once for the throughput; None measures none.

    Returns:
        ``val_loss`` and the other validation measures, as in the run's ``summary.json``; and ``throughput``, if asked
        for.
    """
    from rich.console import Console

    from moe_plugin.apps.launch.job import validate_checkpoint

    console = Console()
    target = run_folder(config.ckpt_path) / f"eval_{Path(config.ckpt_path).stem}.json"
    measures, trainer = validate_checkpoint(config)
    console.print_json(data=measures)
    # Now already, for reading a thousand sequences at once may end the process.
    write(measures, target)
    if concurrency is not None:
        from moe_plugin.apps.throughput.reading_speed import measure_throughput, throughput_table

        measures["throughput"] = measure_throughput(trainer, concurrency)
        console.print(throughput_table(measures["throughput"]))
        write(measures, target)
    console.print(f"Written to {target}", soft_wrap=True, highlight=False)
    return measures


def write(measures: Mapping[str, Any], target: Path) -> None:
    """Write measures as JSON."""
    target.write_text(json.dumps(measures, indent=2) + "\n")


if __name__ == "__main__":
    main()
