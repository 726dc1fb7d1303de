from __future__ import annotations

import sys
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import moe_plugin.balancing.rules as rules
import moe_plugin.routing as routing
from hydra_plugins.moe_plugin_search_path import GROUPS
from moe_plugin.apps.config_folder import conf_dir
from moe_plugin.apps.received.allowed_targets import is_allowed
from moe_plugin.apps.received.local_checkpoint import local_checkpoint
from moe_plugin.apps.received.run_config import read_run_config
from moe_plugin.errors import ConfigError

NOT_IN_A_RUN = {"hydra", "hparams_search"}


def named_in_config_files() -> list[tuple[str, str]]:
    """Returns the place in a run's configuration and the target of every node in our config files."""
    found = []
    for folder in (conf_dir(), GROUPS):
        for path in sorted(folder.rglob("*.yaml")):
            section = path.relative_to(folder).parts[0]
            if section not in NOT_IN_A_RUN:
                plain = OmegaConf.to_container(OmegaConf.load(path))
                found += [(f"{section}.{key}".rstrip("."), target) for key, target in _targets(plain)]
    return sorted(set(found))


def _targets(node: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(node, list):
        return [each for item in node for each in _targets(item, key)]
    if not isinstance(node, dict):
        return []
    own = [(key, node["_target_"])] if "_target_" in node else []
    return own + [each for name, item in node.items() for each in _targets(item, f"{key}.{name}".lstrip("."))]


class TestIsAllowed:
    @pytest.mark.parametrize(("key", "target"), named_in_config_files())
    def test_what_our_config_files_name_is_allowed(self, key, target):
        assert is_allowed(target, key)

    def test_every_score_and_rule_is_allowed(self):
        scores = [
            n for n in routing.__all__ if hasattr(getattr(routing, n), "probabilities") and n != "Score"
        ]
        assert len(scores) >= 5
        own = [rule for rule in rules.__all__ if rule not in ("AnyRule", "Load", "Memory", "Rule")]
        assert all(is_allowed(f"moe_plugin.routing.{score}", "model.router.score") for score in scores)
        assert all(is_allowed(f"moe_plugin.balancing.rules.{rule}", "rule") for rule in own)

    @pytest.mark.parametrize(
        ("key", "target"),
        [
            ("callbacks.early", "lightning.pytorch.callbacks.EarlyStopping"),
            ("logger.a", "lightning.pytorch.loggers.MLFlowLogger"),
            ("strategy.lightning", "lightning.pytorch.strategies.FSDPStrategy"),
            ("trainer.profiler", "lightning.pytorch.profilers.AdvancedProfiler"),
            ("model.optimizer", "torch.optim.SGD"),
            ("model.optimizer.schedule", "torch.optim.lr_scheduler.OneCycleLR"),
        ],
    )
    def test_frameworks_classes_are_allowed_in_their_place_only(self, key, target):
        assert is_allowed(target, key)
        assert not is_allowed(target, "data.source")
        assert not is_allowed(f"{target}.__init__", key)

    @pytest.mark.parametrize(
        "target",
        [
            *("os.system", "moe_plugin.apps.train.main", "moe_plugin.routing.Sigmoid.__init__", "moe_plugin"),
            *(
                "lightning.pytorch.callbacks.os",
                "lightning.pytorch.callbacks.callback.Callback",
                "",
                ".",
                None,
            ),
            *("lightning.pytorch.callbacks.Any", "torch.optim.lr_scheduler.Optimizer", 3, ["os.system"]),
        ],
    )
    def test_anything_else_is_refused(self, target):
        assert not any(
            is_allowed(target, key) for key in ("model", "callbacks.a", "logger.a", "trainer.profiler")
        )

    def test_nothing_that_is_named_is_imported(self):
        assert "this" not in sys.modules
        assert not is_allowed("this.s", "model")
        assert "this" not in sys.modules


class TestReadRunConfig:
    def read(self, folder, values, **settings):
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        return read_run_config(folder / "config.yaml", trust="Add trust=true.", **settings)

    @pytest.mark.parametrize(
        ("values", "key"),
        [
            ({"a": [{"b": {"_target_": "os.system"}}]}, "a.0.b._target_"),
            ({"a": {"_target_": "moe_plugin.routing.Sigmoid", "_args_": [1]}}, "a._args_.0"),
            ({"a": {"b": "${oc.env:HOME}"}}, "a.b"),
            ({"a": "x${seed}", "seed": 1}, "a"),
            ({"data": {"path": "https://a.b"}}, "data.path"),
            ({"model": {"attn_implementation": "a/b"}}, "model.attn_implementation"),
        ],
    )
    def test_what_is_not_data_is_refused_unless_trusted_or_replaced(self, tmp_path, values, key):
        with pytest.raises(ConfigError, match=r"Add trust=true\.") as caught:
            self.read(tmp_path, values)
        assert caught.value.name == key
        assert self.read(tmp_path, values, trusted=True)
        assert self.read(tmp_path, values, replaced=[key])
        assert self.read(tmp_path, values, replaced=[key.split(".")[0]])


class TestLocalCheckpoint:
    def test_folder_called_like_an_address_is_a_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "http:").mkdir()
        assert local_checkpoint("http:", "key") == tmp_path / "http:"
        (tmp_path / "http:" / "a.ckpt").touch()
        assert local_checkpoint("http:/a.ckpt", "key") == tmp_path / "http:" / "a.ckpt"
        with pytest.raises(ConfigError, match="not a URL"):
            local_checkpoint("http://a.ckpt", "key")

    @pytest.mark.parametrize("word", [None, 3, "", "absent", "/dev/null"])
    def test_anything_else_is_refused(self, word):
        with pytest.raises(ConfigError, match="'key' must be"):
            local_checkpoint(word, "key")
