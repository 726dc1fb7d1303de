from __future__ import annotations

import json
from functools import partial

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from moe_plugin.apps.models import LanguageModel
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.callbacks.load_monitor import LoadMonitor
from moe_plugin.callbacks.monitor.load_tags import budget_scalars
from moe_plugin.experts import ExpertShape
from moe_plugin.metrics.experts_used import loss_bins
from moe_plugin.plots.experts_per_token import by_kind, distribution
from moe_plugin.plots.run_data import EXPERT_USE_FILE
from moe_plugin.plots.token_strip import draw_strips
from moe_plugin.routing import (
    DynamicRouter,
    Router,
    Sigmoid,
    SoftmaxBeforeTopK,
    Threshold,
    TopP,
    ZeroExpertCounts,
    ZeroExpertRouter,
)
from tests.callbacks.test_load_monitor import events, picture

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
]
ROUTERS = {
    "top_p": partial(DynamicRouter, score=SoftmaxBeforeTopK(), cut=TopP(), max_k=4),
    "threshold": partial(DynamicRouter, score=Sigmoid(), cut=Threshold(), max_k=4, min_k=0),
    "zero_experts": partial(
        ZeroExpertRouter, score=SoftmaxBeforeTopK(), max_k=4, zero_experts=ZeroExpertCounts(identity=3)
    ),
}
BATCHES, LENGTH = 3, 24


class Data(lightning.LightningDataModule):
    domains = ("even", "odd")
    token_bytes = tuple(bytes([65 + token % 26]) for token in range(32))

    @property
    def difficulty_names(self):
        return {"half": ("low", "high")}

    def difficulty(self, tokens_BS):
        return {"half": (tokens_BS >= 16).long()}

    def val_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        rows = [
            {"tokens": torch.randint(0, 32, (LENGTH + 1,), generator=generator), "domain": i % 2}
            for i in range(4 * BATCHES)
        ]
        return DataLoader(rows, batch_size=4)

    train_dataloader = val_dataloader


def fit(folder, router):
    torch.manual_seed(0)
    model = LanguageModel(
        vocab_size=32,
        context_length=LENGTH,
        dim=16,
        num_layers=2,
        num_heads=2,
        router=router,
        experts=ExpertShape(num_experts=6, top_k=2, hidden_dim=8),
    )
    monitor = LoadMonitor(every_n_steps=1)
    trainer = lightning.Trainer(
        max_steps=BATCHES,
        accelerator="cpu",
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=TensorBoardLogger(folder, name="", version=""),
    )
    trainer.fit(model, Data())
    return model, monitor


def slow_use(model):
    """What each token of the validation set uses by layer, and its domain, half and loss, by looking at the routers."""
    used, rows = {name: [] for name in find_balanced(model)}, []
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda router, args, routing, name=name: used[name].extend(routing.used_TK.sum(-1).tolist())
        )
        for name in used
    ]
    model.eval()
    with torch.no_grad():
        for batch in Data().val_dataloader():
            logits_BSV = model(batch["tokens"][:, :-1])
            for sequence, domain, logits_SV in zip(batch["tokens"], batch["domain"], logits_BSV, strict=True):
                for place in range(LENGTH):
                    chance = logits_SV[place].softmax(-1)[sequence[place + 1]]
                    rows.append((domain.item(), int(sequence[place] >= 16), -chance.log().item()))
    for hook in hooks:
        hook.remove()
    return used, rows


def spearman(*columns):
    ranks = [[np.mean(np.flatnonzero(np.sort(values) == value)) for value in values] for values in columns]
    return np.corrcoef(*ranks)[0, 1]


