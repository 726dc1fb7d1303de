from __future__ import annotations

import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from moe_plugin import LoadMonitor, LossFreeBalancing
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Load, Sign
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.errors import AttachError, BalanceWarning, CheckpointError, ConfigError
from tests.hosts import Host, OwningRouter, SoftmaxRouter
from tests.stacked_hosts import StackedHost

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*"),
    pytest.mark.filterwarnings(
        "ignore:.*The number of training batches .* is smaller than the logging interval.*"
    ),
]
RATE = 0.125


class Project(pl.LightningModule):
    """A Lightning project that knows nothing of moe_plugin."""

    def __init__(self, router=SoftmaxRouter, num_experts=4, optimizer=torch.optim.SGD, lr=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.model = Host(router, num_experts=num_experts)
        self.optimizer, self.lr = optimizer, lr

    def loss(self, x):
        return self.model(x).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


class ValidatedProject(Project):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))


def loader(batches=4, batch_size=2):
    x = torch.randint(0, 32, (batches * batch_size, 6), generator=torch.Generator().manual_seed(1))
    return DataLoader(x, batch_size=batch_size)


def trainer(callback, tmp_path, **settings):
    callbacks = [*settings.pop("callbacks", []), callback] if callback else settings.pop("callbacks", [])
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return pl.Trainer(callbacks=callbacks, **(defaults | quiet | settings))


def fit(project, tmp_path, callback=None, data=None, **settings):
    callback = callback or LossFreeBalancing(Sign(rate=RATE))
    run = trainer(callback, tmp_path, **settings)
    run.fit(project, data or loader())
    return run


def biases(project):
    return [site.bias.tolist() for site in find_balanced(project).values()]


def slow_biases(project_type, steps):
    """The biases after the given steps, each a list of micro-batches, by a plain loop over the counts."""
    model = project_type().model
    routers = [layer.router for layer in model.layers]
    bias_LE = [torch.zeros(4) for _ in routers]
    for step in steps:
        counts_LE = [torch.zeros(4, dtype=torch.int64) for _ in routers]
        for x in step:
            hidden = model.embedding(x)
            for layer, (block, bias_E) in enumerate(zip(model.layers, bias_LE, strict=True)):
                scores_TE = (hidden.reshape(-1, 8) @ block.router.weight.T).softmax(-1)
                ids_TK = (scores_TE + bias_E).topk(2).indices
                counts_LE[layer] += torch.bincount(ids_TK.flatten(), minlength=4)
                weights_TK = scores_TE.gather(1, ids_TK)
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
                out = torch.stack([expert(hidden.reshape(-1, 8)) for expert in block.experts], 1)
                gates_TE = torch.zeros(len(ids_TK), 4).scatter(1, ids_TK, weights_TK)
                hidden = hidden + (gates_TE[..., None] * out).sum(1).view_as(hidden)
        for bias_E, counts_E in zip(bias_LE, counts_LE, strict=True):
            bias_E += Sign().step(Load(counts_E, bias_E), RATE, {})
    return [bias_E.tolist() for bias_E in bias_LE]


class Ledger(pl.Callback):
    """Adds up in fp64 what a rule without memory does with the counts of each step."""

    def __init__(self, rule, rate):
        self.rule, self.rate, self.biases = rule, rate, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, counts_E in find_balanced(pl_module).record.counts.items():
            before_E = self.biases.get(name, torch.zeros(len(counts_E), dtype=torch.float64))
            self.biases[name] = before_E + self.rule.step(Load(counts_E, before_E), self.rate, {})


class ManualProject(Project):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        if batch_idx % 2 == 1:
            self.optimizers().step()
            self.optimizers().zero_grad()


class TwoOptimizers(ManualProject):
    def configure_optimizers(self):
        routers = [p for name, p in self.named_parameters() if "router" in name]
        others = [p for name, p in self.named_parameters() if "router" not in name]
        return [torch.optim.SGD(others, lr=0.0), torch.optim.SGD(routers, lr=0.0)]

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


