"""Tests of settings that differ from those of the run that is resumed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from moe_plugin.apps.launch.resumed_end import check_trains
from moe_plugin.apps.launch.resumed_settings import UNKNOWN, check_resume, report_resume
from moe_plugin.apps.launch.train_job import train
from moe_plugin.errors import CheckpointError, ConfigError
from tests.apps.launch.small_job import configuration

ROUTER = "network.layers.0.feed_forward.router"


def saved(folder: str = "run") -> dict[str, Any]:
    return torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)


@cache
def base() -> str:
    """Returns a job's configuration in YAML: to compose it takes most of a test's time."""
    with TemporaryDirectory() as folder:
        return OmegaConf.to_yaml(configuration("trainer.max_steps=4", folder=Path(folder)))


def job(*words: str, folder: str = "run") -> Any:
    """Returns a job's configuration with some values set."""
    config = OmegaConf.merge(OmegaConf.create(base()), OmegaConf.from_dotlist(list(words)))
    config.paths.output = str(Path(folder).resolve())
    return config


def resumed(*words: str, folder: str = "run") -> Any:
    """Returns a job's configuration that continues from the last checkpoint of ``run``."""
    config = job(*words, folder=folder)
    config.ckpt_path = str(Path("run/checkpoints/last.ckpt").resolve())
    return config


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the checkpoint of a run is that took two of four steps; nothing of it but what is asked for."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(
        {
            "run_config": OmegaConf.to_container(job()),
            "global_step": 2,
            "loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 1}}}},
            "callbacks": {"TimeLimit": {"time_elapsed": {"train": 60.5}}},
        },
        path,
    )
    return path


@pytest.mark.usefixtures("checkpoint")
class TestCheckResume:
    def test_same_settings_say_nothing_in_any_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        report_resume(resumed())
        report_resume(resumed("name=other", "paths.runs=elsewhere", folder="other"))
        assert capsys.readouterr().err == ""

    def test_each_changed_key_is_told_once_with_both_values(self) -> None:
        lines = check_resume(
            resumed(
                *("trainer.max_steps=9", "seed=3", "data.seed=3", "rule.rate=0.5"),
                *("callbacks.loss_free.rule.rule.rate=0.5", "callbacks.checkpoint.save_top_k=2"),
            )
        )
        assert lines == [
            "resume: seed=3 takes effect, 0 before (on the order of the data; random numbers go on)",
            "resume: rule.rate=0.5 takes effect, 'auto' before",
            "resume: trainer.max_steps=9 takes effect, 4 before",
            "resume: callbacks.checkpoint.save_top_k=2 takes effect, 1 before",
        ]

    def test_schedule_is_not_in_the_checkpoint(self) -> None:
        (line,) = check_resume(resumed("model.optimizer.warmup_steps=3"))
        assert line == "resume: model.optimizer.warmup_steps=3 takes effect, 0 before"

    @pytest.mark.parametrize(
        ("word", "before", "after"),
        [
            ("model.optimizer.learning_rate=0.5", "0.003", "0.5"),
            ("model.optimizer.weight_decay=0", "0.1", "0"),
            ("model.optimizer.betas=[0.5,0.5]", "[0.9, 0.95]", "[0.5, 0.5]"),
        ],
    )
    def test_optimizer_setting_is_refused_unless_it_overrides(
        self, word: str, before: str, after: str
    ) -> None:
        with pytest.raises(ConfigError) as error:
            check_resume(resumed(word))
        assert str(error.value) == (
            f"'{word.split('=')[0]}' must be the checkpoint's ({before}), got {after}. "
            "Add override_optimizer=true to continue with the new value."
        )
        assert len(check_resume(resumed(word, "override_optimizer=true"))) == 1

    def test_patience_that_a_callback_restores_is_refused(self) -> None:
        stopping = "callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}"
        assert len(check_resume(resumed(stopping))) == 2
        with pytest.raises(ConfigError, match=r"'callbacks.stop.patience' must be the checkpoint's"):
            check_resume(resumed(stopping, "callbacks.stop.patience=9"))

    def test_folder_with_a_file_per_process_is_read_too(self, checkpoint: Path) -> None:
        content = torch.load(checkpoint)
        checkpoint.unlink()
        checkpoint.mkdir()
        torch.save(content, checkpoint / "meta.pt")
        assert check_resume(resumed("rule.rate=0.5")) == [
            "resume: rule.rate=0.5 takes effect, 'auto' before",
        ]

    def test_what_no_run_can_continue_from_is_refused(self, checkpoint: Path) -> None:
        torch.save({"state_dict": {}, "global_step": 2}, checkpoint)
        with pytest.raises(
            CheckpointError, match=r"to continue from, with callbacks, global_step, loops, got"
        ):
            check_resume(resumed())

    def test_odd_settings_in_a_received_checkpoint_are_shown_escaped(self, checkpoint: Path) -> None:
        content = torch.load(checkpoint)
        for odd in ("text", {"a": "${oc.env:HOME}", "\x1b[31m": "\x1b[0m"}):
            torch.save(content | {"run_config": odd}, checkpoint)
            text = "".join(check_resume(resumed("override_optimizer=true")))
            assert text.isprintable()
            assert (text == UNKNOWN) == (odd == "text")

    def test_checkpoint_without_settings_is_told(self, checkpoint: Path) -> None:
        content = torch.load(checkpoint)
        del content["run_config"]
        torch.save(content, checkpoint)
        assert check_resume(resumed("rule.rate=0.5")) == [UNKNOWN]


