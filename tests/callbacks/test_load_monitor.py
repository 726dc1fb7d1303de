from __future__ import annotations

import io
from itertools import count
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.callbacks.load_monitor import LoadMonitor
from moe_plugin.callbacks.loss_free import LossFreeBalancing
from moe_plugin.callbacks.monitor import token_clock
from moe_plugin.callbacks.monitor.run_card import active_parameters
from moe_plugin.errors import AttachError, ConfigError
from moe_plugin.experts import GroupedExperts, MoEBlock
from moe_plugin.metrics import dead_experts, max_violation
from moe_plugin.plots import load_heatmap
from moe_plugin.plots.colors import load_colors, load_octaves
from moe_plugin.plots.grid import TOP, Grid
from moe_plugin.routing import Router, Sigmoid

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:DeprecationWarning"),
]
SIZES = {"blocks.0.router": 8, "blocks.1.router": 4}
SHORT = {"blocks.0.router": "blocks.0", "blocks.1.router": "blocks.1"}
TOKENS, TOP_K = 24, 2


class Model(lightning.LightningModule):
    """Two MoE blocks of different size, and a log of what their routers chose."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            MoEBlock(Router(16, experts, TOP_K, score=Sigmoid()), GroupedExperts(experts, 16, 8))
            for experts in SIZES.values()
        )
        self.chosen: dict[str, list[dict[str, torch.Tensor]]] = {"train": [], "val": []}

    def forward(self, x):
        counts = {}
        for name, block in zip(SIZES, self.blocks, strict=True):
            block.router.register_forward_hook(
                lambda router, args, routing, name=name: counts.__setitem__(
                    name, routing.expert_ids_TK.flatten().bincount(minlength=SIZES[name])
                )
            )
        for block in self.blocks:
            x = x + block(x)
        for block in self.blocks:
            block.router._forward_hooks.clear()
        if not self.trainer.sanity_checking:
            self.chosen["train" if self.training else "val"].append(counts)
        return x

    def training_step(self, batch, batch_idx):
        loss = mse_loss(self(batch), batch.flip(-1))
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", mse_loss(self(batch), batch.flip(-1)), sync_dist=self.trainer.world_size > 1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(batches: int) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    data = torch.randn(batches * TOKENS, 16, generator=generator) + 1
    return DataLoader(data, batch_size=TOKENS)


def fit(
    monitor,
    folder,
    *,
    steps=12,
    logger=None,
    callbacks=(LossFreeBalancing,),
    ckpt_path=None,
    data=None,
    **settings,
):
    torch.manual_seed(1)
    model = Model()
    trainer = lightning.Trainer(
        max_steps=steps,
        logger=logger if logger is not None else TensorBoardLogger(folder, name="", version=""),
        default_root_dir=folder,
        callbacks=[monitor, *(make() for make in callbacks)],
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        log_every_n_steps=5,
        **{"enable_checkpointing": False, **settings},
    )
    trainer.fit(model, *(data or (loader(30), loader(3))), ckpt_path=ckpt_path)
    return model, trainer


def events(folder) -> EventAccumulator:
    return EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors", "histograms"), 0)
    ).Reload()


def scalars(folder, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events(folder).Scalars(tag)}


def picture(read: EventAccumulator, tag: str) -> np.ndarray:
    """The last image of a tag; uint8 (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(read.Images(tag)[-1].encoded_image_string)))


def mean_violation(batches: list[dict[str, torch.Tensor]]) -> float:
    per_layer = [max_violation(sum(batch[name] for batch in batches)).item() for name in SIZES]
    return sum(per_layer) / len(per_layer)


