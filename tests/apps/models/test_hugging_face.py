from __future__ import annotations

import re
from contextlib import contextmanager
from functools import partial

import lightning
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from moe_plugin import LossFreeBalancing, balance_
from moe_plugin.apps.models import measure
from moe_plugin.apps.models.hugging_face import HostRouter, HuggingFaceModel, replace_routers_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Proportional
from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertShape, fused
from moe_plugin.losses import LoadBalancingLoss
from moe_plugin.routing import Router, Sigmoid
from tests.apps.models.test_configs import CONF, compose

pytest.importorskip("transformers")

FAMILIES = sorted(path.stem for path in (CONF / "model" / "hf").glob("*.yaml"))
LENGTH = 16

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
]


def build(family, router, experts="8", **changes):
    config = compose(f"hf/{family}", router, experts)
    config.model.config.update(hidden_size=32, num_hidden_layers=2)
    config.experts.hidden_dim = 16
    config.data.context_length = LENGTH
    config.update(changes)
    torch.manual_seed(0)
    return instantiate(config.model)


@contextmanager
def refused(message):
    """Expect a ConfigError, which Hydra hides in its own."""
    with pytest.raises(InstantiationException) as caught:
        yield
    assert isinstance(caught.value.__cause__, ConfigError)
    assert re.match(message, str(caught.value.__cause__))


