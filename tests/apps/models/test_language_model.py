from __future__ import annotations

import warnings
from functools import partial

import lightning
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from moe_plugin.apps.models import AdamWWarmupCosine
from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertShape, SwiGLU
from moe_plugin.losses import LoadBalancingLoss
from moe_plugin.routing import Router, Sigmoid
from tests.apps.models.small_models import language_model, token_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    # Lightning 2.6 on torch 2.13.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def loader(batches):
    return DataLoader(batches, batch_size=None)


def trainer(**options) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


def token_mean(model, batches) -> torch.Tensor:
    """Cross-entropy summed over all tokens of all batches, over their number, in fp64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens in (batch["tokens"] for batch in batches):
        log_probabilities = functional.log_softmax(model(tokens[:, :-1]).double(), dim=-1)
        total -= log_probabilities.gather(-1, tokens[:, 1:, None]).sum()
        count += tokens[:, 1:].numel()
    return total / count


class TestValidation:
    @pytest.mark.parametrize("kind", ["val", "test"])
    def test_unequal_batches_give_the_exact_token_mean(self, kind):
        model, batches = language_model(), [token_batch(3), token_batch(1, 5), token_batch(7, 9)]
        run = trainer()
        evaluate = run.validate if kind == "val" else run.test
        metrics = evaluate(model, loader(batches), verbose=False)[0]
        assert metrics[f"{kind}/loss"] == pytest.approx(token_mean(model, batches).item(), rel=1e-6)

    def test_ranks_with_unequal_tokens_give_the_mean_over_all(self, on_ranks):
        results = on_ranks(2, _validate_on_rank)
        assert results[0]["logged"] == results[1]["logged"] == pytest.approx(results[0]["expected"], rel=1e-6)


def _validate_on_rank(rank, results):
    torch.manual_seed(0)
    model = language_model()
    batches = [[token_batch(3)], [token_batch(1, 5)]]
    strategy = lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo")
    environment = lightning.fabric.plugins.environments.TorchElasticEnvironment()
    run = trainer(strategy=strategy, devices=2, plugins=[environment], use_distributed_sampler=False)
    logged = run.validate(model, loader(batches[rank]), verbose=False)[0]["val/loss"]
    results[rank] = {"logged": logged, "expected": token_mean(model, batches[0] + batches[1]).item()}


class TestTraining:
    def test_repeated_batch_is_learned(self):
        torch.manual_seed(0)
        model = language_model(optimizer=AdamWWarmupCosine(learning_rate=1e-2, warmup_steps=5))
        batch = token_batch(4)
        before = token_mean(model, [batch])
        run = trainer(max_steps=40)
        run.fit(model, loader([batch] * 40))
        assert token_mean(model, [batch]) < 0.5 * before
        assert set(run.logged_metrics) == {"train/loss"}

    def test_loss_is_cross_entropy_plus_auxiliary(self):
        model, batch = language_model(auxiliary_loss=LoadBalancingLoss(0.5)), token_batch(4)
        model.trainer, logged = trainer(), {}
        model.log = lambda name, value, **_: logged.update({name: value})
        loss = model.training_step(batch, 0)
        torch.testing.assert_close(logged["train/loss"].double(), token_mean(model, [batch]))
        torch.testing.assert_close(loss, logged["train/loss"] + logged["train/auxiliary_loss"])
        expected = model.network(batch["tokens"][:, :-1], model.auxiliary_loss)[1]
        torch.testing.assert_close(logged["train/auxiliary_loss"], expected)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_low_precision_trains_with_fp32_bias(self, precision):
        model = language_model()
        trainer(max_steps=2, precision=precision).fit(model, loader([token_batch(2)] * 2))
        assert model.network.layers[0].feed_forward.router.expert_bias.dtype == torch.float32
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_schedule_reaches_the_floor_at_the_last_step(self):
        numbers = AdamWWarmupCosine(learning_rate=1.0, warmup_steps=2, floor=0.25)
        model, run = language_model(optimizer=numbers), trainer(max_steps=6)
        run.fit(model, loader([token_batch(1)] * 6))
        assert run.lr_scheduler_configs[0].scheduler.get_last_lr() == pytest.approx([0.25, 0.25])

    def test_gradient_scaler_turns_fused_off(self):
        model, run = language_model(), trainer(max_steps=2, max_epochs=-1)
        model.trainer = run
        assert model.configure_optimizers()["optimizer"].defaults["fused"] is True
        run.strategy.precision_plugin.scaler = object()
        assert model.configure_optimizers()["optimizer"].defaults["fused"] is False

    def test_endless_run_names_max_steps(self):
        message = r"'trainer\.max_steps' must be >= 1 in an endless run, .* uses it, got -1\."
        with pytest.raises(ConfigError, match=message):
            trainer(max_epochs=-1).fit(language_model(), loader([token_batch(1)]))


class TestConstructor:
    def test_top_k_of_the_router_takes_precedence(self):
        model = language_model(router=partial(Router, score=Sigmoid(), top_k=1))
        assert model.network.layers[0].feed_forward.router.top_k == 1

    def test_shared_experts_are_one_network_of_their_width(self):
        model = language_model(experts=ExpertShape(4, 2, 8, num_shared=3))
        shared = model.network.layers[0].feed_forward.shared
        assert isinstance(shared, SwiGLU)
        assert shared.down.in_features == 24

    @pytest.mark.parametrize(("given", "expected"), [(None, 24), (40, 40)])
    def test_dense_width_is_that_of_a_tokens_experts_by_default(self, given, expected):
        model = language_model(
            num_dense=1, dense_hidden_dim=given, experts=ExpertShape(4, 2, 8, num_shared=1)
        )
        assert model.network.layers[0].feed_forward.down.in_features == expected

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"vocab_size": 0}, "'vocab_size' must be an integer >= 1, got 0"),
            ({"context_length": 0}, "'context_length' must be an integer >= 1, got 0"),
            ({"dim": 0}, "'dim' must be an integer >= 1, got 0"),
            ({"num_layers": 0}, "'num_layers' must be an integer >= 1, got 0"),
            ({"dense_hidden_dim": 0}, "'dense_hidden_dim' must be an integer >= 1, got 0"),
            ({"moe_every": 0}, "'moe_every' must be an integer >= 1, got 0"),
            ({"num_dense": -1}, "'num_dense' must be an integer >= 0, got -1"),
            ({"num_dense": 3}, r"'num_dense' must be <= num_layers \(2\), got 3"),
            ({"activation_checkpointing": "yes"}, "'activation_checkpointing' must be null, .*, got 'yes'"),
        ],
    )
    def test_bad_value_is_named(self, change, message):
        with pytest.raises(ConfigError, match=message):
            language_model(**change)

    def test_sequence_beyond_context_is_refused(self):
        with pytest.raises(ConfigError, match=r"context_length \+ 1 \(13\) columns, got 14"):
            language_model()._losses(token_batch(1, 13))
