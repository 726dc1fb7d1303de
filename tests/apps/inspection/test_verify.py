from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from moe_plugin.apps.inspection import verify_source as source
from moe_plugin.apps.inspection.__main__ import main
from moe_plugin.attach.steering import intercept
from moe_plugin.attach.verification.battery import CHECKS
from tests.attach.verification.small_models import Layers
from tests.hosts import Host

HERE = "tests.apps.inspection.test_verify"
QUICK = ("zero_bias", "counts", "large_bias")


def build_host():
    return Host()


def build_layers():
    return Layers()


def build_with_inputs():
    return Layers(), {"x_TD": torch.randn(5, 8)}


def build_dense():
    return nn.Linear(4, 4)


class Picky(Layers):
    def forward(self, x_TD, wanted):
        return super().forward(x_TD) * wanted


def build_picky():
    return Picky()


def build_nothing():
    return "nothing"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs few checks, in a wide terminal."""
    verify_model = source.verify_model
    monkeypatch.setattr(source, "verify_model", lambda *args: verify_model(*args, checks=QUICK))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class TestFunctions:
    @pytest.mark.parametrize("function", ["build_host", "build_layers", "build_with_inputs"])
    def test_right_model_exits_with_zero_and_has_a_line_per_check(self, function, capsys):
        assert main([f"{HERE}:{function}", "--verify"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [name for name in CHECKS if any(name in line and "passed" in line for line in lines)] == [
            *QUICK
        ]

    def test_given_inputs_are_used(self, capsys):
        main([f"{HERE}:build_with_inputs", "--verify"])
        assert f"{2 * 5 * 2} selections" in capsys.readouterr().out

    def test_failed_check_exits_with_one_and_its_reason(self, capsys, monkeypatch):
        monkeypatch.setattr(intercept, "_biased", lambda scores, *_: scores.detach())
        assert main([f"{HERE}:build_layers", "--verify"]) == 1
        assert "a large bias on expert" in capsys.readouterr().out

    def test_model_without_routers_is_one_line(self, capsys):
        assert main([f"{HERE}:build_dense", "--verify"]) == 1
        assert capsys.readouterr().err.startswith("error: No router was found")

    @pytest.mark.parametrize(
        ("word", "says"),
        [
            (f"{HERE}:build_picky", "(model, inputs)"),
            (f"{HERE}:build_nothing", "returned str"),
            (f"{HERE}:absent", "can be imported"),
            ("last.ckpt", "checkpoint"),
            ("./no_such_folder", "model type"),
        ],
    )
    def test_wrong_word_is_one_line(self, word, says, capsys):
        assert main([word, "--verify"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: 'WHAT' must")
        assert says in captured.err
        assert len(captured.err.splitlines()) == 1

    def test_inspection_takes_the_model_of_a_pair(self, capsys):
        assert main([f"{HERE}:build_with_inputs"]) == 0
        assert "layers.{0..1}.router" in capsys.readouterr().out


class TestTransformers:
    @pytest.mark.parametrize("word", ["mixtral", "folder"])
    def test_small_model_of_the_type_is_verified(self, word, tmp_path, capsys):
        pytest.importorskip("transformers")
        if word == "folder":
            word = str(tmp_path)
            (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
        assert main([word, "--verify"]) == 0
        assert "2 routers, 256 selections" in capsys.readouterr().out
