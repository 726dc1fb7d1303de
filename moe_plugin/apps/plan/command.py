"""Plans a training step on a cluster: ``moe-plan model=deepseek_v3_671b nodes=256 hardware=h800``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from moe_plugin.apps.config_folder import conf_dir
from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.launch.command_line import read_command_line, refuse_switches, show
from moe_plugin.apps.launch.compose import HYDRA_VERSION
from moe_plugin.apps.launch.explain_config_error import explain_composition
from moe_plugin.apps.launch.overrides import parse
from moe_plugin.apps.plan.settings import check_settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    line = read_command_line(sys.argv[1:] if arguments is None else arguments, "plan")
    with one_line_errors():
        if line.is_run:
            refuse_switches(line)
            _run(_read_config(line.overrides))
        else:
            show(line)


def _read_config(words: Sequence[str]) -> DictConfig:
    parse(words)
    with initialize_config_dir(str(conf_dir()), version_base=HYDRA_VERSION, job_name="plan"):
        try:
            config = compose("plan", list(words))
            OmegaConf.resolve(config)
        except (HydraException, OmegaConfBaseException) as error:
            raise explain_composition(error, words, "plan") from error
    return config


def _run(config: DictConfig) -> None:
    settings = check_settings(config)
    # Torch and Lightning are imported only now: a wrong word is reported at once.
    from moe_plugin.apps.plan.build import build_cluster, build_workload
    from moe_plugin.apps.plan.plan_tables import as_json, plan_tables
    from moe_plugin.apps.plan.scale_plan import make_plan

    work = build_workload(config, settings)
    cluster = build_cluster(config, settings, work)
    console = Console()
    with console.status("Running a step on fake tensors"):
        plan = make_plan(work, cluster, settings.layouts, settings.max_violations)
    console.print(plan_tables(plan, cluster, work))
    Path(settings.output).write_text(json.dumps(as_json(plan, cluster, work), indent=1) + "\n")
    console.print(f"Written to {settings.output}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