class TestEnd:
    @pytest.mark.parametrize(
        ("word", "trained"),
        [
            ("trainer.max_steps=2", 2),
            ("trainer.max_steps=1", 2),
            ("trainer.max_epochs=1", 1),
            ("trainer.max_time=00:00:01:00", 60),
        ],
    )
    def test_run_that_cannot_train_is_refused(self, checkpoint: Path, word: str, trained: int) -> None:
        key = word.split("=")[0]
        with pytest.raises(ConfigError, match=rf"'{key}' must be more than .* trained \({trained}\)"):
            check_resume(resumed(word))

    def test_same_command_of_a_finished_run_is_allowed_in_its_own_folder(self, checkpoint: Path) -> None:
        content = torch.load(checkpoint)
        torch.save(content | {"global_step": 4}, checkpoint)
        (line,) = check_resume(resumed())
        assert line == "resume: the run has reached its end (trainer.max_steps=4) and is only validated again"
        with pytest.raises(ConfigError, match=r"'trainer.max_steps' must be more .* \(4\), got 4"):
            check_resume(resumed(folder="other"))

    @pytest.mark.parametrize(
        "word",
        ["trainer.limit_train_batches=0", "trainer.limit_train_batches=0.0", "trainer.max_time=00:00:00:00"],
    )
    def test_run_without_batches_or_time_is_refused(self, word: str) -> None:
        check_trains(job())
        with pytest.raises(ConfigError, match=f"'{word.split('=')[0]}' must be null or"):
            check_trains(job(word))


class TestResume:
    def test_override_puts_the_new_settings_in_place_and_rules_follow_their_setting(
        self, workplace: Path
    ) -> None:
        train(configuration("trainer.max_steps=2", folder=Path("run").resolve()))
        first = saved()
        words = ("learning_rate=0.5", "weight_decay=0.25", "betas=[0.5,0.75]", "floor=0.5", "warmup_steps=9")
        words = tuple(f"model.optimizer.{word}" for word in words)
        words += ("trainer.max_steps=3", "rule.rate=0", "override_optimizer=true")
        again = configuration(*words, folder=Path("run").resolve())
        again.ckpt_path = "run/checkpoints/last.ckpt"
        train(again)
        second = saved()
        groups = second["optimizer_states"][0]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
        # After step 3, of which the schedule has the fourth of ten steps to the peak.
        assert [group["lr"] for group in groups] == [0.5 * 4 / 10] * 2
        assert [group["betas"] for group in groups] == [(0.5, 0.75)] * 2
        assert second["lr_schedulers"][0]["base_lrs"] == [0.5, 0.5]
        self.assert_stepped(first, second, "network.norm.weight", rate=0.5 * 3 / 10, betas=(0.5, 0.75))
        bias_E = f"{ROUTER}.expert_bias"
        assert first["state_dict"][bias_E].abs().max() > 0
        assert torch.equal(first["state_dict"][bias_E], second["state_dict"][bias_E])

    @staticmethod
    def assert_stepped(
        first: Any, second: Any, name: str, *, rate: float, betas: tuple[float, float]
    ) -> None:
        """Compares the step of a parameter without decay with AdamW's formula on the running means it left."""
        before, after = first["state_dict"][name], second["state_dict"][name]
        expected = [
            before - rate * mean / (square.sqrt() + 1e-8)
            for mean, square in (
                (state["exp_avg"] / (1 - betas[0] ** 3), state["exp_avg_sq"] / (1 - betas[1] ** 3))
                for state in second["optimizer_states"][0]["state"].values()
                if state["exp_avg"].shape == before.shape
            )
        ]
        assert any(torch.allclose(each, after, rtol=1e-5) for each in expected)
