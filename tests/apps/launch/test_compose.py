"""Tests of composing: every option of every group, sweeps, and wrong words."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from hydra_plugins.moe_plugin_search_path import GROUPS
from moe_plugin.apps.launch.compose import compose_jobs, conf_dir, is_group, quote_option
from moe_plugin.errors import ConfigError

RENDERED_ELSEWHERE = {"hydra", "rule", "hardware", "source", "study"}
OPTIONS = sorted(
    {
        f"{group.name}={option.stem}"
        for folder in (conf_dir(), GROUPS)
        for group in folder.iterdir()
        if group.is_dir() and group.name not in RENDERED_ELSEWHERE
        for option in group.glob("*.yaml")
    }
)


def words(*arguments: str) -> list[str]:
    """Quotes numeric options as the command does."""
    return [quote_option(word) for word in arguments]


class TestComposeJobs:
    @pytest.mark.parametrize("option", OPTIONS)
    def test_every_option_composes(self, option: str) -> None:
        (config,) = compose_jobs(words(option), multirun=False)
        assert set(config) - {"hydra"} >= {
            *(
                "data",
                "model",
                "router",
                "experts",
                "balancing",
                "strategy",
                "trainer",
                "callbacks",
                "logger",
            ),
            *("paths", "seed", "ckpt_path", "trust", "count_only"),
        }

    def test_every_rule_takes_the_callbacks_place(self) -> None:
        for rule in {path.stem for path in (GROUPS / "rule").glob("*.yaml")} - {"by_layer"}:
            (config,) = compose_jobs([f"rule={rule}"], multirun=False)
            target = config.callbacks.loss_free.rule.rule._target_
            assert target.rpartition(".")[2].lower() == rule.replace("_", "")

    def test_grid_gives_each_combination(self) -> None:
        configs = list(compose_jobs(words("experts=8,16", "seed=1,2", "name=x"), multirun=True))
        assert [(c.experts.num_experts, c.seed, c.name) for c in configs] == [
            *((8, 1, "x"), (8, 2, "x")),
            *((16, 1, "x"), (16, 2, "x")),
        ]

    def test_range_without_sampler_is_refused(self) -> None:
        with pytest.raises(
            ConfigError,
            match=r"^'seed' must be values, .*, got 'interval\(1,2\)'\. Add hparams_search=optuna",
        ):
            list(compose_jobs(["seed=interval(1,2)"], multirun=True))

    def test_sampler_gives_one_without_the_swept_keys(self) -> None:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        (config,) = compose_jobs(["hparams_search=optuna", "seed=choice(1,2)", "name=x"], multirun=True)
        assert (config.seed, config.name) == (0, "x")

    def test_own_folder_of_groups_comes_with_ours(self, tmp_path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.yaml").write_text("_target_: my.Model\n")
        (config,) = compose_jobs(["model=mine"], multirun=False, config_dir=str(tmp_path))
        assert config.model._target_ == "my.Model"

    def test_every_file_says_what_it_is_on_top(self) -> None:
        for path in (*conf_dir().rglob("*.yaml"), *GROUPS.rglob("*.yaml")):
            first, *others = path.read_text().splitlines()
            comment = others[0] if first.startswith("# @package") else first
            assert comment.startswith("# "), path

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("foo=1", "'foo' is not a key of the configuration, got 1."),
            (
                "trainer.max_step=3",
                "'trainer.max_step' is not a key of 'trainer', got 3. Did you mean 'trainer.max_steps'?",
            ),
            ("router=foo", "'router' must be one of deepseek_v3, "),
            ("router=foo", ", top_p, zero_experts, got 'foo'."),
            ("routers=x", "Did you mean 'router'?"),
            ("data=[1", "'data=[1'"),
        ],
    )
    def test_wrong_word_is_told_in_one_line(self, word: str, message: str) -> None:
        with pytest.raises(ConfigError) as error:
            list(compose_jobs([word], multirun=False))
        assert message in str(error.value)
        assert "\n" not in str(error.value)


class TestConfDir:
    def test_holds_the_main_configuration(self) -> None:
        assert "defaults" in OmegaConf.load(conf_dir() / "config.yaml")


class TestHydraGroups:
    def test_hold_what_is_for_any_app_and_no_second_copy_of_it_is_in_ours(self) -> None:
        files = {str(path.relative_to(GROUPS)) for path in GROUPS.rglob("*.yaml")}
        others = {"balancing/loss_free.yaml", "callbacks/load_monitor.yaml", "callbacks/loss_free.yaml"}
        assert {name for name in files if not name.startswith("rule/")} == others
        assert not any((conf_dir() / name).exists() for name in files)


class TestIsGroup:
    @pytest.mark.parametrize("name", ["experts", "rule", "callbacks"])
    def test_groups_of_both_folders_are(self, name: str) -> None:
        assert is_group(name)

    @pytest.mark.parametrize("name", ["config", "seed", "moe_plugin_groups"])
    def test_files_and_keys_are_not(self, name: str) -> None:
        assert not is_group(name)


class TestQuoteOption:
    @pytest.mark.parametrize(
        ("word", "quoted"),
        [
            ("experts=8", 'experts="8"'),
            ("experts=8,16", 'experts="8","16"'),
            ("seed=8", "seed=8"),
            ("rule=8", 'rule="8"'),
            ("plan=8", "plan=8"),
            ("hydra", "hydra"),  # of --cfg hydra
        ],
    )
    def test_number_that_names_an_option_is_quoted_and_nothing_else(self, word: str, quoted: str) -> None:
        assert words(word) == [quoted]