class TestTraining:
    def test_scalars_equal_what_the_routers_chose(self, tmp_path):
        model, _ = fit(LoadMonitor(), tmp_path)
        chosen = model.chosen["train"]
        windows = {4: chosen[:5], 9: chosen[5:10], 11: chosen[10:12]}
        expected = {step: mean_violation(window) for step, window in windows.items()}
        assert scalars(tmp_path, "load/max_violation_global") == pytest.approx(expected)
        expected = {
            step: sum(mean_violation([batch]) for batch in window) / len(window)
            for step, window in windows.items()
        }
        assert scalars(tmp_path, "load/max_violation_batch") == pytest.approx(expected)

    def test_each_layer_has_its_own_scalars(self, tmp_path):
        model, _ = fit(LoadMonitor(), tmp_path)
        for name in SIZES:
            summed = sum(batch[name] for batch in model.chosen["train"][:5])
            assert scalars(tmp_path, f"load_layers/max_violation/{SHORT[name]}")[4] == pytest.approx(
                max_violation(summed).item()
            )
            assert (
                scalars(tmp_path, f"load_layers/dead_experts/{SHORT[name]}")[4] == dead_experts(summed).item()
            )
            bias = find_balanced(model)[name].bias
            assert scalars(tmp_path, f"load_layers/bias_range/{SHORT[name]}")[11] == pytest.approx(
                (bias.max() - bias.min()).item()
            )

    def test_accumulated_batches_are_one_batch_of_the_optimizer(self, tmp_path):
        model, _ = fit(LoadMonitor(every_n_steps=2), tmp_path, steps=2, accumulate_grad_batches=3)
        chosen = model.chosen["train"]
        steps = [{name: sum(batch[name] for batch in chosen[i : i + 3]) for name in SIZES} for i in (0, 3)]
        expected = sum(mean_violation([step]) for step in steps) / 2
        assert scalars(tmp_path, "load/max_violation_batch") == {1: pytest.approx(expected)}

    def test_first_record_is_kept_on_the_host(self, tmp_path):
        monitor = LoadMonitor()
        model, _ = fit(monitor, tmp_path)
        assert monitor.first_record.step == 1
        for name in SIZES:
            assert monitor.first_record.counts[name].tolist() == model.chosen["train"][0][name].tolist()

    def test_several_loggers_all_get_the_scalars(self, tmp_path):
        loggers = [
            TensorBoardLogger(tmp_path, name="tb", version=""),
            CSVLogger(tmp_path, name="csv", version=""),
        ]
        fit(LoadMonitor(), tmp_path, logger=loggers)
        assert len(scalars(tmp_path / "tb", "load/entropy")) == 3
        assert "load/entropy" in (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0]

    @pytest.mark.parametrize("settings", [{"logger": False, "val_check_interval": 4}, {"fast_dev_run": True}])
    def test_no_logger_still_measures(self, tmp_path, settings):
        monitor = LoadMonitor()
        _, trainer = fit(monitor, tmp_path, **settings)
        assert set(monitor.training_load) == set(SIZES)
        assert "val/max_violation_global" in trainer.callback_metrics

    def test_alone_it_observes_and_moves_no_bias(self, tmp_path):
        monitor = LoadMonitor()
        model, _ = fit(monitor, tmp_path, callbacks=())
        assert len(model.chosen["train"]) == 12
        assert scalars(tmp_path, "load/max_violation_global")[4] == pytest.approx(
            mean_violation(model.chosen["train"][:5])
        )
        assert all(not site.bias.any() for site in find_balanced(model).values())
        assert monitor.training.bias_ranges == dict.fromkeys(SIZES, 0.0)

    @pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
    def test_resumed_run_remembers_how_it_began(self, tmp_path):
        first = LoadMonitor()
        _, trainer = fit(first, tmp_path, steps=5)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        resumed = LoadMonitor()
        fit(resumed, tmp_path, steps=10, ckpt_path=tmp_path / "last.ckpt")
        assert resumed.first_record.step == 1
        assert set(scalars(tmp_path, "load/entropy")) == {4, 9}
        for name in SIZES:
            assert torch.equal(resumed.first_record.counts[name], first.first_record.counts[name])


