from __future__ import annotations

import shutil

import pytest
import torch

from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import AttachError, BalanceWarning, CheckpointError, ConfigError
from moe_plugin.metrics import max_violation
from tests.hosts import Host, OwningRouter, SoftmaxRouter
from tests.stacked_hosts import StackedHost

transformers = pytest.importorskip("transformers")
from moe_plugin.callbacks.hugging_face import (  # noqa: E402
    SIDECAR,
    LoadMonitorTrainerCallback,
    LossFreeTrainerCallback,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true.*")
RATE = 0.125


class Project(torch.nn.Module):
    """A model as the Trainer takes it: its forward returns the loss."""

    def __init__(self, router=SoftmaxRouter):
        super().__init__()
        self.model = Host(router)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.model(input_ids, attention_mask)
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def rows(size=48):
    tokens = torch.randint(0, 32, (size, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trained(folder, callback, model=None, resume=None, **settings):
    """The model after training it with the callback."""
    transformers.set_seed(0)
    model = model or Project()
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    settings = {"save_strategy": "no", "max_steps": 6, "per_device_train_batch_size": 4} | settings
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), learning_rate=0.01, **quiet, **settings
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return model


def biases(model):
    return [site.bias.tolist() for site in find_balanced(model).values()]


class TestLossFreeTrainerCallback:
    @pytest.mark.parametrize(("accumulated", "batch_size"), [(1, 4), (2, 2), (4, 1)])
    def test_accumulation_updates_once_per_optimizer_step(self, tmp_path, accumulated, batch_size):
        callback = LossFreeTrainerCallback(Sign(rate=RATE))
        sizes = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": batch_size}
        model = trained(tmp_path, callback, **sizes)
        assert callback.balanced.step == 6
        assert callback.balanced.record.counts["model.layers.0.router"].sum() == 4 * 6 * 2
        plain = trained(tmp_path, LossFreeTrainerCallback(Sign(rate=RATE)))
        assert biases(model) == biases(plain)

    @pytest.mark.parametrize("router", [SoftmaxRouter, OwningRouter])
    def test_resumed_run_ends_with_the_biases_of_an_uninterrupted_one(self, tmp_path, router):
        saving = {"save_strategy": "steps", "save_steps": 3}
        whole = trained(tmp_path, LossFreeTrainerCallback(Sign(rate=RATE)), Project(router), **saving)
        checkpoint = tmp_path / "checkpoint-3"
        assert (checkpoint / SIDECAR).exists()
        callback = LossFreeTrainerCallback(Sign(rate=RATE))
        resumed = trained(tmp_path, callback, Project(router), resume=str(checkpoint), **saving)
        assert callback.balanced.step == 6
        assert biases(resumed) == biases(whole)

    def test_checkpoint_elsewhere_is_named_by_the_user(self, tmp_path):
        trained(
            tmp_path / "run", LossFreeTrainerCallback(Sign(rate=RATE)), save_strategy="steps", save_steps=3
        )
        moved = shutil.move(tmp_path / "run" / "checkpoint-3", tmp_path / "kept")
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(
            CheckpointError, match=r"resumes at step 3 .* LossFreeTrainerCallback\(resume_from=...\)"
        ):
            trained(tmp_path / "run", LossFreeTrainerCallback(Sign(rate=RATE)), resume=moved)
        callback = LossFreeTrainerCallback(Sign(rate=RATE), resume_from=moved)
        trained(tmp_path / "run", callback, resume=moved)
        assert callback.balanced.step == 6

    def test_run_that_was_not_balanced_resumes_from_zero_biases(self, tmp_path):
        trained(tmp_path, transformers.TrainerCallback(), save_strategy="steps", save_steps=3)
        callback = LossFreeTrainerCallback(Sign(rate=RATE))
        with pytest.warns(BalanceWarning, match="checkpoint-3' has no biases, so the 2"):
            trained(tmp_path, callback, resume=str(tmp_path / "checkpoint-3"))
        assert callback.balanced.step == 3

    def test_step_that_the_scaler_skipped_moves_nothing(self, tmp_path):
        callback, model = LossFreeTrainerCallback(Sign(rate=RATE)), Project()
        callback.on_train_begin(None, transformers.TrainerState(), None, model=model)
        model(**{name: row.unsqueeze(0) for name, row in rows(1)[0].items()})["loss"].backward()
        skipped = type("Optimizer", (), {"step_was_skipped": True})()
        callback.on_optimizer_step(None, None, None, optimizer=skipped)
        assert callback.balanced.step == 0
        assert callback.balanced["model.layers.0.router"].counts.sum() == 0

    def test_without_rule_it_refers_to_the_monitor(self):
        with pytest.raises(ConfigError, match=r"'rule' .* use LoadMonitorTrainerCallback\(\)"):
            LossFreeTrainerCallback(rule=None)

    def test_model_without_router_is_an_error(self, tmp_path):
        model = Project()
        model.model = torch.nn.Linear(2, 2)
        with pytest.raises(AttachError, match="No router"):
            trained(tmp_path, LossFreeTrainerCallback(), model)

    def test_fused_experts_train_as_the_model_s_own(self, tmp_path):
        weights = {}
        for experts in (None, "fused"):
            model, callback = Project(), LossFreeTrainerCallback(Sign(rate=RATE), experts=experts)
            torch.manual_seed(0)
            model.model = StackedHost()
            trained(tmp_path, callback, model)
            assert len(callback.balanced.fused) == (2 if experts else 0)
            weights[experts] = model.state_dict()
        torch.testing.assert_close(weights["fused"], weights[None], atol=1e-4, rtol=1e-3)


class TestBestModel:
    @pytest.mark.parametrize("is_loaded", [True, False])
    def test_it_has_the_biases_of_its_checkpoint_if_its_weights_were_loaded(self, tmp_path, is_loaded):
        callback, model = LossFreeTrainerCallback(), Project()
        state = transformers.TrainerState(best_model_checkpoint=str(tmp_path))
        callback.on_train_begin(None, state, None, model=model)
        best = biases(model)
        callback.balanced.save(tmp_path / SIDECAR)
        for site in callback.balanced.values():
            site.bias.fill_(1)
        arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
        arguments.load_best_model_at_end = is_loaded
        callback.on_train_end(arguments, state, None, model=model)
        assert biases(model) == (best if is_loaded else [[1.0] * 4] * 2)


class Seen(transformers.TrainerCallback):
    """Keeps the counts of each step and what a callback of the Trainer's own list is given to write."""

    def __init__(self, callback):
        self.callback, self.counts, self.logs = callback, [], []

    def on_step_end(self, args, state, control, **kwargs):
        record = self.callback.balanced.record
        self.counts.append({name: counts.clone() for name, counts in record.counts.items()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def logged(folder, callback):
    """What a run logs in windows of 3 steps: the counts, the history, and what an earlier callback was given."""
    transformers.set_seed(0)
    model, seen = Project(), Seen(callback)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=3,
        save_strategy="no",
        max_steps=6,
        per_device_train_batch_size=4,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(), callbacks=[seen, callback])
    trainer.train()
    return model, seen, trainer.state.log_history


@pytest.mark.parametrize("kind", [LossFreeTrainerCallback, LoadMonitorTrainerCallback])
class TestLogs:
    def test_history_and_earlier_callbacks_get_the_load_of_each_window(self, tmp_path, kind):
        _, seen, history = logged(tmp_path, kind(detail="full"))
        assert [entry["step"] for entry in history] == [3, 6, 6]
        for window, (entry, given) in enumerate(zip(history[:2], seen.logs, strict=False)):
            steps = seen.counts[3 * window : 3 * window + 3]
            violations = [max_violation(sum(step[name] for step in steps)).item() for name in steps[0]]
            assert entry["load/max_violation_worst"] == pytest.approx(max(violations))
            assert entry["load/max_violation_global"] == pytest.approx(sum(violations) / 2)
            layers = [entry[f"load_layers/max_violation/layers.{layer}"] for layer in (0, 1)]
            assert layers == pytest.approx(violations)
            assert given == {name: value for name, value in entry.items() if name != "step"}
        assert not [name for name in history[2] if name.startswith("load")]

    def test_brief_has_no_scalar_of_a_layer(self, tmp_path, kind):
        _, _, history = logged(tmp_path, kind())
        names = [name for name in history[0] if name.startswith("load")]
        assert names
        assert not [name for name in names if name.startswith("load_layers")]


class TestLoadMonitorTrainerCallback:
    def test_it_changes_nothing(self, tmp_path):
        weights = {}
        for callback in (LoadMonitorTrainerCallback(), transformers.TrainerCallback()):
            weights[type(callback)] = trained(tmp_path, callback)
        watched, plain = weights.values()
        assert biases(watched) == [[0.0] * 4] * 2
        states = [{name: t for name, t in model.state_dict().items()} for model in (watched, plain)]
        torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)


class TestAuxLoss:
    def test_loss_of_a_trainer_is_switched_off_and_restored(self, tmp_path):
        class OwnLossTrainer(transformers.Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.router_aux_loss_coef, self.aux_loss_enabled = 0.25, True

        def run(aux_loss):
            callback = LossFreeTrainerCallback(aux_loss=aux_loss)
            arguments = transformers.TrainingArguments(
                output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=1
            )
            trainer = OwnLossTrainer(Project(), arguments, train_dataset=rows(8), callbacks=[callback])
            trainer.train()
            return trainer, callback

        with pytest.warns(BalanceWarning, match=r"OwnLossTrainer.router_aux_loss_coef=0.25"):
            assert run("warn")[0].router_aux_loss_coef == 0.25
        trainer, callback = run("off")
        assert trainer.router_aux_loss_coef == 0.0
        callback.balanced.remove()
        assert trainer.router_aux_loss_coef == 0.25