class LateProject(Project):
    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            torch.manual_seed(0)
            self.model = Host()


class CheckpointedProject(Project):
    reentrant = True

    def loss(self, x):
        hidden = self.model.embedding(x)
        for layer in self.model.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=self.reentrant)
        return self.model.head(hidden).square().mean()


class NonReentrantProject(CheckpointedProject):
    reentrant = False


class TestUpdates:
    @pytest.mark.parametrize(
        "project", [Project, CheckpointedProject, NonReentrantProject, TwoOptimizers, LateProject]
    )
    def test_each_step_updates_once(self, project, tmp_path):
        module = project()
        fit(module, tmp_path)
        assert biases(module) == slow_biases(Project, [[x] for x in loader()])

    @pytest.mark.parametrize("accumulate", [2, 3, 4])
    def test_accumulation_updates_once_per_window(self, accumulate, tmp_path):
        module = Project()
        fit(module, tmp_path, accumulate_grad_batches=accumulate)
        batches = list(loader())
        steps = [batches[start : start + accumulate] for start in range(0, 4, accumulate)]
        assert biases(module) == slow_biases(Project, steps)

    def test_manual_optimization_updates_with_its_steps(self, tmp_path):
        module = ManualProject()
        fit(module, tmp_path)
        batches = list(loader())
        assert biases(module) == slow_biases(Project, [batches[:2], batches[2:]])

    def test_clipping_changes_nothing(self, tmp_path):
        module = Project()
        fit(module, tmp_path, gradient_clip_val=0.1)
        assert biases(module) == slow_biases(Project, [[x] for x in loader()])

    def test_lbfgs_updates_once_per_step(self, tmp_path):
        module = Project(optimizer=torch.optim.LBFGS)
        fit(module, tmp_path)
        assert find_balanced(module).step == 4

    def test_validation_in_mid_epoch_changes_nothing(self, tmp_path):
        module = ValidatedProject()
        run = trainer(LossFreeBalancing(Sign(rate=RATE)), tmp_path, val_check_interval=2)
        run.fit(module, loader(), loader(3))
        assert biases(module) == slow_biases(Project, [[x] for x in loader()])

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
    @pytest.mark.parametrize("router", [SoftmaxRouter, OwningRouter])
    def test_any_precision_keeps_an_fp32_bias(self, precision, router, tmp_path):
        module, ledger = Project(router), Ledger(Sign(), 1e-4)
        callback = LossFreeBalancing(Sign(rate=1e-4))
        run = trainer(None, tmp_path, precision=precision, callbacks=[callback, ledger])
        run.fit(module, loader())
        balanced = find_balanced(module)
        assert balanced.step == 4
        for name, site in balanced.items():
            assert site.bias.dtype == torch.float32
            torch.testing.assert_close(site.bias.double(), ledger.biases[name], rtol=1e-6, atol=1e-10)

    def test_schedule_freezes_the_bias(self, tmp_path):
        module = Project()
        callback = LossFreeBalancing(Sign(rate=RATE), schedule=RateSchedule(freeze_after=2))
        fit(module, tmp_path, callback)
        assert biases(module) == slow_biases(Project, [[x] for x in list(loader())[:2]])


class StackedProject(Project):
    def __init__(self):
        super().__init__(lr=0.1)
        torch.manual_seed(0)
        self.model = StackedHost()


class TestFusedExperts:
    def test_they_train_as_the_model_s_own_and_their_checkpoint_fits_it(self, tmp_path):
        weights = {}
        for experts in (None, "fused"):
            project = StackedProject()
            run = fit(project, tmp_path, LossFreeBalancing(Sign(rate=RATE), experts=experts))
            assert len(find_balanced(project).fused) == (2 if experts else 0)
            weights[experts] = project.state_dict()
        torch.testing.assert_close(weights["fused"], weights[None], atol=1e-5, rtol=1e-4)
        run.save_checkpoint(tmp_path / "fused.ckpt")
        resumed = StackedProject()
        callback = LossFreeBalancing(Sign(rate=RATE))
        trainer(callback, tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "fused.ckpt")
        assert biases(resumed) == biases(project)

    def test_model_that_cannot_have_them_fails_before_training(self, tmp_path):
        with pytest.raises(AttachError, match="experts='fused' must be able to replace"):
            fit(Project(), tmp_path, LossFreeBalancing(experts="fused"))


