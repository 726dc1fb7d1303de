"""Checks the jobs of `moe-train` before the first runs."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from moe_plugin.apps.launch.early_checks import check_early


def check_jobs(configs: Sequence[DictConfig]) -> None:
    """Check each job's configuration; with ``count_only=true`` print the models' sizes and end.

    Args:
        configs: As composed, with their ``hydra`` nodes.

    Raises:
        SystemExit: With code 0, if only sizes are asked for.
    """
    for config in configs:
        check_early(config)
    # Torch and Lightning are imported only now: a misspelt key is reported at once.
    from moe_plugin.apps.launch.validate_config import check, check_data, check_training

    for config in configs:
        check(config)
        check_training(config)
    for config in configs:
        check_data(config)
    if all(config.count_only for config in configs):
        for config in configs:
            _print_size(config)
        raise SystemExit(0)


def _print_size(config: DictConfig) -> None:
    from moe_plugin.apps.launch.build import build_model_on_meta
    from moe_plugin.apps.models.size import measure, print_size_table

    print_size_table(measure(build_model_on_meta(config)))