def rows(size, seed=0):
    tokens = torch.randint(0, 256, (size, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return [{"tokens": row, "domain": torch.tensor(0)} for row in tokens]


def fit(model, folder, max_steps=2, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[LossFreeBalancing(Proportional(rate=0.1))],
        **quiet,
        **settings,
    )
    trainer.fit(model, DataLoader(rows(8), batch_size=4), DataLoader(rows(3, seed=1), batch_size=2))
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    @pytest.mark.parametrize("router", ["native", "qwen3"])
    def test_two_steps_train_and_balance_every_layer(self, family, router, tmp_path):
        model = build(family, router)
        replaced = [module for module in model.modules() if isinstance(module, HostRouter)]
        assert len(replaced) == (0 if router == "native" else 2)
        trainer = fit(model, tmp_path)
        balanced = find_balanced(model)
        assert [site.num_experts for site in balanced.values()] == [8, 8]
        assert [site.top_k for site in balanced.values()] == [2, 2]
        assert all(counts_E.sum() == 4 * LENGTH * 2 for counts_E in balanced.record.counts.values())
        assert all(site.bias.abs().max() > 0 for site in balanced.values())
        assert trainer.callback_metrics["train/loss"] < 8

    def test_native_router_selects_by_its_own_rule(self, family):
        model = build(family, "native")
        own = family == "deepseek_v3"
        assert all(site.host_owns_bias == own for site in balance_(model, rule=None).values())

    def test_size_is_counted_on_the_meta_device(self, family):
        with torch.device("meta"):
            size = measure(build(family, "qwen3"))
        numbers = {name: parameter.numel() for name, parameter in build(family, "qwen3").named_parameters()}
        assert size.total_parameters == sum(numbers.values())
        routed = sum(number for name, number in numbers.items() if ".experts." in name)
        assert size.total_parameters - size.active_parameters == routed * (8 - 2) / 8


class TestHuggingFaceModel:
    def test_validation_loss_is_the_mean_over_tokens(self, tmp_path):
        model = build("mixtral", "native")
        trainer = fit(model, tmp_path)
        tokens = torch.stack([row["tokens"] for row in rows(3, seed=1)])
        (metrics,) = trainer.validate(model, DataLoader(rows(3, seed=1), batch_size=2), verbose=False)
        with torch.no_grad():
            logits = model.eval()(tokens[:, :-1])
        expected = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert metrics["val/loss"] == pytest.approx(expected.item(), rel=1e-5)

    def test_chosen_router_replaces_score_and_top_k(self):
        routers = [m.router for m in build("gpt_oss", "switch").modules() if isinstance(m, HostRouter)]
        assert [router.top_k for router in routers] == [1, 1]
        assert all(type(router.score).__name__ == "SoftmaxBeforeTopK" for router in routers)

    def test_auxiliary_loss_of_a_chosen_router_reaches_it(self):
        model = build("olmoe", "qwen3")
        model.auxiliary_loss = LoadBalancingLoss(coefficient=0.1)
        batch = {"tokens": torch.stack([row["tokens"] for row in rows(2)])}
        _, auxiliary = model._losses(batch)
        auxiliary.backward()
        assert 0.2 <= auxiliary.item() < 0.1 * 8 * 2
        gradients = [m.router.weight.grad for m in model.modules() if isinstance(m, HostRouter)]
        assert all(gradient.abs().max() > 0 for gradient in gradients)

    @pytest.mark.parametrize("kind", ["LoadBalancingLoss", "SequenceLoss"])
    def test_auxiliary_loss_of_a_native_router_is_an_error_that_names_it(self, kind):
        loss = {"_target_": f"moe_plugin.losses.{kind}", "coefficient": 0.1}
        message = f"'balancing.auxiliary_loss' must be null with router=native, got '{kind}'. Choose"
        with refused(message):
            build("mixtral", "native", balancing={"auxiliary_loss": loss})

    def test_shared_experts_where_there_are_none_are_an_error(self):
        message = r"'experts.num_shared' must be 0, the shared experts of this mixtral, got 1\. Set .*=0\."
        with refused(message):
            build("mixtral", "native", "64")

    def test_other_number_of_shared_experts_names_that_of_the_model(self):
        transformers = pytest.importorskip("transformers")
        message = (
            r"'experts.num_shared' must be 2, the shared experts of this deepseek_v3, got 1\. Set .*=2\."
        )
        with pytest.raises(ConfigError, match=message):
            HuggingFaceModel(
                config=transformers.DeepseekV3Config(n_shared_experts=2),
                context_length=LENGTH,
                router=None,
                experts=ExpertShape(num_experts=8, top_k=2, hidden_dim=16, num_shared=1),
            )

    def test_as_many_shared_experts_as_the_model_has_are_built(self):
        layer = build("deepseek_v3", "native", "64").network.model.model.layers[0].mlp
        assert layer.shared_experts.down_proj.in_features == 1 * 16

    def test_experts_that_the_host_has_not_are_an_error(self):
        message = "'router' must be one without zero experts for a model of transformers, got 'zero_experts'"
        with refused(message):
            build("mixtral", "zero_experts")

    def test_router_of_a_model_without_one_is_an_error(self):
        message = "'router' must be native for Linear, which has no router to replace, got 'Router'"
        with pytest.raises(ConfigError, match=message):
            replace_routers_(torch.nn.Linear(2, 2), partial(Router, score=Sigmoid()), ExpertShape(4, 2, 8))

    def test_top_p_holds_the_budget_of_a_host(self, tmp_path):
        model = build("mixtral", "top_p")
        fit(model, tmp_path, max_steps=2)
        record = find_balanced(model).record
        for name, counts_E in record.counts.items():
            assert 4 * LENGTH == record.tokens[name] <= counts_E.sum() < 8 * record.tokens[name]

    def test_native_router_of_our_own_model_is_an_error(self):
        message = r"'router' must be our own for this model, got 'native'\. Take sigmoid_top_k"
        with refused(message):
            instantiate(compose("tiny", "native").model)


class TestDifferentNumbersOfExperts:
    def test_fused_experts_compute_the_same_on_used_pairs_only(self, monkeypatch):
        pairs, run = [], fused.run_forward

        def counting(*inputs):
            pairs.append(len(inputs[4]))
            return run(*inputs)

        monkeypatch.setattr(fused, "run_forward", counting)
        results = []
        for experts in (None, "fused"):
            model = build("qwen3_moe", "top_p")
            balanced = balance_(model, experts=experts)
            tokens = rows(4)[0]["tokens"][None]
            loss = model.token_losses({"tokens": tokens}).mean()
            loss.backward()
            results.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
            used = [int(site.counts.sum()) for site in balanced.values()]
        assert pairs[-len(used) :] == used, "those before are of the proof at attaching"
        assert sum(used) < LENGTH * len(used) * 8, "some pairs must be left out for this to say anything"
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
