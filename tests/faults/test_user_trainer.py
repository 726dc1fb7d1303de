"""A user's own Trainer: every way to start processes, and every part of Lightning that trains or restores by itself."""

from __future__ import annotations

import traceback

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from moe_plugin import LoadMonitor, LossFreeBalancing, balance_, shard_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import PID, Sign
from tests.callbacks.test_loss_free import (
    RATE,
    Project,
    ValidatedProject,
    biases,
    loader,
    slow_biases,
    trainer,
)
from tests.callbacks.test_loss_free import pytestmark as quiet
from tests.hosts import OwningRouter

pytestmark = [
    *quiet,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no.*"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path.*"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler.*"),
    pytest.mark.filterwarnings("ignore:Using .DistributedSampler.*"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.*"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view tensor.*"),
]
RULE = PID(rate=RATE)  # remembers


def balancing(rule=RULE, **settings):
    return LossFreeBalancing(rule, **settings)


class Watch(pl.Callback):
    """The state of balancing at the end of training, in a file for each process."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(find_balanced(pl_module).state_dict(), self.folder / f"{trainer.global_rank}.pt")


def same(one, other):
    """Whether two states of balancing are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class Synced(Project):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)


class TestLaunchers:
    """The user's process holds a module that other processes train."""

    @pytest.mark.parametrize("strategy", ["ddp_notebook", "ddp_fork", "ddp_spawn"])
    def test_balanced_module_gets_its_biases_back(self, strategy, tmp_path, figure):
        module = Project(lr=0.1)
        balanced = balance_(module, RULE)
        run = trainer(
            balancing(), tmp_path, strategy=strategy, devices=2, callbacks=[Watch(tmp_path), LoadMonitor()]
        )
        run.fit(module, loader(8))
        states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
        assert balanced.step == 4
        assert all(same(balanced.state_dict(), state) for state in states)
        run.save_checkpoint(tmp_path / "parent.ckpt")
        other = Project()
        balance_(other, RULE).load(tmp_path / "parent.ckpt")
        assert same(find_balanced(other).state_dict(), states[0])
        assert "moe_plugin" not in module.state_dict()
        figure(f"{strategy}: biases, memories and step come back, and are in a checkpoint saved then")

    @pytest.mark.parametrize("strategy", ["ddp_notebook", "ddp_fork"])
    def test_module_that_is_not_balanced_is_refused_by_name(self, strategy, tmp_path, figure):
        run = trainer(balancing(), tmp_path, strategy=strategy, devices=2)
        with pytest.raises(
            Exception, match="'strategy' must not fork or spawn its processes while the module is not"
        ):
            run.fit(Project(), loader(8))
        figure(f"{strategy}, module not balanced: refused by name before the first step")

    def test_module_that_owns_its_biases_needs_no_balancing_before(self, tmp_path):
        module = Project(OwningRouter)
        run = trainer(balancing(), tmp_path, strategy="ddp_fork", devices=2, callbacks=[Watch(tmp_path)])
        run.fit(module, loader(8))
        state = torch.load(tmp_path / "0.pt", weights_only=True)["sites"]["model.layers.0.router"]
        assert torch.equal(module.model.layers[0].router.e_score_correction_bias, state["bias"])

    def test_validation_afterwards_selects_by_them(self, tmp_path):
        module = Synced()
        balance_(module, RULE)
        run = trainer(balancing(), tmp_path, strategy="ddp_fork", devices=2)
        run.fit(module, loader(8), loader(2))
        (forked,) = run.validate(module, loader(2), verbose=False)
        (alone,) = trainer(balancing(), tmp_path).validate(module, loader(2), verbose=False)
        assert forked["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)


class Sharded(Project):
    def configure_model(self):
        if self.device_mesh is not None and not hasattr(self, "is_sharded"):
            self.is_sharded = True
            shard_(self.model, self.device_mesh)


STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo", start_method="popen"),
    "fsdp2": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    ),
    "fsdp2, sharded": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}