class TestPictures:
    def test_image_in_the_event_file_is_the_heatmap_of_the_counts(self, tmp_path):
        monitor = LoadMonitor()
        fit(monitor, tmp_path)
        read = events(tmp_path)
        assert read.Images("load/experts")[-1].step == 11
        counts = {name: torch.tensor(load.tokens_per_expert) for name, load in monitor.training_load.items()}
        # The title is above; the cells' colours are held by tests/plots/test_heatmap.py.
        pixels = picture(read, "load/experts").transpose(2, 0, 1)
        assert np.array_equal(pixels[:, TOP:], load_heatmap(counts)[:, TOP:])

    def test_counts_in_the_event_file_mark_experts_a_layer_lacks(self, tmp_path):
        monitor = LoadMonitor()
        fit(monitor, tmp_path)
        stored = tensor_util.make_ndarray(events(tmp_path).Tensors("load/tokens_per_expert")[-1].tensor_proto)
        first, second = (load.tokens_per_expert for load in monitor.training_load.values())
        assert stored.tolist() == [list(first), [*second, -1, -1, -1, -1]]

    @pytest.mark.parametrize(
        ("every_n_steps", "steps"),
        [(1, 20), (1, 16), (1, 1), (3, 30), (3, 25), (3, 24), (5, 1), (5, 4)],
    )
    def test_first_step_then_windows_of_powers_of_two_and_the_last_are_drawn(
        self, tmp_path, every_n_steps, steps
    ):
        fit(LoadMonitor(every_n_steps), tmp_path, steps=steps)
        read = events(tmp_path)
        windows = [step for step in range(steps) if (step + 1) % every_n_steps == 0 or step == steps - 1]
        drawn = {0, windows[-1]} | {windows[place] for place in (0, 1, 3, 7, 15) if place < len(windows)}
        assert [image.step for image in read.Images("load/experts")] == sorted(drawn)
        assert [each.step for each in read.Tensors("load/tokens_per_expert")] == sorted(drawn)

    def test_first_picture_is_the_load_of_the_first_step_alone(self, tmp_path):
        model, _ = fit(LoadMonitor(every_n_steps=5), tmp_path)
        first, window, _ = events(tmp_path).Tensors("load/tokens_per_expert")[:3]
        for steps, event in ((1, first), (5, window)):
            for name, tokens_E in zip(SIZES, tensor_util.make_ndarray(event.tensor_proto), strict=True):
                chosen_E = sum(batch[name] for batch in model.chosen["train"][:steps])
                assert tokens_E[: SIZES[name]].tolist() == chosen_E.tolist()

    def test_configured_interval_is_kept(self, tmp_path):
        fit(LoadMonitor(every_n_steps=1, image_every_n_steps=5), tmp_path, steps=11)
        assert [image.step for image in events(tmp_path).Images("load/experts")] == [0, 5, 10]

    def test_zero_interval_draws_nothing(self, tmp_path):
        fit(LoadMonitor(image_every_n_steps=0), tmp_path)
        assert events(tmp_path).Tags()["images"] == []


