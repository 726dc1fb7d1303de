"""A run's model at the end of training, and what its routers select on given batches.

Shape legend: T tokens, K experts selected per token at most, B batch, S sequence, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from hydra.utils import instantiate
from torch import Tensor

from moe_plugin.apps.data import CorpusDataModule
from moe_plugin.apps.launch.build import LOSS_FREE, build_data, build_model
from moe_plugin.apps.launch.last_checkpoint import LAST, find_checkpoint
from moe_plugin.apps.models.language_model import TokenModel
from moe_plugin.apps.received.run_config import read_run_config
from moe_plugin.apps.study.child_run import is_finished
from moe_plugin.apps.study.results import SEED_PREFIX, seed_of
from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site
from moe_plugin.checkpoints.safe_load import load_file
from moe_plugin.errors import ConfigError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A trained model with its data.

    Attributes:
        model: In training mode.
        balanced: Its routers, with the biases of the run, and its rule if it had one.
        data: Its data module, set up.
        sequences_seen: Training sequences of the run.
    """

    model: TokenModel
    balanced: BalancedModel
    data: CorpusDataModule
    sequences_seen: int

    def next_batches(self, skip: int, number: int) -> list[Batch]:
        """Return the batches that training would have continued with.

        Args:
            skip: Batches to leave out first.
            number: Batches to return.
        """
        loader = self.data.train_dataloader()
        loader.batch_sampler.seek(0, self.sequences_seen + skip * self.data.batch_size)
        return list(islice(loader, number))

    def held_out(self, tokens: int) -> list[Batch]:
        """Return validation batches that hold this many tokens."""
        return list(
            islice(self.data.val_dataloader(), tokens // self.data.context_length // self.data.val_batch_size)
        )


def load_run(folder: Path) -> Trained:
    """Read a run's last checkpoint, as data: the run may be somebody else's.

    Raises:
        ConfigError: There is none, or the run's configuration names what is not allowed.
        CheckpointError: The checkpoint holds more than tensors and plain values.
    """
    checkpoint = find_checkpoint(LAST, folder)
    if checkpoint is None:
        raise ConfigError("run", "must have a last checkpoint", str(folder))
    config = read_run_config(folder / "config.yaml", trust="A study compares runs of our own classes.")
    config.data.cache = None  # that of this machine
    saved = load_file(checkpoint)
    model, data = build_model(config), build_data(config)
    assert isinstance(model, TokenModel)
    assert isinstance(data, CorpusDataModule)
    callback = (config.callbacks or {}).get(LOSS_FREE)
    balanced = balance_(model, rule=None if callback is None else instantiate(callback.rule, _convert_="all"))
    model.load_state_dict(saved["state_dict"])
    if "LossFreeBalancing" in saved["callbacks"]:
        balanced.load_state_dict(saved["callbacks"]["LossFreeBalancing"])
    data.setup()
    return Trained(model, balanced, data, config.trainer.max_steps * config.data.batch_size)


def runs_of(arm: Path) -> dict[int, Path]:
    """Return the finished runs of an arm's folder, by seed.

    Raises:
        ConfigError: There are none.
    """
    runs = {seed_of(folder): folder for folder in arm.glob(f"{SEED_PREFIX}*") if is_finished(folder)}
    if not runs:
        raise ConfigError("arm", f"must hold finished runs ({SEED_PREFIX}0, ...)", str(arm))
    return dict(sorted(runs.items()))


class _Seen:
    """What one site selects."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []

    def __call__(self, selection: Selection, valid_T: Tensor | None) -> None:
        ids_TK = selection.expert_ids_TK.flatten(0, -2)
        used_TK = selection.used_TK
        self.ids.append(ids_TK if used_TK is None else ids_TK.where(used_TK.flatten(0, -2), -1))


@torch.no_grad()
def look(trained: Trained, batches: Iterable[Batch]) -> tuple[dict[str, Tensor], Tensor]:
    """Run the model over batches in evaluation mode.

    Args:
        trained: The run.
        batches: Batches of its data.

    Returns:
        By router the selected experts of each token, int64 (T, K), -1 where a token does not use one; and the
        cross-entropy of each token's prediction, fp32 (T,).
    """
    seen = {name: _Seen() for name in trained.balanced}
    trained.model.eval()
    with _observed(trained.balanced, seen):
        losses = [trained.model.token_losses(batch).flatten() for batch in batches]
    trained.model.train()
    return {name: torch.cat(each.ids) for name, each in seen.items()}, torch.cat(losses)


@contextmanager
def _observed(sites: BalancedModel, seen: dict[str, _Seen]) -> Iterator[None]:
    for name, site in sites.items():
        site.observer = seen[name]
    try:
        yield
    finally:
        for site in sites.values():
            site.observer = None


def counts_of(ids_TK: Tensor, site: Site) -> Tensor:
    """Return tokens per routed expert from the selections of a router, see `look`; int64 (E,)."""
    used = ids_TK[(ids_TK >= 0) & (ids_TK < site.num_routed)]
    return torch.bincount(used, minlength=site.num_routed)


def in_batches(ids_TK: Tensor, tokens: int) -> Iterator[Tensor]:
    """Yield selections, see `look`, of this many tokens each; an incomplete last part is left out."""
    yield from (part for part in ids_TK.split(tokens) if len(part) == tokens)
