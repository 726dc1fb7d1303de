"""Lightning's own loops over the stateful loader: resume in mid-epoch, accumulation, ranks."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment

from moe_plugin.apps.data import CorpusDataModule, Document
from moe_plugin.errors import ConfigError

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Texts:
    def __init__(self, first=0):
        self.first = first

    def fingerprint(self):
        return f"texts for resuming {self.first}"

    def documents(self):
        for i in range(self.first, self.first + 40):
            yield Document(f"{i}", "text", f"{i:04d}" * 30)


class Recorder(LightningModule):
    """Records the tokens it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_rows, self.val_rows = [], []

    def training_step(self, batch, batch_idx):
        self.train_rows.append([tuple(row) for row in batch["tokens"].tolist()])
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch, batch_idx):
        self.val_rows.append([tuple(row) for row in batch["tokens"].tolist()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


def corpus(cache, first=0):
    return CorpusDataModule(
        Texts(first),
        context_length=9,
        batch_size=32,
        val_batch_size=16,
        cache=str(cache),
        validation_fraction=0.2,
    )


def fit(cache, callbacks=(), ckpt_path=None, first=0, **settings):
    recorder = Recorder()
    ours = {"max_epochs": 3, "callbacks": list(callbacks), "default_root_dir": cache}
    trainer = Trainer(**{**QUIET, **ours, **settings})
    trainer.fit(recorder, datamodule=corpus(cache, first), ckpt_path=ckpt_path)
    return recorder


def flat(batches):
    return [row for batch in batches for row in batch]


def saver(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


class TestResume:
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_resume_from_any_step_goes_on_with_the_next_unseen_batch(self, tmp_path, accumulation):
        settings = {"accumulate_grad_batches": accumulation}
        whole = fit(tmp_path, [saver(tmp_path / "all")], **settings).train_rows
        steps = len(whole) // accumulation
        assert steps % 3 == 0
        assert steps > 6
        for step in range(1, steps):
            checkpoint = tmp_path / "all" / f"step={step}.ckpt"
            resumed = fit(tmp_path, ckpt_path=checkpoint, accumulate_grad_batches=accumulation)
            assert resumed.train_rows == whole[step * accumulation :], f"resumed at step {step} of {steps}"

    def test_run_stopped_in_mid_epoch_and_resumed_equals_the_uninterrupted(self, tmp_path):
        whole = fit(tmp_path, enable_checkpointing=False).train_rows
        first = fit(tmp_path, [saver(tmp_path / "stopped"), StopAt(4)])
        rest = fit(tmp_path, ckpt_path=tmp_path / "stopped" / "step=4.ckpt", enable_checkpointing=False)
        assert first.train_rows + rest.train_rows == whole

    def test_resume_after_validation_in_mid_epoch_goes_on(self, tmp_path):
        whole = fit(tmp_path, enable_checkpointing=False).train_rows
        save = ModelCheckpoint(tmp_path / "val", filename="{step}", save_top_k=-1)
        fit(tmp_path, [save], val_check_interval=2)
        for step in (2, 4):
            checkpoint = tmp_path / "val" / f"step={step}.ckpt"
            resumed = fit(tmp_path, ckpt_path=checkpoint, enable_checkpointing=False, val_check_interval=2)
            assert resumed.train_rows == whole[step:]

    def test_resume_with_other_accumulation_goes_on(self, tmp_path):
        whole = fit(tmp_path, [saver(tmp_path / "one")]).train_rows
        checkpoint = tmp_path / "one" / "step=2.ckpt"
        settings = {"enable_checkpointing": False, "accumulate_grad_batches": 2, "max_steps": 4}
        resumed = fit(tmp_path, ckpt_path=checkpoint, **settings).train_rows
        assert len(resumed) == 4
        assert flat(resumed) == flat(whole[2:4])

    def test_resume_with_other_text_is_refused_in_an_epoch_and_at_its_end(self, tmp_path):
        steps_of_an_epoch = len(fit(tmp_path, [saver(tmp_path / "all")], max_epochs=1).train_rows)
        for step in (1, steps_of_an_epoch):
            checkpoint = tmp_path / "all" / f"step={step}.ckpt"
            with pytest.raises(ConfigError, match="'data' must be the checkpoint's, which stopped"):
                fit(tmp_path, ckpt_path=checkpoint, first=1)

    def test_resume_from_a_cache_that_was_built_again_goes_on(self, tmp_path):
        whole = fit(tmp_path, [saver(tmp_path / "all")]).train_rows
        for path in tmp_path.glob("corpus-*"):
            path.write_bytes(path.read_bytes()[:-1])
        resumed = fit(tmp_path, ckpt_path=tmp_path / "all" / "step=2.ckpt", enable_checkpointing=False)
        assert resumed.train_rows == whole[2:]


class TestLoops:
    def test_epochs_cover_each_sequence_once_in_another_order(self, tmp_path):
        rows = fit(tmp_path, enable_checkpointing=False).train_rows
        per_epoch = len(rows) // 3
        epochs = [flat(rows[i * per_epoch : (i + 1) * per_epoch]) for i in range(3)]
        assert all(len(epoch) == 32 * per_epoch for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]

    def test_limited_epochs_start_at_the_front_of_their_order(self, tmp_path):
        whole = fit(tmp_path, enable_checkpointing=False).train_rows
        per_epoch = len(whole) // 3
        limited = fit(tmp_path, enable_checkpointing=False, limit_train_batches=2).train_rows
        assert limited == [whole[e * per_epoch + i] for e in range(3) for i in range(2)]

    def test_overfitting_repeats_the_same_batches(self, tmp_path):
        rows = fit(tmp_path, enable_checkpointing=False, overfit_batches=2).train_rows
        assert rows == rows[:2] * 3

    def test_accumulation_that_does_not_divide_is_refused_before_training(self, tmp_path):
        message = r"'batch_size' must be a multiple of .* \(1 x 3 = 3\), got 32\. Use 30 or 33\."
        with pytest.raises(ConfigError, match=message):
            fit(tmp_path, enable_checkpointing=False, accumulate_grad_batches=3)


def _as_rank(rank, port):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    return {
        "enable_checkpointing": False,
        "max_epochs": 1,
        "strategy": "ddp",
        "devices": 2,
        "plugins": [LightningEnvironment()],
    }


def _train(rank, port, cache, results):
    recorder = fit(cache, **_as_rank(rank, port))
    results.put((rank, recorder.train_rows, recorder.val_rows))


def _train_on_own_text(rank, port, cache, results):
    try:
        fit(cache, first=rank, **_as_rank(rank, port))
    except ConfigError as error:
        results.put(str(error))
        results.close()
        results.join_thread()
        os._exit(0)  # the other rank waits for this one


def in_two_ranks(target, cache):
    """Starts two ranks, and returns the queue they write into and the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=target, args=(rank, port, cache, results)) for rank in range(2)]
    for process in processes:
        process.start()
    return results, processes


class TestRanks:
    def test_two_ranks_see_the_slices_of_one_ranks_batches(self, tmp_path):
        alone = fit(tmp_path, enable_checkpointing=False, max_epochs=1)
        results, processes = in_two_ranks(_train, tmp_path)
        (_, *first), (_, *second) = sorted(results.get(timeout=60) for _ in processes)
        for process in processes:
            process.join()
        for own, ours, theirs in zip((alone.train_rows, alone.val_rows), first, second, strict=True):
            assert [a + b for a, b in zip(ours, theirs, strict=True)] == own

    def test_rank_with_other_text_is_refused(self, tmp_path):
        results, processes = in_two_ranks(_train_on_own_text, tmp_path)
        message = results.get(timeout=60)
        for process in processes:
            process.kill()
            process.join()
        assert message.startswith(
            "'data' must be the same text on all machines, but rank 1 has other than rank 0. Copy"
        )