def fit_on_ranks(rank, results, folder, kind, settings, resume, epochs):
    try:
        module = (Project if kind == "ddp" else Sharded)(lr=0.1, optimizer=torch.optim.Adam)
        run = trainer(
            balancing(**settings),
            folder,
            strategy=STRATEGIES[kind](),
            devices=2,
            max_epochs=epochs,
            use_distributed_sampler=False,
        )
        x = torch.cat([part.chunk(2)[rank] for part in loader(4, 4)])
        run.fit(module, DataLoader(x, batch_size=2), ckpt_path=resume)
        run.save_checkpoint(f"{folder}/{epochs}.ckpt")
        results[rank] = (find_balanced(module).step, biases(module))
    except BaseException:
        results[rank] = traceback.format_exc()
        raise


@pytest.mark.parametrize("kind", STRATEGIES)
class TestBiasInStateDict:
    def test_older_checkpoint_continues_and_a_new_one_holds_the_bias(self, kind, tmp_path, on_ranks, figure):
        with_key, resume = {"bias_in_state_dict": True}, None
        for epochs, settings in enumerate(({}, with_key, with_key), start=1):
            results = on_ranks(2, fit_on_ranks, str(tmp_path), kind, settings, resume, epochs)
            assert results[0] == results[1]
            assert results[0][0] == 4 * epochs
            resume = f"{tmp_path}/{epochs}.ckpt"
        if kind != "fsdp2, sharded":
            saved = torch.load(resume, weights_only=True)["state_dict"]
            assert saved["model.layers.0.router.moe_plugin_bias"].tolist() == results[0][1][0]
        figure(f"bias_in_state_dict under {kind}: older and new checkpoints continue on both ranks")


class Tuned(ValidatedProject):
    def __init__(self):
        super().__init__(lr=0.1)
        self.learning_rate = 0.1


class Texts(pl.LightningDataModule):
    batch_size = 2

    def train_dataloader(self):
        return loader(8, self.batch_size)

    def val_dataloader(self):
        return loader(2, self.batch_size)


class Begin(pl.Callback):
    """The state of balancing and the counts when training begins; runs after the tuner."""

    def on_train_start(self, trainer, pl_module):
        balanced = find_balanced(pl_module)
        self.state = balanced.state_dict()
        self.counts = [int(site.counts.sum()) for site in balanced.values()]


class EveryEpoch(LearningRateFinder):
    """As the documentation of `LearningRateFinder` shows it."""

    def on_fit_start(self, *_):
        return

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            before = find_balanced(pl_module).state_dict()
            self.lr_find(trainer, pl_module)
            balanced = find_balanced(pl_module)
            self.is_restored = same(before, balanced.state_dict())
            self.counts = [int(site.counts.sum()) for site in balanced.values()]


class TestTuners:
    """Tuners train for some steps and put the weights back."""

    @pytest.mark.parametrize(
        "tuner",
        [LearningRateFinder(num_training_steps=6), BatchSizeFinder(max_trials=2, steps_per_trial=2)],
        ids=["LearningRateFinder", "BatchSizeFinder"],
    )
    @pytest.mark.parametrize("bias", [0.0, 1.0])
    def test_biases_and_counts_are_as_before(self, tuner, bias, tmp_path):
        module, begin = Tuned(), Begin()
        balanced = balance_(module, RULE)
        for site in balanced.values():
            site.bias[0] = bias
        before = balanced.state_dict()
        run = trainer(balancing(), tmp_path, callbacks=[tuner, begin], max_steps=3, max_epochs=-1)
        run.fit(module, datamodule=Texts())
        assert same(begin.state, before)
        assert begin.counts == [0, 0]
        assert balanced.step == 3

    def test_tuner_between_epochs_leaves_no_trace(self, tmp_path):
        module, tuner = Tuned(), EveryEpoch(num_training_steps=4, update_attr=False)
        run = trainer(balancing(), tmp_path, callbacks=[tuner], max_epochs=2)
        run.fit(module, datamodule=Texts())
        assert tuner.is_restored
        assert tuner.counts == [0, 0]
        assert find_balanced(module).step == 16


