"""Validates a checkpoint on its run's validation split: ``moe-eval ckpt_path=RUN/checkpoints/last.ckpt``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from moe_plugin.apps.evaluation.measures_file import measures_file
from moe_plugin.apps.evaluation.stored_run import CONFIG_FILE, TRUST, evaluated_config
from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.launch.command_line import read_command_line, refuse_switches, show
from moe_plugin.apps.launch.explain_config_error import one_line
from moe_plugin.apps.launch.overrides import parse
from moe_plugin.apps.launch.signature import check_arguments, mismatch
from moe_plugin.apps.received.printable import printable
from moe_plugin.apps.report.json_file import finite, write_json
from moe_plugin.apps.throughput.throughput_settings import KEY, ThroughputSettings
from moe_plugin.errors import CheckpointError, ConfigError, MoEPluginError

LONGEST = 300
"""Characters of a reason that are shown: torch names every tensor that doesn't fit."""
HELP = """moe-eval: the validation metrics of a checkpoint, with the model and data of its run's config.yaml.

  moe-eval ckpt_path=runs/demo/DATE/checkpoints/last.ckpt
  moe-eval ckpt_path=runs/demo/DATE/checkpoints/best.ckpt trainer.accelerator=cpu data.max_val_tokens=100000
  moe-eval ckpt_path=runs/demo/DATE/checkpoints/last.ckpt throughput=true

Any key of the run's config.yaml can be given another value. Evaluates in one process, prints the metrics and
writes them next to the checkpoint's folder: RUN/eval_last.json. With throughput=true it then reads held-out text, 1 to
1,024 sequences at once, and reports tokens per second, time per token and memory; throughput.sequences=[1,64],
throughput.length=128 and throughput.rounds=9 change that.

A run is read as data, since somebody may have sent it: config.yaml may name only classes that are listed as harmless,
and the checkpoint may hold only tensors and plain values. trust=true lifts that for a run of your own.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words after the program's name; by default the program's own.
    """
    line = read_command_line(sys.argv[1:] if arguments is None else arguments, "config")
    if line.args.help:
        print(HELP)
        return
    if line.args.shell_completion:
        show(line)  # the keys of a run's config.yaml are those of moe-train
        return
    with one_line_errors():
        refuse_switches(line)
        changes = dict(map(_change, line.overrides))
        throughput, trusted = take_throughput_(changes), _take_switch_(changes, TRUST)
        with _explained():
            config = evaluated_config(changes, trusted=trusted)
            target = measures_file(Path(config.ckpt_path))
            _check(config, throughput)
        evaluate(config, target, throughput)


def _change(word: str) -> tuple[str, Any]:
    """Return the key and value of a word."""
    (override,) = parse([word])
    key = override.get_key_element()
    if override.is_sweep_override():
        raise ConfigError(key, "must be one value; moe-eval evaluates one checkpoint", word.partition("=")[2])
    return key, override.value()


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
    asked = _take_switch_(changes, KEY, default=bool(settings))
    check_arguments(ThroughputSettings, {**settings, "sequences": ()}, KEY)  # it checks its sequences itself
    throughput = ThroughputSettings(**settings)
    return throughput if asked else None


def _take_switch_(changes: dict[str, Any], key: str, *, default: bool = False) -> bool:
    """Take a key that is true or false out of the values given on the command line."""
    asked = changes.pop(key, default)
    if not isinstance(asked, bool):
        raise ConfigError(key, f"must be {mismatch('', bool)}", asked)
    return asked


def _check(config: DictConfig, throughput: ThroughputSettings | None) -> None:
    """Check that everything can be built, before anything is read or written."""
    from moe_plugin.apps.launch.validate_config import check, check_data

    check(config)
    check_data(config)
    if throughput is not None:
        from moe_plugin.apps.launch.build import build_data, build_model_on_meta
        from moe_plugin.apps.throughput.reading_speed import check_throughput

        check_throughput(throughput, build_model_on_meta(config), build_data(config))


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what a configuration without the form of a run's raises into one line."""
    try:
        yield
    except (OmegaConfBaseException, AttributeError) as error:
        raise ConfigError(CONFIG_FILE, f"must be a run's ({one_line(str(error))})") from error


def evaluate(
    config: DictConfig, target: Path, throughput: ThroughputSettings | None = None
) -> Mapping[str, Any]:
    """Validate a checkpoint, print its metrics and write them down.

    Args:
        config: A run's configuration with ``ckpt_path`` and ``trust``.
        target: The file to write.
        throughput: How many sequences to read at once; None does not measure throughput.

    Returns:
        ``val_loss`` and the other validation measures, as in the run's ``summary.json``; and ``throughput``, if asked
        for.

    Raises:
        CheckpointError: The checkpoint does not fit the model.
    """
    from rich.console import Console

    from moe_plugin.apps.launch.train_job import validate_checkpoint
    from moe_plugin.apps.launch.validate_config import USER_ERRORS

    console = Console()
    try:
        found, trainer = validate_checkpoint(config)
    except MoEPluginError:
        raise
    except (*USER_ERRORS, RuntimeError, LookupError, AttributeError) as error:
        reason = shorten(one_line(str(error)), LONGEST).removesuffix(".")
        raise CheckpointError(
            f"'ckpt_path' cannot be validated with this configuration: {reason}."
        ) from error
    measures = finite(found)
    console.print_json(data=measures)
    # Now, because reading a thousand sequences at once may end the process.
    write_json(target, measures)
    if throughput is not None:
        from moe_plugin.apps.throughput.reading_speed import measure_throughput, throughput_table

        measures[KEY] = finite(measure_throughput(trainer, throughput))
        console.print(throughput_table(measures[KEY]))
        write_json(target, measures)
    print(f"Written to {printable(target)}")
    return measures


if __name__ == "__main__":
    main()
