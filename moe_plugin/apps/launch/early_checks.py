"""What can be checked of a training run before torch and Lightning are imported, which takes seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.launch.bounds import check_bounds
from moe_plugin.apps.launch.compose import without_hydra
from moe_plugin.apps.launch.config_nodes import check_nodes_in_source, nodes, present
from moe_plugin.apps.launch.config_schema import Paths, Settings, Strategy
from moe_plugin.apps.launch.monitored import check_monitored
from moe_plugin.apps.launch.rate_bounds import check_rates
from moe_plugin.apps.launch.signature import check_arguments
from moe_plugin.apps.launch.source_signature import parameters_in_source
from moe_plugin.apps.outputs import check_output_folder
from moe_plugin.errors import ConfigError
from moe_plugin.extras import EXTRAS, require

LAST = "last"
_LOGGERS = {
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "NeptuneLogger": "neptune",
}
"""The package that each of Lightning's loggers needs, which looks for it only when a run has its folder."""


def check_early(config: DictConfig) -> None:
    """Check a run's configuration as far as this needs neither torch nor Lightning; nothing is created.

    Args:
        config: As composed, with the ``hydra`` node.

    Raises:
        ConfigError: A value is not allowed; it names the full key.
    """
    _check_settings(config)
    _check_packages(config)
    check_nodes_in_source(config)
    if config.count_only:
        return
    _check_missing(config)
    check_bounds(config)
    check_rates(config.get("rule"), OmegaConf.select(config, "router.score"), "rule")
    _check_end(config)
    _check_checkpoint(config.ckpt_path, trusted=config.trust)
    _check_metric(config.optimized_metric)
    check_monitored(config)
    _check_cache(config)
    check_run_folder(config)


def _check_settings(config: DictConfig) -> None:
    if OmegaConf.is_list(config.strategy.devices):
        given, fix = list(config.strategy.devices), "CUDA_VISIBLE_DEVICES picks GPUs."
        raise ConfigError("strategy.devices", "must be a whole number or 'auto'", given, fix)
    settings = {field.name: config[field.name] for field in dataclasses.fields(Settings)}
    check_arguments(Settings, settings, "")
    for key, schema in {"strategy": Strategy, "paths": Paths}.items():
        check_arguments(schema, present(config[key]), key)


def _check_missing(config: DictConfig) -> None:
    """Check that what an option leaves open is given."""
    run = without_hydra(config, Path(config.paths.runs))
    for key in sorted(OmegaConf.missing_keys(run)):
        raise ConfigError(key, "must be given", fix=f"Add {key}=VALUE.")


def _check_metric(metric: str) -> None:
    """Check that a run's summary will have what a sweeper is to optimise."""
    summary = parameters_in_source("moe_plugin.apps.report.summary.RunSummary")
    assert summary is not None
    if metric not in summary.hints:
        raise ConfigError("optimized_metric", f"must be one of {', '.join(summary.hints)}", metric)


def _check_end(config: DictConfig) -> None:
    """Check that training ends: the learning rate decays over a known number of steps."""
    if config.trainer.max_steps < 1 and (config.trainer.max_epochs or 0) < 1:
        rule, fix = "must be >= 1 unless trainer.max_epochs is", "trainer.max_time can end a run before."
        raise ConfigError("trainer.max_steps", rule, config.trainer.max_steps, fix)


def _check_checkpoint(path: str | None, *, trusted: bool) -> None:
    """Check that the checkpoint to continue from exists; a run's own last one may come later."""
    if path in (None, LAST):
        return
    if "://" in path:
        if not trusted:
            raise ConfigError("ckpt_path", "must be a local path", path, "Of a URL of your own: trust=true.")
    elif not Path(path).exists():
        raise ConfigError("ckpt_path", f"must be an existing checkpoint or '{LAST}'", path)


def _check_packages(config: DictConfig) -> None:
    """Check that the optional packages that the configuration uses are installed."""
    for key, node in nodes(config):
        target = str(node._target_)
        package = _LOGGERS.get(target.rpartition(".")[2], target.partition(".")[0])
        if package in {*EXTRAS, *_LOGGERS.values()}:
            require(package, key)


def _check_cache(config: DictConfig) -> None:
    """Check that the folder of the data's cache can be written, if one is given."""
    if cache := OmegaConf.select(config, "data.cache"):
        check_output_folder("data.cache", Path(cache).expanduser())


def check_run_folder(config: DictConfig) -> None:
    """Check that the folder of a run or sweep can be written.

    Args:
        config: As composed, with the ``hydra`` node.

    Raises:
        ConfigError: It can not.
    """
    key = "hydra.sweep.dir" if "MULTIRUN" in str(config.hydra.mode) else "hydra.run.dir"
    check_output_folder(key, Path(OmegaConf.select(config, key)))
