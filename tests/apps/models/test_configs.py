"""The YAML files of the groups model, router and experts, composed as the application composes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from moe_plugin.apps.models import measure
from tests.apps.models.small_models import token_batch

CONF = Path(__file__).parents[3] / "conf"
ROUTERS = ["deepseek_v3", "sigmoid_top_k", "mixtral", "qwen3", "switch"]


def compose(model: str = "tiny", router: str = "sigmoid_top_k", experts: str = "16"):
    groups = {"model": model, "router": router, "experts": experts}
    config = {group: OmegaConf.load(CONF / group / f"{name}.yaml") for group, name in groups.items()}
    data = {"vocab_size": 256, "context_length": 64}
    return OmegaConf.create(config | {"data": data, "balancing": {"auxiliary_loss": None}})


class TestRouters:
    @pytest.mark.parametrize("router", ROUTERS)
    @pytest.mark.parametrize("experts", ["16", "64", "256"])
    def test_every_router_runs_with_every_number_of_experts(self, router, experts):
        config = compose(router=router, experts=experts)
        config.model.update(dim=32, num_layers=1)
        model = instantiate(config.model)
        model._losses(token_batch(2))[0].backward()
        built = model.network.layers[0].feed_forward.router
        assert built.num_experts == int(experts)
        assert built.top_k == (1 if router == "switch" else config.experts.top_k)

    def test_deepseek_groups_of_one_name_the_fix(self):
        with pytest.raises(InstantiationException, match="Set num_groups <= 4 with top_k_groups"):
            instantiate(compose(router="deepseek_v3", experts="8").model)

    def test_deepseek_with_eight_experts_runs_as_its_comment_says(self):
        config = compose(router="deepseek_v3", experts="8")
        config.router.update(num_groups=4, top_k_groups=2)
        assert instantiate(config.model).network.layers[0].feed_forward.router.num_groups == 4


class TestModels:
    def test_tiny_is_that_of_the_demo(self):
        config = compose()
        size = measure(instantiate(config.model))
        assert config.experts == {
            "_target_": "moe_plugin.experts.ExpertShape",
            "num_experts": 16,
            "top_k": 2,
            "hidden_dim": 128,
            "num_shared": 0,
        }
        expert, router = 3 * 128 * 128, 16 * 128
        layer = 2 * 128 + 4 * 128 * 128 + router
        rest = 2 * 256 * 128 + 128
        assert size.total_parameters == rest + 4 * (layer + 16 * expert)
        assert size.active_parameters == rest + 4 * (layer + 2 * expert)

    def test_small_is_a_few_times_larger(self):
        tiny, small = (measure(instantiate(compose(model).model)) for model in ("tiny", "small"))
        assert 5 < small.active_parameters / tiny.active_parameters < 20

    def test_deepseek_v3_has_the_published_size(self):
        pytest.importorskip("transformers")
        size = measure(instantiate(OmegaConf.load(CONF / "model" / "deepseek_v3_671b.yaml")))
        assert round(size.total_parameters / 1e9) == 671
        # Published as 37B, with embedding and output projection.
        assert size.active_parameters == 37_552_282_624
