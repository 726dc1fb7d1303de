"""The command: what it writes, and what it answers to wrong words."""

from __future__ import annotations

import json

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from moe_plugin.apps.launch.compose import conf_dir
from moe_plugin.apps.plan.cluster import Hardware
from moe_plugin.apps.plan.command import main
from moe_plugin.balancing.counts import EXTRA_SLOTS

SMALL = ("model=tiny", "model.num_layers=1", "experts=16", "precision=32-true", "hardware=cpu")


@pytest.fixture
def plan(tmp_path, monkeypatch):
    def run(*words):
        monkeypatch.chdir(tmp_path)
        main([*SMALL, *words])
        return json.loads((tmp_path / "plan.json").read_text())

    return run


class TestMain:
    def test_writes_every_layout(self, plan, capsys):
        written = plan("nodes=4", "micro_batch=3")
        assert set(written["layouts"]) == {"ddp", "fsdp", "ep"}
        assert written["workload"]["micro_batch"] == 3
        for layout in written["layouts"].values():
            memory = layout["memory"]
            assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
            (counts,) = [t for t in layout["traffic"] if t["name"] == "bias counts"]
            assert (counts["calls"], counts["size"]) == (1, 8 * (16 + EXTRA_SLOTS))
        shown = capsys.readouterr().out
        assert "largest micro-batch" in shown
        assert "plan.json" in shown

    def test_throughput_follows_the_violation_per_rank(self, plan):
        written = plan("nodes=2", "layouts=[ep]", "max_violations=[0,2]")
        even, uneven = written["imbalance"]
        assert even["throughput"] == 1
        assert uneven["throughput"] == pytest.approx(1 / (1 + 2 * written["expert_share"]))
        assert 0 < uneven["largest_micro_batch"] < even["largest_micro_batch"]

    def test_largest_micro_batch_is_the_last_that_fits(self, plan):
        largest = plan("layouts=[ddp]", "hardware.memory_gib=1.2")["layouts"]["ddp"]["largest_micro_batch"]
        words = ("layouts=[ddp]", "hardware.memory_gib=1.2")
        assert plan(*words, f"micro_batch={largest}")["layouts"]["ddp"]["fits"]
        assert not plan(*words, f"micro_batch={largest + 1}")["layouts"]["ddp"]["fits"]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["nodes=0"], "'nodes' must be an integer >= 1, got 0."),
            (["nodes=two"], "'nodes' must be a whole number, got 'two'."),
            (["devices_per_node=0"], "'devices_per_node' must be an integer >= 1, got 0."),
            (["node=2"], "'node' is not a key of the configuration, got 2. Did you mean 'nodes'?"),
            (["hardware=tpu"], "'hardware' must be one of cpu, h100, h200, h800, got 'tpu'."),
            (["layouts=[zero]"], "'layouts' must be some of ddp, fsdp, ep, got ['zero']."),
            (["precision=fp8"], "'precision' must be '32-true' or 'bf16-true' or 'bf16-mixed', got 'fp8'."),
            (["micro_batch=0"], "'micro_batch' must be an integer >= 1, got 0."),
            (["max_violations=[-1]"], "'max_violations[0]' must be a number >= 0, got -1."),
            (
                ["output=nowhere/plan.json"],
                "'output' must be in a folder that exists, got 'nowhere/plan.json'.",
            ),
            (
                ["nodes=16", "expert_parallel=32"],
                "'expert_parallel' must divide the experts of a layer (16), got 32.",
            ),
            (["nodes=2", "expert_parallel=3"], "'expert_parallel' must divide the ranks (2 x 2 = 4), got 3."),
            (["model.num_dense=1"], "'model' must be a mixture of experts, got 'LanguageModel'."),
        ],
    )
    def test_wrong_word_is_told_in_one_line(self, plan, capsys, words, message):
        with pytest.raises(SystemExit) as exit_:
            plan(*words)
        shown = capsys.readouterr()
        assert exit_.value.code == 2
        assert message in shown.err
        assert shown.err.count("\n") == 1

    def test_help_lists_its_keys(self, capsys):
        main(["--help"])
        assert "nodes: 1" in capsys.readouterr().out


class TestHardware:
    @pytest.mark.parametrize(
        "path", sorted((conf_dir() / "hardware").glob("*.yaml")), ids=lambda path: path.stem
    )
    def test_every_option_is_hardware(self, path):
        assert isinstance(instantiate(OmegaConf.load(path)), Hardware)
