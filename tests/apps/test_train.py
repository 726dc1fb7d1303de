"""Tests of ``moe-train`` and ``moe-eval``, run in this process on two domains of made-up text."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hydra_plugins.moe_plugin_search_path import GROUPS
from moe_plugin.apps import evaluate, train
from moe_plugin.apps.launch.compose import conf_dir
from moe_plugin.apps.models import LanguageModel

SMALL = [
    "experts=8",
    *("experts.hidden_dim=16", "model.dim=16", "model.num_layers=1", "model.num_heads=2"),
    *("data=files", "data.source.sources={letters: 'texts/a*.txt', digits: 'texts/d*.txt'}"),
    *("data.context_length=16", "data.batch_size=8", "data.val_batch_size=8", "data.max_val_tokens=512"),
    *("trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.val_check_interval=1"),
    *("trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "name=small"),
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with eight texts of each of two domains, and nothing else; the command runs there."""
    (tmp_path / "texts").mkdir()
    for i in range(8):
        letters = "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(600))
        (tmp_path / "texts" / f"a{i}.txt").write_text(letters)
        (tmp_path / "texts" / f"d{i}.txt").write_text(" ".join(str(i + j * 37) for j in range(200)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run_folder() -> Path:
    """Returns the folder of the only run."""
    (folder,) = Path("runs/small").iterdir()
    return folder


def summary(folder: Path) -> dict[str, float]:
    """Returns a run's summary."""
    return json.loads((folder / "summary.json").read_text())


class EnormousLoss(LanguageModel):
    """A model whose validation loss has no perplexity that a float can hold."""

    def token_losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().token_losses(batch) * 1000


class TestTrain:
    def test_run_leaves_everything_to_look_at(self, capsys: pytest.CaptureFixture[str]) -> None:
        train.main(SMALL)
        folder = run_folder()
        assert {path.name for path in folder.iterdir()} == {
            *(
                ".hydra",
                ".lock",
                "checkpoints",
                "config.yaml",
                "csv",
                "data_manifest.json",
                "environment.json",
                "summary.json",
                "tensorboard",
            )
        }
        kept = {"best.ckpt", "last.ckpt", "last.ckpt.previous"}
        sums = {f"{name}.sha256" for name in kept}
        assert {path.name for path in (folder / "checkpoints").iterdir()} == kept | sums
        with (folder / "csv" / "metrics.csv").open() as file:
            losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
        assert losses[-1] == pytest.approx(summary(folder)["val_loss"])
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert events.Scalars("val/loss")[-1].value == pytest.approx(losses[-1])
        assert f"tensorboard --logdir {folder}/tensorboard" in capsys.readouterr().out

    def test_summary_holds_exact_numbers(self) -> None:
        train.main([*SMALL, "seed=3"])
        numbers = summary(run_folder())
        assert numbers["perplexity"] == pytest.approx(math.exp(numbers["val_loss"]))
        assert numbers["seed"] == 3
        assert 0 < numbers["max_violation_global"] <= numbers["max_violation_batch"] + 1e-6
        assert numbers["parameters_active"] < numbers["parameters_total"]
        assert numbers["tokens_per_second"] * numbers["seconds"] == pytest.approx(2 * 8 * 16)

    def test_written_configuration_is_resolved(self) -> None:
        train.main(SMALL)
        text = (run_folder() / "config.yaml").read_text()
        assert "${" not in text
        assert "???" not in text

    def test_without_balancing_the_load_is_still_measured(self) -> None:
        train.main([*SMALL, "balancing=none"])
        # No expert gets more than each token once: the largest load is num_experts / top_k of the mean at most.
        assert 0 < summary(run_folder())["max_violation_global"] <= 8 / 2 - 1

    def test_results_survive_an_enormous_loss_and_a_name_with_markup(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["model._target_=tests.apps.test_train.EnormousLoss", "name='a[/b]'", "logger=csv"]
        train.main([*SMALL, *words])
        (folder,) = Path("runs/a[/b]").iterdir()
        assert summary(folder)["val_loss"] > 709
        assert summary(folder)["perplexity"] is None
        assert f"Run: {folder.resolve()}" in capsys.readouterr().out

    def test_dry_run_writes_no_summary(self) -> None:
        train.main([*SMALL, "debug=fast_dev_run", "name=small"])
        assert not (run_folder() / "summary.json").exists()

    def test_resumed_run_equals_the_uninterrupted_one(self) -> None:
        train.main(
            [
                *SMALL,
                "name=whole",
                "trainer.max_steps=4",
                "model.optimizer.warmup_steps=0",
                "model.optimizer.floor=1",
            ]
        )
        train.main([*SMALL, "name=first", "model.optimizer.warmup_steps=0", "model.optimizer.floor=1"])
        (first,) = Path("runs/first").iterdir()
        train.main(
            [
                *(*SMALL, "name=second", "trainer.max_steps=4", f"ckpt_path={first}/checkpoints/last.ckpt"),
                *("model.optimizer.warmup_steps=0", "model.optimizer.floor=1"),
            ]
        )
        (whole,), (second,) = Path("runs/whole").iterdir(), Path("runs/second").iterdir()
        assert summary(second)["val_loss"] == summary(whole)["val_loss"]

    def test_count_only_prints_the_size_and_creates_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="0"):
            train.main(["model=small", "count_only=true"])
        assert "Parameters, active" in capsys.readouterr().out
        assert {path.name for path in Path().iterdir()} == {"texts"}

    def test_help_shows_examples_and_groups(self, capsys: pytest.CaptureFixture[str]) -> None:
        train.main(["--help"])
        out = capsys.readouterr().out
        assert "moe-train experiment=demo" in out
        assert "router: deepseek_v3, expert_choice" in out


class TestSweep:
    def test_each_job_has_a_folder_and_a_line(self) -> None:
        train.main([*SMALL, "-m", "balancing=none,loss_free"])
        folder = run_folder()
        with (folder / "sweep_summary.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["balancing"] for row in rows] == ["none", "loss_free"]
        assert [float(row["val_loss"]) for row in rows] == [summary(folder / job)["val_loss"] for job in "01"]


class TestRules:
    @pytest.mark.slow
    def test_sweep_over_all_rules_trains_with_each(self) -> None:
        rules = sorted(path.stem for path in (GROUPS / "rule").glob("*.yaml"))
        train.main([*SMALL, "-m", f"rule={','.join(rules)}", "trainer.max_steps=1"])
        with (run_folder() / "sweep_summary.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert sorted(row["rule"] for row in rows) == rules
        assert all(math.isfinite(float(row["val_loss"])) for row in rows)

    def test_rules_by_layer_reach_their_routers(self) -> None:
        train.main([*SMALL, "model.num_layers=2", "rule=by_layer"])
        (state,) = (
            value
            for key, value in torch.load(run_folder() / "checkpoints" / "last.ckpt")["callbacks"].items()
            if "LossFreeBalancing" in key
        )
        first_E, second_E = (site["bias"] for site in state["sites"].values())
        assert 0 < first_E.abs().max() <= 2 * 2 * 0.001
        assert second_E.abs().max() > 2 * 2 * 0.001


class TestBaselines:
    @pytest.mark.slow
    def test_sweep_over_all_balancings_trains_with_each(self) -> None:
        options = sorted(path.stem for path in (conf_dir() / "balancing").glob("*.yaml"))
        train.main([*SMALL, "-m", f"balancing={','.join(options)}", "trainer.max_steps=1"])
        with (run_folder() / "sweep_summary.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert sorted(row["balancing"] for row in rows) == options
        assert all(math.isfinite(float(row["val_loss"])) for row in rows)

    def test_routers_that_need_no_balancing_are_measured(self) -> None:
        train.main(
            [*SMALL, "-m", "router=sinkhorn,random,token_hash", "balancing=none", "trainer.max_steps=1"]
        )
        with (run_folder() / "sweep_summary.csv").open() as file:
            violation = {row["router"]: float(row["max_violation_global"]) for row in csv.DictReader(file)}
        assert violation["random"] < 0.5
        assert violation["token_hash"] > violation["random"]

    def test_expert_choice_trains_without_a_monitor(self) -> None:
        words = ["router=expert_choice", "balancing=none", "callbacks.load_monitor=null"]
        train.main([*SMALL, *words])
        assert math.isfinite(summary(run_folder())["val_loss"])

    def test_random_router_survives_recomputation(self) -> None:
        words = ["router=random", "balancing=none", "model.num_layers=2"]
        train.main([*SMALL, *words])
        train.main([*SMALL, *words, "name=recomputed", "model.activation_checkpointing=non_reentrant"])
        (recomputed,) = Path("runs/recomputed").iterdir()
        assert summary(recomputed)["val_loss"] == summary(run_folder())["val_loss"]


class TestWrongUse:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["foo=1"], "'foo' is not a key of the configuration, got 1."),
            (["trainer.max_step=3"], "Did you mean 'trainer.max_steps'?"),
            (["router=foo"], "'router' must be one of deepseek_v3, expert_choice"),
            (["seed=x"], "'seed' must be a whole number, got 'x'."),
            (["count_only=maybe"], "'count_only' must be true or false, got 'maybe'."),
            (["trainer.max_steps=abc"], "'trainer.max_steps' must be a whole number, got 'abc'."),
            (
                ["trainer.max_steps=-1"],
                "'trainer.max_steps' must be >= 1 unless trainer.max_epochs is, got -1.",
            ),
            (["trainer.max_steps=-1", "trainer.max_epochs=null"], "'trainer.max_steps' must be >= 1"),
            (["trainer.precision=12"], "'trainer.precision' must be"),
            (
                ["trainer.accelerator=tpux"],
                "'trainer' cannot be used: You selected an invalid accelerator name: `accelerator='tpux'`",
            ),
            (
                ["trainer.accumulate_grad_batches=0"],
                "'trainer.accumulate_grad_batches' must be an integer >= 1, got 0.",
            ),
            (["+trainer.foo=1"], "'trainer.foo' is not a key of 'trainer', got 1."),
            (["experts.top_k=99"], "'experts.top_k' must be <= num_experts (8), got 99."),
            (["optimized_metric=nope"], "'optimized_metric' must be one of val_loss, perplexity"),
            (["rule.rate=abc"], "'rule.rate' must be"),
            (["rule.rate=-0.1"], "'rule.rate' must be"),
            (["model.num_layers=two"], "'model.num_layers' must be a whole number, got 'two'."),
            (["model._target_=moe_plugin.Nope"], "'model._target_' must name a class or function"),
            (["callbacks.checkpoint.mode=mn"], "'callbacks.checkpoint'"),
            (["data.batch_size=-8"], "'data.batch_size' must be"),
            (["data.batch_size=9", "strategy=ddp"], "'data.batch_size' must be a multiple of"),
            (["data.source.sources.letters=nope/*.txt"], "'data.source.sources.letters'"),
            (["data.source.sources={other: x}"], "'data.source.sources'"),
            (
                ["data.source.sources=???"],
                "'data.source.sources' must be given. Add data.source.sources=VALUE.",
            ),
            (
                ["ckpt_path=nope.ckpt"],
                "'ckpt_path' must be an existing checkpoint or 'last', got 'nope.ckpt'.",
            ),
            (["strategy.devices=0"], "'strategy.devices' must be an integer >= 1, got 0."),
            (
                ["strategy=fsdp_tp", "strategy.tensor_parallel_size=0"],
                "'strategy.tensor_parallel_size' must be an integer >= 1, got 0.",
            ),
            (["strategy=fsdp1"], "'trainer.accelerator' must be a GPU for FSDP of the first generation"),
            (["strategy=fsdp1"], "got 'cpu'. Set strategy=fsdp."),
            (
                ["strategy=fsdp_ep", "strategy.expert_parallel_size=3"],
                "must divide the number of processes (2), got 3.",
            ),
            (["strategy=fsdp_ep", "experts.num_experts=5"], "must divide the experts of 'network.layers.0"),
            (
                ["callbacks.loss_free.experts=fused", "strategy=fsdp_ep"],
                "'callbacks.loss_free.experts' must be null when experts are spread over processes "
                "(expert_parallel_size is 2), got 'fused'.",
            ),
            (
                ["callbacks.loss_free.experts=fused"],
                "'network.layers.0.feed_forward.experts': they are the fused experts already",
            ),
            (["strategy.compile=gcc"], "'strategy.compile' must be null or one of"),
            (["-m", "seed=1,x"], "'seed' must be a whole number, got 'x'."),
        ],
    )
    def test_one_line_names_what_is_wrong_and_nothing_is_created(
        self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            train.main([*SMALL, *words])
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert message in captured.err
        assert {path.name for path in Path().iterdir()} == {"texts"}

    def test_whole_trace_is_shown_when_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        with pytest.raises(ValueError, match="'foo'"):
            train.main(["foo=1"])


class TestEvaluate:
    def test_measures_equal_those_of_the_run(self) -> None:
        train.main(SMALL)
        folder = run_folder()
        evaluate.main([f"ckpt_path={folder}/checkpoints/last.ckpt", "data.val_batch_size=8"])
        measures = json.loads((folder / "eval_last.json").read_text())
        assert measures == {key: summary(folder)[key] for key in measures}

    def test_throughput_is_printed_and_written_beside_the_measures(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train.main([*SMALL, "router=top_p"])
        folder = run_folder()
        words = [
            f"ckpt_path={folder}/checkpoints/last.ckpt",
            "throughput.sequences=[1,8]",
            "throughput.rounds=2",
        ]
        evaluate.main(words)
        measures = json.loads((folder / "eval_last.json").read_text())
        throughput = measures.pop("throughput")
        assert measures == {key: summary(folder)[key] for key in measures}
        assert (throughput["device"], throughput["length"], throughput["rounds"]) == ("cpu", 16, 2)
        one, eight = throughput["readings"]
        assert (one["sequences"], one["relative_time_per_token"], eight["sequences"]) == (1, 1.0, 8)
        assert min(one["tokens_per_second"], eight["tokens_per_second"]) > 0
        assert "16 tokens a sequence" in capsys.readouterr().out

    def test_wrong_throughput_creates_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        train.main(SMALL)
        folder = run_folder()
        before = sorted(folder.rglob("*"))
        messages = {
            "throughput=yes": "'throughput' must be true or false",
            "throughput.sequences=[8,1]": "'throughput.sequences' must rise, got [8, 1].",
            "throughput.length=17": "'throughput.length' must be <= the model's context_length (16), got 17.",
        }
        for word, message in messages.items():
            with pytest.raises(SystemExit, match="2"):
                evaluate.main([f"ckpt_path={folder}/checkpoints/last.ckpt", word])
            assert message in capsys.readouterr().err
        assert sorted(folder.rglob("*")) == before

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "'ckpt_path' must be an existing checkpoint, got None."),
            (["ckpt_path=nope"], "'ckpt_path' must be an existing checkpoint, got 'nope'."),
            (
                ["ckpt_path=texts/a0.txt"],
                "'ckpt_path' must be in a run's folder, next to its config.yaml, got 'texts/a0.txt'.",
            ),
            (["a=[1"], "'a=[1' must be key=value"),
        ],
    )
    def test_wrong_use_is_told_in_one_line(
        self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(words)
        assert message in capsys.readouterr().err

    def test_unknown_key_suggests_the_nearest(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("run/checkpoints").mkdir(parents=True)
        Path("run/checkpoints/last.ckpt").touch()
        OmegaConf.save({"ckpt_path": None, "trainer": {"accelerator": "cpu"}}, "run/config.yaml")
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(["ckpt_path=run/checkpoints/last.ckpt", "trainer.accelerater=cpu"])
        assert "Did you mean 'trainer.accelerator'?" in capsys.readouterr().err


SWITCHED = ["strategy.meta_init=true", "strategy.activation_checkpointing=true"]


class TestStrategies:
    @pytest.mark.parametrize("words", [["strategy=ddp"], ["strategy=fsdp_tp", "model.tie_embeddings=true"]])
    def test_two_processes_train_as_one_does(self, words: list[str]) -> None:
        train.main([*SMALL, *words[1:], "name=one"])
        train.main([*SMALL, *words, "name=two"])
        self.assert_same("two", "one")

    def test_sharded_checkpoint_is_evaluated_like_the_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        train.main([*SMALL, "strategy=fsdp", "strategy.lightning.save_distributed_checkpoint=true"])
        checkpoint = run_folder() / "checkpoints" / "last.ckpt"
        assert checkpoint.is_dir()
        evaluate.main([f"ckpt_path={checkpoint}"])
        measures = json.loads((run_folder() / "eval_last.json").read_text())
        assert measures["val_loss"] == pytest.approx(summary(run_folder())["val_loss"], rel=1e-6)
        assert measures["max_violation_global"] == summary(run_folder())["max_violation_global"]
        with pytest.raises(SystemExit, match="2"):
            train.main([*SMALL, "experts=16", f"ckpt_path={checkpoint}"])
        assert "layers.0.feed_forward: 8 in the checkpoint, 16 in the model" in capsys.readouterr().err

    @pytest.mark.slow
    @pytest.mark.parametrize("strategy", ["fsdp", "fsdp_ep"])
    def test_switches_change_nothing_from_strategy_to_strategy(self, strategy: str) -> None:
        train.main([*SMALL, *SWITCHED[:1], "name=one"])
        train.main([*SMALL, *SWITCHED, f"strategy={strategy}", "name=two"])
        self.assert_same("two", "one")

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    # Dynamo itself does that.
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated.*:DeprecationWarning")
    def test_compiled_layers_train_as_others_do(self) -> None:
        train.main([*SMALL, "name=one"])
        train.main([*SMALL, "name=two", "strategy.compile=aot_eager"])
        self.assert_same("two", "one")

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    @pytest.mark.parametrize(
        "strategy", ["single", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp_ep"))]
    )
    def test_low_precision_trains_with_all_callbacks(self, strategy: str, precision: str) -> None:
        train.main([*SMALL, f"strategy={strategy}", f"trainer.precision={precision}"])
        assert math.isfinite(summary(run_folder())["val_loss"])

    @staticmethod
    def assert_same(name: str, other: str) -> None:
        numbers, expected = (
            summary(folder) for run in (name, other) for folder in Path("runs", run).iterdir()
        )
        assert numbers["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        assert numbers["max_violation_global"] == expected["max_violation_global"]
