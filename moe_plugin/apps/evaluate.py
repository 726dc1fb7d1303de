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
from moe_plugin.apps.launch.signature import check_arguments, mismatch, unknown_key
from moe_plugin.apps.throughput.throughput_settings import KEY, ThroughputSettings
from moe_plugin.errors import ConfigError

HELP = """moe-eval: the validation metrics of a checkpoint, with the model and data of its run's config.yaml.

  moe-eval ckpt_path=runs/demo/DATE/checkpoints/last.ckpt
  moe-eval ckpt_path=runs/demo/DATE/checkpoints/best.ckpt trainer.accelerator=cpu data.max_val_tokens=100000
  moe-eval ckpt_path=runs/demo/DATE/checkpoints/last.ckpt throughput=true

Any key of the run's config.yaml can be given another value. Evaluates in one process, prints the metrics and
writes them next to the checkpoint's folder: RUN/eval_last.json. With throughput=true it then reads held-out text, 1 to
1,024 sequences at once, and reports tokens per second, time per token and memory; throughput.sequences=[1,64],
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
        throughput = take_throughput_(changes)
        config = _read_config(changes)
        from moe_plugin.apps.launch.validate_config import check, check_data

        check(config)
        check_data(config)
        if throughput is not None:
            from moe_plugin.apps.launch.build import build_data, build_model_on_meta
            from moe_plugin.apps.throughput.reading_speed import check_throughput

            check_throughput(throughput, build_model_on_meta(config), build_data(config))
    evaluate(config, throughput)


def take_throughput_(changes: dict[str, Any]) -> ThroughputSettings | None:
    """Take the settings of throughput out of the values given on the command line.

    Args:
        changes: Values by key; ``throughput`` and all keys below it are removed.

    Returns:
        None if throughput is not asked for.

    Raises:
        ConfigError: A key is unknown, or a value is not allowed.
    """
    prefix = f"{KEY}."
    settings = {key.removeprefix(prefix): changes.pop(key) for key in list(changes) if key.startswith(prefix)}
    asked = changes.pop(KEY, bool(settings))
    if not isinstance(asked, bool):
        raise ConfigError(KEY, f"must be {mismatch('', bool)}", asked)
    check_arguments(ThroughputSettings, {**settings, "sequences": ()}, KEY)  # it checks its sequences itself
    throughput = ThroughputSettings(**settings)
    return throughput if asked else None


def _read_config(changes: Mapping[str, Any]) -> DictConfig:
    """Return the configuration of a checkpoint's run with the given keys changed."""
    checkpoint = changes.get("ckpt_path")
    if not isinstance(checkpoint, str) or not Path(checkpoint).exists():
        raise ConfigError("ckpt_path", "must be an existing checkpoint", checkpoint)
    source = _run_folder(checkpoint) / "config.yaml"
    if not source.exists():
        raise ConfigError("ckpt_path", f"must be in a run's folder, next to its {source.name}", checkpoint)
    config = OmegaConf.load(source)
    assert isinstance(config, DictConfig)
    for key, value in changes.items():
        _change_(config, key, value)
    config.strategy = {"devices": 1, "lightning": "auto"}
    config.trainer.num_nodes = 1
    return config


def _change_(config: DictConfig, key: str, value: object) -> None:
    """Give a key another value."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig) or name not in node:
        raise unknown_key(key, value, list(node) if isinstance(node, DictConfig) else [])
    OmegaConf.update(config, key, value)


def _run_folder(checkpoint: str) -> Path:
    """Return the folder of the run that made a checkpoint."""
    return Path(checkpoint).resolve().parent.parent


def evaluate(config: DictConfig, throughput: ThroughputSettings | None = None) -> Mapping[str, Any]:
    """Validate a checkpoint, print its metrics and write them down.

    Args:
        config: A run's configuration with ``ckpt_path``.
        throughput: How many sequences to read at once; None does not measure throughput.

    Returns:
        ``val_loss`` and the other validation measures, as in the run's ``summary.json``; and ``throughput``, if asked
        for.
    """
    from rich.console import Console

    from moe_plugin.apps.launch.train_job import validate_checkpoint

    console = Console()
    target = _run_folder(config.ckpt_path) / f"eval_{Path(config.ckpt_path).stem}.json"
    measures, trainer = validate_checkpoint(config)
    console.print_json(data=measures)
    # Now, because reading a thousand sequences at once may end the process.
    _write(measures, target)
    if throughput is not None:
        from moe_plugin.apps.throughput.reading_speed import measure_throughput, throughput_table

        measures[KEY] = measure_throughput(trainer, throughput)
        console.print(throughput_table(measures[KEY]))
        _write(measures, target)
    console.print(f"Written to {target}", soft_wrap=True, highlight=False)
    return measures


def _write(measures: Mapping[str, Any], target: Path) -> None:
    """Write measures as JSON."""
    target.write_text(json.dumps(measures, indent=2) + "\n")


if __name__ == "__main__":
    main()
