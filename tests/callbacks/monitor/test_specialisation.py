from __future__ import annotations

from functools import partial

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from moe_plugin.attach.balance import balance_
from moe_plugin.callbacks.load_monitor import LoadMonitor
from moe_plugin.callbacks.monitor.image_log import log_image
from moe_plugin.callbacks.monitor.specialisation import Specialisation, _count_kinds, _kept
from moe_plugin.callbacks.monitor.token_kinds import NOTHING, TokenKinds
from moe_plugin.plots.grid import TOP
from moe_plugin.plots.lift import coactivation_heatmap, lift, lift_heatmap
from tests.callbacks.test_load_monitor import events, picture
from tests.hosts import Host

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
]


class Project(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Host()

    def training_step(self, batch, batch_idx):
        return self.model(batch["tokens"][:, :-1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.model(batch["tokens"][:, :-1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Data(lightning.LightningDataModule):
    domains = ("code", "prose")
    token_classes = (["low", "high"], (torch.arange(32) >= 16).long())

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        rows = [
            {"tokens": torch.randint(0, 32, (7,), generator=generator), "domain": i % 2} for i in range(16)
        ]
        return DataLoader(rows, batch_size=4)

    val_dataloader = train_dataloader


def fit(monitor, folder, data, **settings):
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": TensorBoardLogger(folder, name="", version="")} | settings,
    )
    model = Project()
    trainer.fit(model, data) if isinstance(data, Data) else trainer.fit(model, *data)
    return model


class TestInARun:
    def test_pictures_of_domains_classes_and_pairs_are_written(self, tmp_path):
        monitor = LoadMonitor()
        model = fit(monitor, tmp_path, Data())
        tags = events(tmp_path).Tags()
        wanted = {
            "experts_by_domain/lift",
            "experts_by_token_class/lift",
            "coactivation/layers.0",
        }
        assert wanted <= set(tags["images"])
        # Nothing was learnt between the two validations.
        assert [point.value for point in events(tmp_path).Scalars("val/kept_choices")] == [1.0]
        table = monitor.validation.specialisation.counts["domain"]["model.layers.0.router"]
        expected, pairs_EE = torch.zeros(2, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long)
        for batch in Data().val_dataloader():
            x_TD = model.model.embedding(batch["tokens"][:, :-1]).flatten(0, 1)
            ids_TK = (x_TD @ model.model.layers[0].router.weight.T).topk(2).indices
            for token, ids_K in enumerate(ids_TK):
                expected[batch["domain"][token // 6], ids_K] += 1
                pairs_EE[ids_K[0], ids_K[1]] += 1
        assert torch.equal(table, expected)
        drawn = coactivation_heatmap((pairs_EE + pairs_EE.T).numpy())
        shown = picture(events(tmp_path), "coactivation/layers.0").transpose(2, 0, 1)
        assert np.array_equal(shown[:, TOP:], drawn[:, TOP:])  # below the title
        tables = monitor.validation.specialisation.counts["domain"].values()
        drawn = lift_heatmap({f"layers.{i}": each.numpy() for i, each in enumerate(tables)}, Data.domains)
        shown = picture(events(tmp_path), "experts_by_domain/lift").transpose(2, 0, 1)
        assert np.array_equal(shown[:, TOP:], drawn[:, TOP:])

    def test_project_without_kinds_still_gets_pairs(self, tmp_path):
        data = Data().train_dataloader()
        fit(LoadMonitor(), tmp_path, (data, data))
        tags = events(tmp_path).Tags()["images"]
        assert "coactivation/layers.1" in tags
        assert not any(tag.startswith("experts_by") for tag in tags)

    def test_no_logger_looks_at_nothing(self, tmp_path):
        monitor = LoadMonitor()
        fit(monitor, tmp_path, Data(), logger=False)
        assert monitor.validation.specialisation.pairs == {}


class TestCounting:
    def test_unused_experts_are_left_out(self):
        kinds_T, ids_TK = torch.tensor([0, 1]), torch.tensor([[0, 1], [1, 0]])
        table = _count_kinds(kinds_T, ids_TK, 2, 2, torch.tensor([[True, False], [True, True]]))
        assert table.tolist() == [[1, 0], [1, 1]]

    def test_kinds_are_none_where_the_batch_is_a_tensor(self):
        assert TokenKinds(Data()).of(torch.zeros(2, 3)) == NOTHING

    def test_choices_that_are_not_used_are_neither_kept_nor_lost(self):
        now_TK, before_TK = torch.tensor([[0, -1], [2, 1]]), torch.tensor([[0, 1], [1, -1]])
        assert _kept(now_TK, before_TK).item() == pytest.approx(2 / 3)

    def test_share_of_kept_choices(self):
        model = Host()
        balanced = balance_(model)
        model.eval()
        tokens_BS = torch.arange(12).view(2, 6)
        seen = Specialisation()
        for biases in (torch.zeros(4), torch.tensor([9.0, 9.0, 0.0, 0.0])):
            for site in balanced.values():
                site.bias.copy_(biases)
            seen.start_(balanced, TokenKinds(None))
            for name, site in balanced.items():
                site.witnesses[seen] = partial(seen.look, name, site)
            model(tokens_BS)
        scalars = seen.scalars()
        # The second run chose experts 0 and 1 for every token.
        x_TD = model.embedding(tokens_BS).flatten(0, 1)
        first_TK = (x_TD @ model.layers[0].router.weight.T).topk(2).indices
        share = (first_TK < 2).float().mean().item()
        assert scalars["val_layers/kept_choices/layers.0.router"] == pytest.approx(share)
        by_layer = [share for tag, share in scalars.items() if tag.startswith("val_layers/kept_choices/")]
        assert scalars["val/kept_choices"] == pytest.approx(sum(by_layer) / len(balanced))


class TestLift:
    def test_chance_is_zero_and_twice_is_one(self):
        octaves = lift(np.array([[30, 10, 0], [0, 20, 0]]))
        assert octaves[0, 0] == pytest.approx(np.log2(30 / 20))
        assert octaves[1, 1] == pytest.approx(1)
        assert np.isneginf(octaves[1, 0])
        assert np.isnan(octaves[:, 2]).all()


class Images:
    def __init__(self):
        self.seen = []


class TestLoggers:
    def test_each_logger_gets_the_image_in_its_own_way(self):
        image, step = np.zeros((3, 4, 5), dtype=np.uint8), 7

        class TensorBoard(Images):
            experiment = property(lambda self: self)

            def add_image(self, tag, image, global_step, dataformats):
                self.seen.append((tag, image.shape, global_step, dataformats))

        class WandB(Images):
            experiment = None

            def log_image(self, key, images, step):
                self.seen.append((key, images[0].shape, step))

        class MLflow(Images):
            run_id = "r"

            class Client(Images):
                def log_image(self, run_id, image, key, step):
                    self.seen.append((run_id, image.shape, key, step))

            def __init__(self):
                self.experiment = self.Client()

        board, wandb, mlflow, csv = TensorBoard(), WandB(), MLflow(), Images()
        log_image([board, wandb, mlflow, csv], "load/experts", image, step)
        assert board.seen == [("load/experts", (3, 4, 5), 7, "CHW")]
        assert wandb.seen == [("load/experts", (4, 5, 3), 7)]
        assert mlflow.experiment.seen == [("r", (4, 5, 3), "load/experts", 7)]
        assert csv.seen == []