@pytest.mark.parametrize("name", ROUTERS)
class TestARun:
    def test_everything_equals_what_the_routers_did(self, tmp_path, name):
        model, _ = fit(tmp_path, ROUTERS[name])
        used, rows = slow_use(model)
        record = json.loads((tmp_path / EXPERT_USE_FILE).read_text())["experts_per_token"]
        assert record["layers"] == list(used)
        assert record["target"] == [2.0, 2.0]
        for layer, of_tokens in enumerate(used.values()):
            assert record["tokens"][layer] == [of_tokens.count(number) for number in range(5)]
            assert record["means"][layer] == pytest.approx(np.mean(of_tokens))
            for kind, column, names in (("domain", 0, ["even", "odd"]), ("half", 1, ["low", "high"])):
                table = record["by_kind"][kind]
                assert table["names"] == names
                means = [
                    np.mean([k for k, row in zip(of_tokens, rows, strict=True) if row[column] == group])
                    for group in (0, 1)
                ]
                assert table["means"][layer] == pytest.approx(means)
            expected = spearman(of_tokens, loss_bins(torch.tensor([row[2] for row in rows])).tolist())
            # A loss at the edge of a range may fall to either side of it.
            assert record["by_loss"]["correlation"][layer] == pytest.approx(expected, abs=0.005)
        mean = np.mean([np.mean(of_tokens) for of_tokens in used.values()])
        scalars = {tag: events(tmp_path).Scalars(tag)[-1].value for tag in events(tmp_path).Tags()["scalars"]}
        assert scalars["val/experts_per_token"] == pytest.approx(mean, rel=1e-5)

    def test_text_shows_the_first_sequence_of_each_domain(self, tmp_path, name):
        model, monitor = fit(tmp_path, ROUTERS[name])
        used, _ = slow_use(model)
        first = next(iter(Data().val_dataloader()))["tokens"]
        strips = monitor.validation.used.strips
        assert [strip.title for strip in strips] == ["even", "odd"]
        for row, strip in enumerate(strips):
            assert strip.pieces == [Data.token_bytes[token].decode() for token in first[row, :-1].tolist()]
            assert strip.used == [k[row * LENGTH : (row + 1) * LENGTH] for k in used.values()]
        pixels = picture(events(tmp_path), "experts_per_token/text").transpose(2, 0, 1)
        assert np.array_equal(pixels, draw_strips(strips))

    def test_budget_error_is_the_mean_over_the_target(self, tmp_path, name):
        fit(tmp_path, ROUTERS[name])
        read = events(tmp_path)
        used = [point.value for point in read.Scalars("load/experts_per_token")]
        assert len(used) == BATCHES
        errors = [point.value for point in read.Scalars("load/budget_error")]
        assert errors == pytest.approx([k / 2 - 1 for k in used], abs=1e-6)

    def test_pictures_show_what_the_routers_did(self, tmp_path, name):
        model, _ = fit(tmp_path, ROUTERS[name])
        pictures = {
            f"experts_per_token/{each}"
            for each in ("distribution", "by_domain", "by_half", "by_loss", "text")
        }
        read = events(tmp_path)
        assert pictures <= set(read.Tags()["images"])
        used, rows = slow_use(model)
        counts_LU = [[of_tokens.count(number) for number in range(5)] for of_tokens in used.values()]
        shown = picture(read, "experts_per_token/distribution").transpose(2, 0, 1)
        assert np.array_equal(shown, distribution(counts_LU))
        domains = np.array([domain for domain, *_ in rows])
        means_LG = [[np.array(each)[domains == domain].mean() for domain in (0, 1)] for each in used.values()]
        table = {"names": Data.domains, "means": means_LG}
        drawn = by_kind(table, [np.mean(each) for each in used.values()], "domain")
        assert np.array_equal(picture(read, "experts_per_token/by_domain").transpose(2, 0, 1), drawn)


class TestFixedNumber:
    def test_shows_nothing_of_it(self, tmp_path):
        fit(tmp_path, partial(Router, score=Sigmoid()))
        tags = events(tmp_path).Tags()
        assert not [
            tag for tag in tags["scalars"] + tags["images"] if "experts_per_token" in tag or "budget" in tag
        ]
        assert json.loads((tmp_path / EXPERT_USE_FILE).read_text())["experts_per_token"] is None


class TestBudget:
    def test_layers_without_a_target_are_left_out(self):
        scalars = budget_scalars({"a": 3.0, "b": 8.0}, {"a": 2.0})
        assert scalars == {
            "load/experts_per_token": 3.0,
            "load/budget_error": 0.5,
            "load_layers/experts_per_token/a": 3.0,
            "load_layers/budget_error/a": 0.5,
        }
        assert budget_scalars({"b": 8.0}, {}) == {}
