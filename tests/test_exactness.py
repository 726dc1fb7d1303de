"""The same training, bit for bit in what balancing does, however it is spread over processes and micro-batches."""

from __future__ import annotations

import lightning
import pytest
import torch
import torch.distributed as dist
from torch.distributed._composable.checkpoint_activation import checkpoint

from moe_plugin import LossFreeBalancing, Sign
from moe_plugin.apps.models import AdamWWarmupCosine
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.counts import EXTRA_SLOTS
from moe_plugin.sharding import find_layers, shard_
from tests.apps.models.small_models import VOCAB_SIZE, language_model
from tests.hosts import Host
from tests.sharding.ranks import loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    # The routers are looked for with inputs that need no gradient.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
STEPS = 50
PACKED = 2 * (4 + EXTRA_SLOTS)
"""Numbers that the two layers of four experts share in one collective."""


class Diary(lightning.Callback):
    """Writes down counts and biases after each update, and every micro-batch's loss."""

    def __init__(self):
        self.steps, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        balanced = find_balanced(pl_module)
        if balanced.step > len(self.steps):
            record = balanced.record
            counts = [count.tolist() for count in record.counts.values()]
            self.steps.append((counts, [bias.tolist() for bias in record.bias.values()]))

    def losses_of_steps(self):
        return torch.tensor(self.losses).view(len(self.steps), -1).mean(1)


def fit(module, batches, kind="single", rank=0, accumulation=1, **settings):
    diary = Diary()
    run = trainer(
        kind,
        max_epochs=1,
        accumulate_grad_batches=accumulation,
        callbacks=[LossFreeBalancing(Sign(rate=0.01)), diary],
        **settings,
    )
    run.fit(module, loader(batches, rank, run.world_size, accumulation))
    return diary


class Micro(lightning.LightningModule):
    """The reference model on batches of bare tokens; checkpointed in one of the ways there are."""

    def __init__(self, checkpointing=None):
        super().__init__()
        torch.manual_seed(0)
        by_hand = checkpointing if checkpointing != "composable" else None
        numbers = AdamWWarmupCosine(learning_rate=3e-3, warmup_steps=5)
        self.model = language_model(activation_checkpointing=by_hand, optimizer=numbers)
        if checkpointing == "composable":
            for layer in find_layers(self.model):
                checkpoint(layer)

    def configure_model(self):
        if self.device_mesh is not None:
            shard_(self.model.network, self.device_mesh)

    def training_step(self, batch, batch_idx):
        return self.model._losses({"tokens": batch})[0]

    def configure_optimizers(self):
        return self.model.optimizer.optimizer(self.parameters(), fused=False)


def token_batches(steps=STEPS, size=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB_SIZE, (size, 13), generator=generator) for _ in range(steps)]


def fit_rank(rank, results, kinds, checkpointing, accumulation):
    results[rank] = {}
    found = {}
    for kind in kinds:
        diary = fit(Micro(checkpointing), token_batches(), kind, rank, accumulation)
        found[kind] = (diary.steps, diary.losses_of_steps())
    results[rank] = found


class TestRanks:
    @pytest.mark.parametrize(
        ("checkpointing", "accumulation"),
        [(None, 1), (None, 2), ("non_reentrant", 1), pytest.param("composable", 1, marks=pytest.mark.slow)],
    )
    def test_two_ranks_count_and_balance_as_one_does(self, checkpointing, accumulation, on_ranks):
        alone = fit(Micro(), token_batches())
        assert len(alone.steps) == STEPS
        results = on_ranks(2, fit_rank, ("ddp", "fsdp"), checkpointing, accumulation)
        for kind in ("ddp", "fsdp"):
            for rank in (0, 1):
                assert results[rank][kind][0] == alone.steps
            losses = (results[0][kind][1] + results[1][kind][1]) / 2
            torch.testing.assert_close(losses, alone.losses_of_steps(), atol=1e-6, rtol=1e-6)


class TestOneProcess:
    @pytest.mark.parametrize("accumulation", [2, 4])
    def test_accumulation_changes_nothing(self, accumulation):
        self.assert_same(fit(Micro(), token_batches(), accumulation=accumulation))

    @pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant", "composable"])
    def test_checkpointing_changes_nothing(self, checkpointing):
        self.assert_same(fit(Micro(checkpointing), token_batches()))

    @staticmethod
    def assert_same(diary):
        plain = fit(Micro(), token_batches())
        assert diary.steps == plain.steps
        torch.testing.assert_close(diary.losses_of_steps(), plain.losses_of_steps(), atol=1e-6, rtol=1e-6)


class Padded(lightning.LightningModule):
    """A hand-written model on batches whose last column is the number of real tokens; it learns nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Host()

    def configure_model(self):
        if self.device_mesh is not None:
            shard_(self.model, self.device_mesh)

    def training_step(self, batch, batch_idx):
        tokens, lengths = batch[:, :-1], batch[:, -1:]
        mask = torch.arange(tokens.shape[1]) < lengths
        return self.model(tokens, attention_mask=mask).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def padded_batches(lengths, constant=False):
    """Two rows, the first of rank 0 and the second of rank 1, which may be one token over and over."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(8):
        tokens = torch.randint(0, 32, (2, 9), generator=generator)
        tokens[1] = 7 if constant else tokens[1]
        tokens[:, -1] = torch.tensor(lengths)
        batches.append(tokens)
    return batches


def fit_padded_rank(rank, results, cases):
    collectives, all_reduce = [], dist.all_reduce

    def counting(tensor, *arguments, **options):
        collectives.append((tensor.dtype, tensor.numel()))
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counting
    steps = [
        fit(Padded(), padded_batches(*case), kind, rank).steps for case in cases for kind in ("ddp", "fsdp")
    ]
    results[rank] = {"steps": steps, "collectives": collectives.count((torch.int64, PACKED))}


class TestUnequalRanks:
    def test_ranks_with_few_or_no_tokens_and_with_experts_that_none_reaches(self, on_ranks):
        cases = [((8, 3), False), ((8, 0), False), ((0, 8), False), ((8, 8), True)]
        results = on_ranks(2, fit_padded_rank, cases)
        for i, ((lengths, constant)) in enumerate(cases):
            alone = fit(Padded(), padded_batches(lengths, constant)).steps
            assert all(sum(counts) == 2 * sum(lengths) for step, _ in alone for counts in step)
            for rank in (0, 1):
                assert results[rank]["steps"][2 * i] == results[rank]["steps"][2 * i + 1] == alone
        runs_x_steps = 2 * len(cases) * 8
        assert results[0]["collectives"] == results[1]["collectives"] == runs_x_steps
