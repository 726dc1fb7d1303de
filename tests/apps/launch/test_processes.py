"""Tests of jobs in several processes: started by us, by torchrun by hand, on two nodes; what a signal does to them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moe_plugin.apps import train
from moe_plugin.apps.launch.meeting_point import slurm_meeting_point
from moe_plugin.apps.launch.signals import STOPPED
from tests.apps.launch.small_job import NOISY, WORDS

pytestmark = pytest.mark.usefixtures("workplace")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TestSignals:
    @pytest.mark.slow
    def test_signal_to_the_parent_alone_saves_and_says_where(self) -> None:
        words = [*WORDS, NOISY, "strategy=ddp", "hydra.run.dir=runs/here"]
        job = start(
            [sys.executable, "-m", "moe_plugin.apps.train", *words], STOP="SIGTERM@train:2", RANKS="parent"
        )
        out, _ = job.communicate(timeout=120)
        assert job.returncode == STOPPED, out
        folder = Path("runs/here").resolve()
        (line,) = out.splitlines()
        assert line.startswith("stopped by SIGTERM after step ")
        assert line.endswith(f"; go on with ckpt_path={folder}/checkpoints/last.ckpt")
        assert (folder / "checkpoints" / "last.ckpt").exists()
        assert (folder / "stopped.txt").read_text() == f"{line}\n"


class TestByHand:
    @pytest.mark.slow
    def test_torchrun_on_two_nodes_gives_one_run_of_one_configuration(self) -> None:
        nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        nodes.append(f"--rdzv-endpoint=localhost:{free_port()}")
        words = [*WORDS, NOISY, "strategy=ddp", "strategy.devices=1", "trainer.num_nodes=2"]
        command = [*TORCHRUN, *nodes, "-m", "moe_plugin.apps.train", *words]
        both = [start(command), start(command)]
        outputs = [job.communicate(timeout=120)[0] for job in both]
        assert [job.returncode for job in both] == [0, 0], outputs
        (folder,) = Path("runs/small").iterdir()
        first, second = (json.loads((folder / f"seen_{rank}.json").read_text()) for rank in (0, 1))
        assert first == second
        assert first["ranks"] == 2
        assert (folder / "summary.json").exists()
        assert OmegaConf.load(folder / "config.yaml").paths.output == str(folder.resolve())


class TestWrongUse:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["strategy.devices=two"], "'strategy.devices' must be a whole number or 'auto', got 'two'."),
            (["strategy.devices=-1"], "'strategy.devices' must be an integer >= 1, got -1."),
            (["strategy.devices=1.5"], "'strategy.devices' must be a whole number or 'auto', got 1.5."),
            (["strategy.devices=true"], "'strategy.devices' must be a whole number or 'auto', got True."),
            (["strategy.devices=[0,1]"], "'strategy.devices' must be a whole number or 'auto', got [0, 1]"),
            (["trainer.num_nodes=0"], "'trainer.num_nodes' must be an integer >= 1, got 0."),
            (["trainer.num_nodes=2"], "'trainer.num_nodes' must be 1 unless torchrun runs on each machine"),
            (["trainer.max_time=soon"], "'trainer.max_time' must be days:hours:minutes:seconds"),
            (["-m", "seed=0,1", "strategy.devices=0"], "'strategy.devices' must be an integer >= 1, got 0."),
        ],
    )
    def test_one_line_and_nothing_is_created(
        self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            train.main([*WORDS, *words])
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert [path.name for path in Path().iterdir()] == ["texts"]

    def test_auto_is_one_process_on_a_cpu(self) -> None:
        train.main([*WORDS, NOISY, "strategy.devices=auto", "hydra.run.dir=runs/auto"])
        assert json.loads(Path("runs/auto/seen_0.json").read_text())["ranks"] == 1

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["strategy=ddp", "strategy.devices=3"],
                "'strategy.devices' must give 2 processes with trainer.num_nodes=1, as torchrun started them, got 3.",
            ),
            (["-m", "seed=0,1"], "'-m' must be used without torchrun"),
        ],
    )
    def test_wrong_use_under_torchrun_is_told_by_rank_0(
        self,
        words: list[str],
        message: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        monkeypatch.setattr("moe_plugin.apps.launch.torchrun_config.release", lambda: None)
        with pytest.raises(SystemExit, match="2"):
            train.main([*WORDS, "data.batch_size=24", "data.val_batch_size=24", *words])
        assert message in capsys.readouterr().err


class TestSlurmMeetingPoint:
    def test_first_host_of_the_job_is_the_meeting_point(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (
            ("SLURM_JOB_NODELIST", "gpu[07-09],gpu12"),
            ("SLURM_JOB_ID", "1234"),
        ):
            monkeypatch.setenv(name, value)
        assert slurm_meeting_point() == ("gpu07", 16234, "1234")