class TestDashboard:
    def test_slowdown_and_variation_equal_what_the_routers_chose(self, tmp_path, monkeypatch):
        seconds = count()
        monkeypatch.setattr(token_clock, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
        model, _ = fit(LoadMonitor(), tmp_path)
        chosen = model.chosen["train"][:5]
        # Eight experts over eight ranks; the layer of four experts divides over none of the numbers of ranks.
        violation = sum(max_violation(batch["blocks.0.router"]).item() for batch in chosen) / 5
        size = active_parameters(model)
        slowdown = 1 + size.expert_share * violation
        assert scalars(tmp_path, "load/slowdown_ep8")[4] == pytest.approx(slowdown)
        assert "load/slowdown_ep16" not in events(tmp_path).Tags()["scalars"]
        tokens_E = sum(batch["blocks.1.router"] for batch in chosen).double()
        variation = (tokens_E.std(correction=0) / tokens_E.mean()).item()
        assert scalars(tmp_path, "load_layers/variation/blocks.1")[4] == pytest.approx(variation)
        assert scalars(tmp_path, "load/active_parameters")[4] == size.active
        assert scalars(tmp_path, "load/tokens_per_second")[4] == 5 * TOKENS  # one tick of the clock

    def test_active_parameters_are_counted(self):
        size = active_parameters(Model())
        experts = [3 * 16 * 8 * n for n in SIZES.values()]
        assert size.total - size.active == sum(
            n - n * TOP_K // e for n, e in zip(experts, SIZES.values(), strict=True)
        )

    def test_bias_as_picture_and_the_run_card_are_written(self, tmp_path):
        seen: dict[str, list[float]] = {name: [] for name in SIZES}

        class Look(lightning.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                if trainer.global_step in (5, 10, 12):
                    for name, site in find_balanced(pl_module).items():
                        seen[name] += site.bias.tolist()

        model, _ = fit(LoadMonitor(), tmp_path, callbacks=(LossFreeBalancing, Look))
        read = events(tmp_path)
        for name, site in find_balanced(model).items():
            assert read.Images(f"load_over_time/{SHORT[name]}")[-1].step == 11
            pixels, grid = picture(read, f"bias_over_time/{SHORT[name]}"), Grid.fit(3, SIZES[name])
            largest = max(abs(bias) for bias in seen[name])
            end = next(2.0**power for power in range(-20, 20) if 2.0**power >= largest)
            for expert, bias in enumerate(site.bias.tolist()):
                x, y = grid.center(2, expert)
                expected = load_colors(np.array([3 * bias / end]))[0]
                assert pixels[y + 5, x + 9].tolist() == expected.tolist()
        card = read.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "| blocks.1 | `blocks.1.router` |" in card
        assert "Proportional" in card

    def test_last_row_of_load_over_time_is_the_last_window(self, tmp_path):
        monitor = LoadMonitor()
        fit(monitor, tmp_path, steps=15)
        pixels = picture(events(tmp_path), "load_over_time/blocks.1")
        grid = Grid.fit(3, 4)
        tokens = torch.tensor([monitor.training_load["blocks.1.router"].tokens_per_expert])
        colors = load_colors(load_octaves(tokens))[0]
        for expert in range(4):
            x, y = grid.center(2, expert)
            assert pixels[y + 5, x + 9].tolist() == colors[expert].tolist()

    @pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
    @pytest.mark.parametrize("stop", [6, 10])
    def test_resumed_run_continues_the_pictures(self, tmp_path, stop):
        first, resumed = LoadMonitor(), LoadMonitor()
        _, trainer = fit(first, tmp_path / "first", steps=stop)
        trainer.save_checkpoint(tmp_path / "stop.ckpt")
        before = first.state_dict()["film"]
        fit(resumed, tmp_path / "resumed", steps=20, ckpt_path=tmp_path / "stop.ckpt")
        film = resumed.state_dict()["film"]
        assert film["steps"] == sorted({4, 9, 14, 19, stop - 1})
        for name, tokens_NE in before["tokens"].items():
            assert torch.equal(film["tokens"][name][: len(tokens_NE)], tokens_NE)
            assert (
                len(film["tokens"][name])
                == len(film["biases"][name])
                == len(film["flips"])
                == len(film["steps"])
            )
        drawn = [image.step for image in events(tmp_path / "resumed").Images("load/experts")]
        # The 1st, 2nd, 4th and last window of the whole run; a stop in a window makes one more.
        assert drawn == ([14, 19] if stop == 6 else [19])

    def test_alarms_are_written_as_text(self, tmp_path):
        class Collapse(lightning.Callback):
            def on_train_batch_start(self, trainer, pl_module, *_):
                pl_module.blocks[0].router.expert_bias[:2] = 9

        fit(LoadMonitor(on_alarm=lambda alarm: None), tmp_path, callbacks=(Collapse,))
        text = events(tmp_path).Tensors("alarms/text_summary")[0].tensor_proto.string_val[0].decode()
        assert text.startswith("collapse at step 5: blocks.0.router")

    def test_layout_parses_and_its_charts_match_the_tags(self, tmp_path):
        import re

        fit(LoadMonitor(), tmp_path)
        read = events(tmp_path)
        proto = read.Tensors("custom_scalars__config__")
        assert len(proto) == 1
        layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(proto[0].tensor_proto).item())
        assert [category.title for category in layout.category] == ["Overview", "Layers"]
        tags = read.Tags()["scalars"]
        for category in layout.category:
            for chart in category.chart:
                assert any(re.match(regex, tag) for regex in chart.multiline.tag for tag in tags), chart.title


class TestDetail:
    def test_spread_over_layers_is_that_of_their_violations(self, tmp_path):
        model, _ = fit(LoadMonitor(), tmp_path)
        violations = sorted(
            max_violation(sum(chosen[name] for chosen in model.chosen["train"][:5])).item() for name in SIZES
        )
        low, high = violations
        logged = {
            name: scalars(tmp_path, f"load/max_violation_{name}")[4]
            for name in ("p50", "p90", "p95", "worst")
        }
        expected = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "worst": 1}
        assert logged == pytest.approx({name: low + share * (high - low) for name, share in expected.items()})

    def test_brief_writes_no_scalar_of_a_layer_and_all_others(self, tmp_path):
        for detail in ("brief", "full"):
            fit(LoadMonitor(detail=detail), tmp_path / detail)
        brief, full = (set(events(tmp_path / detail).Tags()["scalars"]) for detail in ("brief", "full"))
        assert brief == {tag for tag in full if "_layers/" not in tag}
        assert len(full - brief) >= 2 * 5
        (stored,) = events(tmp_path / "brief").Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(stored.tensor_proto).item())
        assert [category.title for category in layout.category] == ["Overview"]

    def test_text_names_the_experts_with_most_and_fewest_tokens(self, tmp_path):
        monitor = LoadMonitor()
        fit(monitor, tmp_path)
        stored = events(tmp_path).Tensors("load/extreme_experts/text_summary")[-1]
        text = tensor_util.make_ndarray(stored.tensor_proto).item().decode()
        rows = {
            cells[1].strip(" `"): cells[3:5] for cells in (row.split("|") for row in text.splitlines()[2:])
        }
        assert rows.keys() == {name.removesuffix(".router") for name in SIZES}
        for name, (most, least) in rows.items():
            tokens = monitor.training_load[f"{name}.router"].tokens_per_expert
            mean = sum(tokens) / len(tokens)
            by_load = sorted(tokens, reverse=True)
            half = min(4, len(tokens) // 2)
            for shown, loads in ((most, by_load[:half]), (least, by_load[::-1][:half])):
                pairs = [each.split() for each in shown.split("·")]
                assert [f"({load / mean:.2f})" for load in loads] == [share for _, share in pairs]
                assert [tokens[int(expert)] for expert, _ in pairs] == loads


class TestValidation:
    def test_metrics_equal_what_the_routers_chose(self, tmp_path):
        monitor = LoadMonitor()
        model, trainer = fit(monitor, tmp_path, steps=4, val_check_interval=4)
        chosen = model.chosen["val"]
        assert len(chosen) == 3
        metrics = trainer.callback_metrics
        assert metrics["val/max_violation_global"].item() == pytest.approx(mean_violation(chosen))
        per_batch = sum(mean_violation([batch]) for batch in chosen) / 3
        assert metrics["val/max_violation_batch"].item() == pytest.approx(per_batch)
        for name, load in monitor.validation_load.items():
            assert load.tokens_per_expert == tuple(sum(batch[name] for batch in chosen).tolist())

    def test_later_validation_starts_from_zero(self, tmp_path):
        monitor = LoadMonitor()
        model, _ = fit(monitor, tmp_path, steps=8, val_check_interval=4)
        assert len(model.chosen["val"]) == 6
        for name, load in monitor.validation_load.items():
            assert load.tokens_per_expert == tuple(
                sum(batch[name] for batch in model.chosen["val"][3:]).tolist()
            )

    def test_sanity_check_logs_nothing(self, tmp_path):
        monitor = LoadMonitor()
        fit(monitor, tmp_path, steps=2)
        assert monitor.validation_load == {}
        assert "val/max_violation_global" not in events(tmp_path).Tags()["scalars"]

    def test_validate_alone_measures(self, tmp_path):
        monitor = LoadMonitor()
        trainer = lightning.Trainer(
            logger=False, callbacks=[monitor], enable_progress_bar=False, accelerator="cpu"
        )
        model = Model()
        (metrics,) = trainer.validate(model, loader(2), verbose=False)
        assert metrics["val/max_violation_global"] == pytest.approx(mean_violation(model.chosen["val"]))
        assert all(
            sum(load.tokens_per_expert) == 2 * TOKENS * TOP_K for load in monitor.validation_load.values()
        )

    def test_validation_after_training_always_leaves_its_picture(self, tmp_path):
        monitor = LoadMonitor()
        model, trainer = fit(monitor, tmp_path, steps=9, val_check_interval=3)
        trainer.validate(model, loader(3), verbose=False)
        assert [image.step for image in events(tmp_path).Images("val/experts")] == [2, 5, 8, 8]

    def test_number_of_experts_that_never_varies_is_not_logged(self, tmp_path):
        fit(LoadMonitor(), tmp_path, steps=4, val_check_interval=4)
        assert not [tag for tag in events(tmp_path).Tags()["scalars"] if "experts_per_token" in tag]


class TestTwoRanks:
    def test_ranks_log_the_load_of_the_global_batch(self, tmp_path, on_ranks):
        results = on_ranks(2, fit_rank, str(tmp_path))
        chosen = {
            stage: [add(*pair) for pair in zip(*(results[rank][stage] for rank in (0, 1)), strict=True)]
            for stage in ("train", "val")
        }
        assert scalars(tmp_path, "load/max_violation_global")[4] == pytest.approx(
            mean_violation(chosen["train"][:5])
        )
        per_batch = sum(mean_violation([batch]) for batch in chosen["val"]) / 2
        for rank in (0, 1):
            metrics = results[rank]["metrics"]
            assert metrics["val/max_violation_batch"] == pytest.approx(per_batch)
            assert metrics["val/max_violation_global"] == pytest.approx(mean_violation(chosen["val"]))
        assert len(list(tmp_path.glob("events*"))) == 1


def add(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: first[name] + second[name] for name in SIZES}


def fit_rank(rank, results, folder):
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", start_method="popen")
    settings = {"devices": 2, "strategy": strategy, "val_check_interval": 5}
    model, trainer = fit(LoadMonitor(), folder, steps=5, data=(loader(10), loader(4)), **settings)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    results[rank] = model.chosen | {"metrics": metrics}


class TestSettings:
    @pytest.mark.parametrize(
        "settings", [{"every_n_steps": 0}, {"image_every_n_steps": -1}, {"every_n_steps": 1.5}]
    )
    def test_bad_interval_names_the_key_and_the_value(self, settings):
        (name, value), *_ = settings.items()
        with pytest.raises(ConfigError, match=rf"'{name}' must be .* got {value}"):
            LoadMonitor(**settings)

    def test_other_detail_is_an_error(self):
        with pytest.raises(ConfigError, match="'detail' must be 'brief' or 'full', got 'short'"):
            LoadMonitor(detail="short")

    def test_model_without_routers_is_refused(self, tmp_path):
        class Dense(Model):
            def __init__(self):
                super().__init__()
                self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

        trainer = lightning.Trainer(logger=False, callbacks=[LoadMonitor()], accelerator="cpu")
        with pytest.raises(AttachError):
            trainer.validate(Dense(), loader(1), verbose=False)
