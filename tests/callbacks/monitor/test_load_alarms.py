from __future__ import annotations

import warnings

import lightning
import pytest
import torch
import torch.distributed as dist

from moe_plugin.attach.balance import balance_
from moe_plugin.balancing.rules import Sign
from moe_plugin.callbacks.load_monitor import LoadMonitor
from moe_plugin.callbacks.loss_free import LossFreeBalancing
from moe_plugin.callbacks.monitor.load_alarms import AlarmWatch
from moe_plugin.callbacks.monitor.router_sample import RouterSample
from moe_plugin.errors import ConfigError, LoadAlarmError, LoadAlarmWarning
from moe_plugin.metrics import max_violation
from moe_plugin.metrics.alarms import Limits
from tests.callbacks.test_load_monitor import SHORT, SIZES, fit, scalars
from tests.hosts import Host, OwningRouter, SoftmaxRouter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


class Bias(lightning.Callback):
    """Sets the bias of one router before each batch, as a broken program might."""

    def __init__(self, value):
        self.value = value

    def on_train_batch_start(self, trainer, pl_module, *_):
        pl_module.blocks[0].router.expert_bias.copy_(torch.tensor(self.value))


def collapsed():
    return Bias([9.0, 9.0, 0, 0, 0, 0, 0, 0])