class SkippingProject(Project):
    """Every second gradient overflows, or every second loss is NaN."""

    bad = torch.inf

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if batch_idx % 2 == 0:
            return loss
        if self.bad is torch.inf:
            loss.register_hook(lambda grad: grad * torch.inf)
            return loss
        return loss * torch.nan


class NanProject(SkippingProject):
    bad = torch.nan


class TestSkippedSteps:
    def test_step_skipped_by_the_gradient_scaler_moves_nothing(self, tmp_path):
        module = SkippingProject()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        fit(module, tmp_path, plugins=[plugin])
        assert find_balanced(module).step == 2
        unskipped = Project()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        good = DataLoader(torch.cat(list(loader())[::2]), batch_size=2)
        fit(unskipped, tmp_path, data=good, plugins=[plugin])
        assert biases(module) == biases(unskipped)

    def test_nan_loss_moves_nothing_nor_does_the_ruined_model(self, tmp_path):
        module = NanProject()
        fit(module, tmp_path)
        assert biases(module) == slow_biases(Project, [[next(iter(loader()))]])


class TestCheckpoints:
    @pytest.mark.parametrize("router", [SoftmaxRouter, OwningRouter])
    def test_resume_continues_the_bias_exactly(self, router, tmp_path):
        straight = Project(router, optimizer=torch.optim.Adam, lr=0.01)
        fit(straight, tmp_path, max_epochs=2)
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="half")
        half = Project(router, optimizer=torch.optim.Adam, lr=0.01)
        fit(half, tmp_path, callbacks=[saver], enable_checkpointing=True)
        resumed = Project(router, optimizer=torch.optim.Adam, lr=0.01)
        run = trainer(LossFreeBalancing(Sign(rate=RATE)), tmp_path, max_epochs=2)
        run.fit(resumed, loader(), ckpt_path=str(tmp_path / "half.ckpt"))
        assert biases(resumed) == biases(straight)
        assert find_balanced(resumed).step == 8
        for (name, value), other in zip(
            resumed.state_dict().items(), straight.state_dict().values(), strict=True
        ):
            assert torch.equal(value, other), name

    def test_checkpoint_holds_the_bias_after_its_step(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="end")
        module = Project(OwningRouter)
        fit(module, tmp_path, callbacks=[saver], enable_checkpointing=True)
        saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
        assert saved["model.layers.0.router.e_score_correction_bias"].tolist() == biases(module)[0]

    def test_validate_from_a_checkpoint_uses_its_bias(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="end")
        module = ValidatedProject()
        run = trainer(
            LossFreeBalancing(Sign(rate=RATE)), tmp_path, callbacks=[saver], enable_checkpointing=True
        )
        run.fit(module, loader(), loader())
        expected = run.validate(module, loader(), verbose=False)
        other = trainer(LossFreeBalancing(Sign(rate=RATE)), tmp_path)
        assert (
            other.validate(ValidatedProject(), loader(), ckpt_path=str(tmp_path / "end.ckpt"), verbose=False)
            == expected
        )

    def test_evaluation_without_any_bias_warns(self, tmp_path):
        module = ValidatedProject()
        with pytest.warns(
            BalanceWarning, match="All biases are 0: they were neither trained nor loaded here"
        ):
            trainer(LossFreeBalancing(), tmp_path).validate(module, loader(1), verbose=False)
        next(iter(find_balanced(module).values())).bias[0] = 1
        trainer(LossFreeBalancing(), tmp_path).validate(module, loader(1), verbose=False)

    def test_callbacks_can_be_pickled_for_spawned_processes(self):
        callback = pickle.loads(pickle.dumps([LossFreeBalancing(Sign(rate=RATE)), LoadMonitor()]))[0]
        assert callback._settings == LossFreeBalancing(Sign(rate=RATE))._settings

    def test_other_number_of_experts_is_an_error(self, tmp_path):
        callback = LossFreeBalancing()
        callback.setup(trainer(callback, tmp_path), Project(num_experts=8), "fit")
        other = LossFreeBalancing()
        other.setup(trainer(other, tmp_path), Project(), "fit")
        with pytest.raises(CheckpointError, match="4 experts in the checkpoint, 8 in the model"):
            callback.load_state_dict(other.state_dict())