class Boom(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("boom")


class Keeping(OnExceptionCheckpoint):
    def teardown(self, *_, **__):
        return


class TestOtherParts:
    def test_accumulation_by_schedule_updates_once_per_step(self, tmp_path):
        module = Project()
        schedule = GradientAccumulationScheduler({0: 1, 1: 4})
        trainer(balancing(Sign(rate=RATE)), tmp_path, callbacks=[schedule], max_epochs=2).fit(
            module, loader()
        )
        batches = list(loader())
        assert biases(module) == slow_biases(Project, [*([x] for x in batches), batches])

    @pytest.mark.parametrize("settings", [{"overfit_batches": 2}, {"limit_train_batches": 2}], ids=str)
    def test_fewer_batches_are_fewer_updates(self, settings, tmp_path):
        module = Project()
        trainer(balancing(Sign(rate=RATE)), tmp_path, **settings).fit(module, loader())
        assert biases(module) == slow_biases(Project, [[x] for x in list(loader())[:2]])

    def test_barebones_trainer_balances(self):
        module = Project()
        run = pl.Trainer(
            barebones=True, max_epochs=1, accelerator="cpu", callbacks=[balancing(Sign(rate=RATE))]
        )
        run.fit(module, loader())
        assert biases(module) == slow_biases(Project, [[x] for x in loader()])

    @pytest.mark.parametrize("order", ["before", "after"])
    def test_stochastic_averaging_leaves_the_bias_of_the_last_step(self, order, tmp_path):
        module, plain = Project(), Project()
        average, ours = StochasticWeightAveraging(0.1, swa_epoch_start=1), balancing(Sign(rate=RATE))
        callbacks = [ours, average] if order == "before" else [average, ours]
        trainer(None, tmp_path, callbacks=callbacks).fit(module, loader())
        trainer(balancing(Sign(rate=RATE)), tmp_path).fit(plain, loader())
        assert biases(module) == biases(plain)

    def test_checkpoint_on_exception_continues_exactly(self, tmp_path):
        module, resumed, straight = Project(lr=0.1), Project(lr=0.1), Project(lr=0.1)
        callbacks = [Boom(), Keeping(tmp_path)]
        run = trainer(balancing(), tmp_path, callbacks=callbacks, enable_checkpointing=True)
        with pytest.raises(RuntimeError, match="boom"):
            run.fit(module, loader(), ckpt_path=None)
        trainer(balancing(), tmp_path).fit(straight, loader())
        saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
        assert saved["callbacks"]["LossFreeBalancing"]["step"] == 3
        balance_(resumed, RULE).load(tmp_path / "on_exception.ckpt")
        assert biases(resumed) == biases(module)

    def test_same_callback_trains_again_and_after_remove(self, tmp_path):
        module, callback = Project(), balancing(Sign(rate=RATE))
        trainer(callback, tmp_path).fit(module, loader())
        trainer(callback, tmp_path).fit(module, loader())
        assert biases(module) == slow_biases(Project, [[x] for x in loader()] * 2)
        find_balanced(module).remove()
        trainer(callback, tmp_path).fit(module, loader())
        assert biases(module) == slow_biases(Project, [[x] for x in loader()])

    def test_loading_that_is_not_strict_takes_the_biases(self, tmp_path):
        module, other = Project(), Project()
        run = trainer(balancing(Sign(rate=RATE), bias_in_state_dict=True), tmp_path)
        run.fit(module, loader())
        balance_(other)
        run.strategy._lightning_module = other
        run.strategy.load_model_state_dict({"state_dict": module.state_dict()}, strict=False)
        assert biases(other) == biases(module)