class TestOnAlarm:
    def test_warning_says_what_where_and_what_helps_once(self, tmp_path):
        monitor = LoadMonitor()
        with pytest.warns(LoadAlarmWarning) as caught:
            fit(monitor, tmp_path, callbacks=(collapsed,), steps=20)
        texts = [str(warning.message) for warning in caught if warning.category is LoadAlarmWarning]
        assert len([text for text in texts if text.startswith("collapse at step 5: blocks.0.router: ")]) == 1
        assert any("LossFreeBalancing" in text for text in texts)
        assert [str(alarm) for alarm in monitor.alarms] == texts

    def test_raise_ends_the_run(self, tmp_path):
        with pytest.raises(LoadAlarmError, match=r"collapse at step 5: blocks\.0\.router"):
            fit(LoadMonitor(on_alarm="raise"), tmp_path, callbacks=(collapsed,))

    def test_function_gets_the_alarm(self, tmp_path):
        heard = []
        fit(LoadMonitor(on_alarm=heard.append), tmp_path, callbacks=(collapsed,))
        assert heard[0].kind == "collapse"
        assert heard[0].sites == ("blocks.0.router",)

    def test_none_looks_for_nothing(self, tmp_path):
        fit(LoadMonitor(on_alarm=None), tmp_path, callbacks=(collapsed,))

    def test_other_words_are_refused(self):
        with pytest.raises(ConfigError, match=r"'on_alarm' must be .* got 'shout'"):
            LoadMonitor(on_alarm="shout")  # pyright: ignore[reportArgumentType]

    def test_ordinary_run_is_quiet(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error", LoadAlarmWarning)
            fit(LoadMonitor(every_n_steps=2), tmp_path, steps=30)

    def test_rate_beyond_the_scores_swings(self, tmp_path):
        heard = []
        fit(
            LoadMonitor(every_n_steps=10, on_alarm=heard.append),
            tmp_path,
            steps=30,
            callbacks=(lambda: LossFreeBalancing(Sign(rate=0.4)),),
        )
        assert {"swinging bias", "saturated bias"} & {alarm.kind for alarm in heard}

    def test_dead_expert_is_named(self, tmp_path):
        heard = []
        monitor = LoadMonitor(on_alarm=heard.append, alarm_limits=Limits(dead_steps=10))
        fit(monitor, tmp_path, steps=15, callbacks=(lambda: Bias([-9.0, 0, 0, 0, 0, 0, 0, 0]),))
        (alarm,) = [alarm for alarm in heard if alarm.kind == "dead expert"]
        assert alarm.sites == ("blocks.0.router",)
        assert alarm.finding == "expert 0 got no token for 10 steps"

    def test_nan_scores_are_found(self, tmp_path):
        class Spoil(lightning.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.global_step == 9:
                    pl_module.blocks[1].router.weight.data.fill_(torch.nan)

        heard = []
        fit(
            LoadMonitor(on_alarm=heard.append),
            tmp_path,
            callbacks=(LossFreeBalancing, Spoil),
            num_sanity_val_steps=0,
        )
        (alarm,) = [alarm for alarm in heard if alarm.kind == "NaN scores"]
        assert alarm.sites == ("blocks.1.router",)


def diverge(rank, results):
    torch.manual_seed(0)
    model = Host(SoftmaxRouter)
    balanced = balance_(model, rule=None)
    model(torch.randint(0, 32, (4, 6))).sum().backward()
    balanced.update()
    if rank:
        balanced["layers.1.router"].bias[2] += 1e-7
    heard = []
    watch = AlarmWatch(heard.append, Limits())
    from moe_plugin.metrics import layer_loads

    loads = layer_loads(balanced.record.counts)
    watch.window_ends(balanced, loads, dict.fromkeys(loads, 0.0), {}, is_first_rank=dist.get_rank() == 0)
    results[rank] = [(alarm.kind, alarm.sites) for alarm in watch.alarms], len(heard)


class TestRanks:
    def test_bias_that_differs_by_one_bit_is_found_on_every_rank(self, on_ranks):
        results = on_ranks(2, diverge)
        for rank in (0, 1):
            alarms, heard = results[rank]
            assert ("diverging ranks", ("layers.1.router",)) in alarms
            assert bool(heard) == (rank == 0)


class TestRouterSample:
    @pytest.mark.parametrize("router", [SoftmaxRouter, OwningRouter])
    def test_sees_the_unbiased_scores_of_real_tokens(self, router):
        torch.manual_seed(0)
        model = Host(router)
        balanced = balance_(model)
        tokens_BS, mask_BS = torch.randint(0, 32, (3, 5)), torch.ones(3, 5, dtype=torch.long)
        mask_BS[:, 3:] = 0
        for site in balanced.values():
            site.bias.copy_(torch.tensor([50.0, 50.0, 0.0, 0.0]))
        sample = RouterSample()
        sample.start_(balanced)
        model(tokens_BS, attention_mask=mask_BS)
        sample.stop_(balanced)
        model(tokens_BS, attention_mask=mask_BS)
        seen = sample.take()
        assert sample.take() == {}
        x_TD = model.embedding(tokens_BS[:, :3]).flatten(0, 1)
        logits_TE = x_TD @ model.layers[0].router.weight.T
        scores_TE = logits_TE.softmax(-1) if router is SoftmaxRouter else logits_TE.sigmoid()
        first = seen["layers.0.router"]
        width = (scores_TE.amax(-1) - scores_TE.amin(-1)).mean().item()
        chosen = scores_TE.topk(2).indices
        assert first.score_range == pytest.approx(width, rel=1e-4)
        assert first.flip_rate == pytest.approx((chosen >= 2).float().mean().item())
        assert first.are_finite

    def test_counts_are_the_same_while_it_looks(self, tmp_path):
        plain = LoadMonitor(every_n_steps=6)
        looked_at, _ = fit(LoadMonitor(every_n_steps=1), tmp_path / "looked", steps=6)
        model, _ = fit(plain, tmp_path / "plain", steps=6)
        chosen = model.chosen["train"]
        for name in SIZES:
            assert [batch[name].tolist() for batch in looked_at.chosen["train"]] == [
                batch[name].tolist() for batch in chosen
            ]
            by_step = scalars(tmp_path / "looked", f"load_layers/max_violation/{SHORT[name]}")
            expected = {step: max_violation(batch[name]).item() for step, batch in enumerate(chosen)}
            assert by_step == pytest.approx(expected)
            summed_E = sum(batch[name] for batch in chosen)
            assert plain.training_load[name].tokens_per_expert == tuple(summed_E.tolist())
