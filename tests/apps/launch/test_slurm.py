"""Tests of the SLURM launcher; submitit's local executor stands for the cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_plugin.apps.launch.compose import compose_jobs
from tests.apps.launch.small_job import NOISY, WORDS

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs moe_plugin[slurm]")
pytestmark = pytest.mark.usefixtures("workplace")


class TestSlurm:
    def test_option_asks_for_a_task_on_each_machine_that_starts_a_process_per_gpu(self) -> None:
        words = [
            "hydra/launcher=slurm",
            "strategy=ddp",
            "strategy.devices=8",
            "trainer.num_nodes=2",
            "name=x",
        ]
        (config,) = compose_jobs([*words, "seed=0"], multirun=True)
        launcher = config.hydra.launcher
        assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 1, 8)
        assert launcher._target_.endswith("SlurmLauncher")
        assert launcher.name == "x"

    @pytest.mark.slow
    def test_preempted_job_saves_is_requeued_and_goes_on(self) -> None:
        words = [
            *WORDS,
            NOISY,
            "-m",
            "hydra/launcher=submitit_local",
            "ckpt_path=last",
            "hydra.sweep.dir=runs/s",
        ]
        subprocess.run(
            [sys.executable, "-m", "moe_plugin.apps.train", *words],
            env={**os.environ, "STOP": "SIGUSR2@train:2"},
            check=True,
            timeout=300,
        )
        steps = [line.split()[0] for line in Path("runs/s/0/losses_0.txt").read_text().splitlines()]
        assert steps == [str(step) for step in range(6)]
        (log,) = Path("runs/s/.submitit").glob("*/*.err")
        assert "stopped by SIGUSR2 after step 3" in log.read_text()
