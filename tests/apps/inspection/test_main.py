from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from moe_plugin.apps.inspection.__main__ import main
from moe_plugin.apps.inspection.inspect_source import inspect_source
from moe_plugin.apps.inspection.saved_biases import saved_biases
from moe_plugin.apps.inspection.sites import inspect_model
from moe_plugin.apps.launch.build import build_model
from moe_plugin.apps.launch.compose import compose_jobs, without_hydra
from tests.hosts import Host, OwningRouter

pytest.importorskip("transformers")
SMALL = ["model.dim=16", "model.num_layers=3", "model.num_heads=2", "experts.hidden_dim=8"]


def build() -> Host:
    return Host(OwningRouter)


@pytest.fixture
def checkpoint(tmp_path):
    """A run's folder with a checkpoint in which one bias is known."""
    (config,) = compose_jobs([*SMALL, f"paths.runs={tmp_path}", 'experts="8"'], multirun=False)
    OmegaConf.save(without_hydra(config, tmp_path), tmp_path / "config.yaml")
    model = build_model(config)
    site = inspect_model(model).sites[1]
    state = model.state_dict()
    state[site.bias_key][3] = 0.5
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": state, "callbacks": {}}, tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path / "checkpoints" / "last.ckpt"


class TestCommand:
    def test_checkpoint_shows_its_biases(self, checkpoint, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        assert main([str(checkpoint), "--every-layer"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "0 to 0.5" in next(line for line in lines if "layers.1.feed_forward.router" in line)
        assert "all 0" in next(line for line in lines if "layers.2.feed_forward.router" in line)

    def test_layers_alike_share_a_line(self, checkpoint, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        assert main([str(checkpoint)]) == 0
        assert "network.layers.{0..2}.feed_forward.router  ×3" in capsys.readouterr().out  # noqa: RUF001

    def test_function_is_called_on_the_meta_device(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        assert main(["tests.apps.inspection.test_main:build"]) == 0
        assert "e_score_correction_bias" in capsys.readouterr().out

    def test_folder_of_transformers_shows_the_stored_bias(self, tmp_path, monkeypatch, capsys):
        from safetensors.torch import save_file

        monkeypatch.setenv("COLUMNS", "200")
        config = {
            "model_type": "deepseek_v3",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
        }
        config |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        (tmp_path / "config.json").write_text(json.dumps(config))
        key = "model.layers.1.mlp.gate.e_score_correction_bias"
        save_file({key: torch.linspace(-1, 1, 8)}, tmp_path / "model.safetensors")
        assert main([str(tmp_path)]) == 0
        assert "-1 to 1" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "word",
        [
            "nowhere.ckpt",
            "no.such.module:build",
            "os:getcwd",
            "tests.apps.inspection.test_main:absent",
            "./no_such_folder",
        ],
    )
    def test_wrong_word_is_one_line(self, word, capsys, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert main([word]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: 'WHAT' must")
        assert len(captured.err.splitlines()) == 1

    def test_file_that_is_no_checkpoint_is_one_line(self, checkpoint, capsys):
        checkpoint.write_bytes(b"nothing")
        assert main([str(checkpoint)]) == 2
        assert "is damaged or no checkpoint" in capsys.readouterr().err


class TestSources:
    def test_callbacks_state_names_the_biases_that_the_model_lacks(self):
        inspection = inspect_model(Host())
        state = {"sites": {"layers.0.router": {"bias": torch.tensor([0.0, 1.0, 0.0, -1.0])}}}
        saved = {"state_dict": {}, "callbacks": {"LossFreeBalancing": state, "other": {"best": 1}}}
        biases = saved_biases(saved, inspection)
        assert inspection.with_biases(biases).sites[0].bias.highest == 1
        assert inspection.with_biases(biases).sites[1].bias is None

    def test_model_type_needs_no_network(self):
        inspection = inspect_source("mixtral")
        assert len(inspection.sites) == 32
        assert {(site.num_experts, site.top_k, site.score) for site in inspection.sites} == {
            (8, 2, "softmax")
        }
