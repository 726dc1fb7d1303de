"""Set every bias of a balanced model at once from a few batches, instead of step by step.

Shape legend: T tokens, E experts, K experts selected per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site
from moe_plugin.balancing.calibrate import solve_bias
from moe_plugin.balancing.reduce import all_reduce_
from moe_plugin.errors import ConfigError, EffectError
from moe_plugin.metrics import max_violation

Batches = Iterable[Any] | Callable[[nn.Module], object]


class Violation(NamedTuple):
    """MaxVio of one site over the batches, before and after."""

    before: float
    after: float


@torch.no_grad()
def warm_start(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Batches,
    *,
    num_batches: int = 8,
    passes: int = 3,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Violation]:
    """Set each site's bias to balance the model on these batches; see `BalancedModel.warm_start`."""
    check_solvable(sites, "warm_start", "Leave these routers out with 'sites'.")
    run = batches if callable(batches) else _runner(list(islice(batches, num_batches)))
    violations = []
    with _evaluating(model):
        for _ in range(passes):
            scores, violation = _observe(model, sites, run, process_group)
            violations.append(violation)
            for name, site in sites.items():
                bias_E = solve_bias(scores[name], site.top_k, site.bias)
                site.bias.copy_(_mean_over_ranks(bias_E, process_group))
        violations.append(_observe(model, sites, run, process_group)[1])
    return {name: Violation(violations[0][name], violations[-1][name]) for name in sites}


def check_solvable(sites: Mapping[str, Site], setting: str, fix: str) -> None:
    """Check that the load of all sites depends on their top-k alone.

    Args:
        sites: By name.
        setting: The setting that needs it, for the error.
        fix: What to do about it, for the error.

    Raises:
        ConfigError: If tokens use different numbers of experts at one of them.
    """
    varying = [name for name, site in sites.items() if site.allocation is not None]
    if varying:
        raise ConfigError(setting, "needs a fixed number of experts per token at every router", varying, fix)


class _Observed:
    """The scores and the load of one site over a pass."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.scores_TE: list[Tensor] = []
        self.counts_E = torch.zeros(site.num_experts, dtype=torch.int64, device=site.bias.device)

    def __call__(self, selection: Selection, valid_T: Tensor | None) -> None:
        scores_TE = self.site.unbiased(selection.ranked_TE).flatten(0, -2)
        ids_TK = selection.expert_ids_TK.flatten(0, -2)
        if valid_T is not None:
            scores_TE, ids_TK = scores_TE[valid_T], ids_TK[valid_T]
        self.scores_TE.append(scores_TE.float())
        self.counts_E += torch.bincount(ids_TK.flatten(), minlength=self.site.num_experts)


def _observe(
    model: nn.Module,
    sites: Mapping[str, Site],
    run: Callable[[nn.Module], object],
    process_group: dist.ProcessGroup | None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return scores (T, E) of this rank, and MaxVio over all ranks, of each site in one pass over the batches."""
    seen = {name: _Observed(site) for name, site in sites.items()}
    for name, site in sites.items():
        site.observer = seen[name]
    try:
        run(model)
    finally:
        for site in sites.values():
            site.observer = None
    unseen = [name for name, observed in seen.items() if not observed.scores_TE]
    if unseen:
        raise EffectError(f"Routers {unseen} saw no tokens in the batches. Leave them out with 'sites'.")
    all_reduce_([observed.counts_E for observed in seen.values()], process_group)
    scores = {name: torch.cat(observed.scores_TE) for name, observed in seen.items()}
    return scores, {name: max_violation(observed.counts_E).item() for name, observed in seen.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of each module afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _runner(batches: list[Any]) -> Callable[[nn.Module], None]:
    """Return a function that gives the model each batch, mappings by keyword, tuples and lists by position."""

    def run(model: nn.Module) -> None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**{key: _on(device, value) for key, value in batch.items()})
            elif isinstance(batch, (tuple, list)):
                model(*[_on(device, value) for value in batch])
            else:
                model(_on(device, batch))

    return run


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _mean_over_ranks(bias_E: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return bias_E
    dist.all_reduce(bias_E, group=process_group)
    return bias_E / dist.get_world_size(process_group)
