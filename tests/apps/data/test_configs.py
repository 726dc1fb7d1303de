from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from moe_plugin.apps.data import BytePairs, CorpusDataModule, Files, HuggingFace, StandardLibrary

CONF = Path(__file__).parents[3] / "conf"
PAIRS = [
    "data.tokenizer._target_=moe_plugin.apps.data.BytePairs",
    "+data.tokenizer.vocab_size=300",
    "data.vocab_size=300",
]


def make(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=["+seed=7", *(f"+{overrides[0]}", *overrides[1:])])
    return instantiate(config.data)


class TestConfigs:
    @pytest.mark.parametrize(
        ("overrides", "source"),
        [
            (["data=stdlib"], StandardLibrary),
            (
                [
                    "data=files",
                    "data.source.sources={configs: ['conf/**/*.yaml']}",
                    f"data.source.root={CONF.parent}",
                ],
                Files,
            ),
            (["data=hf", "data.source.path=owner/name"], HuggingFace),
        ],
    )
    def test_each_source_makes_a_data_module(self, overrides, source):
        data = make(*overrides)
        assert isinstance(data, CorpusDataModule)
        assert isinstance(data.source, source)
        assert (data.seed, data.vocab_size, data.context_length) == (7, 256, 256)

    def test_byte_pairs_are_three_overrides(self):
        assert isinstance(make("data=stdlib", *PAIRS).tokenizer, BytePairs)