class TestRefusals:
    def test_model_without_routers_is_an_error(self, tmp_path):
        class Plain(Project):
            def __init__(self):
                super().__init__()
                self.model = torch.nn.Linear(2, 2)

        with pytest.raises(AttachError, match="No router was found"):
            fit(Plain(), tmp_path)

    def test_two_balancers_are_an_error(self, tmp_path):
        with pytest.raises(
            RuntimeError, match="Found more than one stateful callback of type `LossFreeBalancing`"
        ):
            fit(Project(), tmp_path, callbacks=[LossFreeBalancing()])

    def test_no_rule_is_an_error(self):
        with pytest.raises(ConfigError, match=r"To only watch the load use LoadMonitor\(\)"):
            LossFreeBalancing(rule=None)


class TestTwoRanks:
    def test_ddp_equals_one_process(self, tmp_path, on_ranks):
        alone = Project()
        fit(alone, tmp_path, data=loader(4, 4))
        results = on_ranks(2, fit_rank, str(tmp_path))
        assert results[0] == results[1] == biases(alone)


def fit_rank(rank, results, tmp_path):
    from lightning.pytorch.strategies import DDPStrategy

    module = Project()
    run = trainer(
        LossFreeBalancing(Sign(rate=RATE)),
        tmp_path,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="popen"),
        devices=2,
        use_distributed_sampler=False,
    )
    x = torch.cat([part.chunk(2)[rank] for part in loader(4, 4)])
    run.fit(module, DataLoader(x, batch_size=2))
    results[rank] = biases(module)


class MuonProject(TwoOptimizers):
    """The routers' optimizer steps in every second batch, the other one in each."""

    routers_come = "last"

    def configure_optimizers(self):
        others, routers = super().configure_optimizers()
        return [others, routers] if self.routers_come == "last" else [routers, others]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        routers, others = (second, first) if self.routers_come == "last" else (first, second)
        loss = self.loss(batch)
        self.manual_backward(loss * self.factor(batch_idx))
        if batch_idx % 2 == 1 and self.routers_come == "first":
            routers.step()
        others.step()
        if batch_idx % 2 == 1 and self.routers_come == "last":
            routers.step()
        if batch_idx % 2 == 1:
            routers.zero_grad()
        others.zero_grad()

    def factor(self, batch_idx):
        return 1.0


class RoutersFirst(MuonProject):
    routers_come = "first"


class TestTwoOptimizers:
    """A step is one of the optimizer that holds the routers."""

    @pytest.mark.parametrize("project", [MuonProject, RoutersFirst])
    def test_batches_between_its_steps_are_counted(self, project, tmp_path):
        module = project()
        fit(module, tmp_path)
        batches = list(loader())
        assert biases(module) == slow_biases(Project, [batches[:2], batches[2:]])

    @pytest.mark.parametrize("project", [MuonProject, RoutersFirst])
    def test_its_step_skipped_by_the_scaler_discards(self, project, tmp_path, monkeypatch):
        monkeypatch.setattr(project, "factor", lambda self, batch_idx: 1.0 if batch_idx > 1 else 3e38)
        module = project()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        fit(module, tmp_path, plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
        assert find_balanced(module).step == 1
        unskipped = project()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        good = DataLoader(torch.cat(list(loader())[2:]), batch_size=2)
        monkeypatch.setattr(project, "factor", lambda self, batch_idx: 1.0)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        fit(unskipped, tmp_path, data=good, plugins=[plugin])
        assert biases(module) == biases(unskipped)
