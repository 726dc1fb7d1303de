"""What `balance_` returns: the balanced sites of a model, and how their biases are moved.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_plugin.attach.fused.host_forward import has_run, unfuse_
from moe_plugin.attach.settings import BalanceSettings
from moe_plugin.attach.sidecar import read_sidecar, write_sidecar
from moe_plugin.attach.site import Site
from moe_plugin.attach.site_group import GroupStep, site_groups
from moe_plugin.attach.steering.attach import detach_
from moe_plugin.attach.steering.carries_biases import carry_biases_, drop_biases_
from moe_plugin.balancing.counts import reject_if_
from moe_plugin.balancing.reduce import all_reduce_
from moe_plugin.balancing.rules import Memory, Rule
from moe_plugin.errors import CheckpointError, EffectError
from moe_plugin.losses.in_model import OwnLoss
from moe_plugin.types import LoadRecord

if TYPE_CHECKING:
    from moe_plugin.attach.export import Export
    from moe_plugin.attach.recording.router_scores import RouterScores
    from moe_plugin.attach.recording.routes import Routes
    from moe_plugin.attach.warm_start import Batches, Violation

_ATTRIBUTE = "_moe_balanced"
SPREAD_EVERY = 16
"""With ``rate: auto`` one step in this many measures the spread of the scores."""


def find_balanced(model: nn.Module) -> BalancedModel | None:
    """Return what `balance_` returned for this model, if it did."""
    return model.__dict__.get(_ATTRIBUTE)


class BalancedModel(Mapping[str, Site]):
    """The routing sites of a balanced model by module name, in forward order.

    Attributes:
        step: Updates so far.
        record: The load of the last update; None before the first.
        process_group: The data-parallel ranks over which counts are summed.
        refused: Routers that cannot be balanced, by module name, and why.
        fused: The model's layers of experts that our kernels compute, by module name.
        switched_off: The model's own load-balancing losses, if ``aux_loss='off'``.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        rules: Sequence[Rule | None],
        settings: BalanceSettings,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        """Hold attached sites; use `balance_`.

        Args:
            model: The model.
            sites: Its sites.
            rules: The rule of each; None if its bias stays.
            settings: What was asked for.
            process_group: The data-parallel ranks; None is all of the default group.
        """
        self.step = 0
        self.record: LoadRecord | None = None
        self.process_group = process_group
        self.settings = settings
        self.refused: dict[str, str] = {}
        self.fused: dict[str, nn.Module] = {}
        self.switched_off: list[OwnLoss] = []
        self._model = model
        self._sites = {site.name: site for site in sites}
        self._rules = {site.name: rule for site, rule in zip(sites, rules, strict=True)}
        self._memories: dict[str, Memory] = {site.name: {} for site in sites}
        for site, rule in zip(sites, rules, strict=True):
            site.counters.measures_spread = rule is not None and rule.rate == "auto"
            if getattr(rule, "needs_gaps", False):
                site.counters.measure_gaps_()
        model.__dict__[_ATTRIBUTE] = self
        carry_biases_(model)

    def __getitem__(self, name: str) -> Site:
        """Return the site of this router."""
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the routers' names, in forward order."""
        return iter(self._sites)

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self._sites)

    def __hash__(self) -> int:
        """Hash by identity."""
        return id(self)

    def __eq__(self, other: object) -> bool:
        """Compare by identity."""
        return self is other

    def __getstate__(self) -> dict[str, Any]:
        """Return everything except the process group, which exists in one process only."""
        return self.__dict__ | {"process_group": None}

    def ours(self) -> list[Site]:
        """Return the sites whose bias is not a tensor of the model, so its own checkpoints need not have it."""
        return [site for site in self.values() if not site.host_owns_bias]

    @torch.no_grad()
    def update(self) -> LoadRecord:
        """Sum the counts over ranks, move every bias, and start counting anew.

        Every rank calls this after each optimizer step that took place. Only the first update waits for the device:
        it checks that balancing has an effect.

        Returns:
            The load of this step.

        Raises:
            EffectError: In the first update, if a site saw no tokens.
        """
        steps = [group.take() for group in site_groups(list(self.values()), self._rules, self._memories)]
        all_reduce_([counts for step in steps for counts in step.counted()], self.process_group)
        self._count_steps_(self.step + 1)
        if self.step == 1:
            self._check_effect(steps)
        is_rejected = torch.stack([step.num_rejected() for step in steps]).sum() > 0
        factor, measures_spread = self.settings.rate_factor(self.step), (self.step - 1) % SPREAD_EVERY == 0
        counts, tokens = {}, {}
        for step in steps:
            step.reject_if_(is_rejected)
            counts |= step.counts()
            tokens |= step.tokens()
            step.apply_(factor, measures_spread=measures_spread)
        bias = {name: site.bias[: site.num_routed] for name, site in self.items()}
        counts, tokens = ({name: found[name] for name in self} for found in (counts, tokens))
        self.record = LoadRecord(self.step, counts, tokens, bias)
        return self.record

    def reject_if_(self, condition: Tensor) -> None:
        """Let the next update leave every bias untouched if ``condition`` holds, without waiting for the device.

        Args:
            condition: bool scalar, such as a loss that is not finite. One rank where it holds is enough.
        """
        reject_if_(next(iter(self.values())).counters.training.slots_S, condition)

    def discard_counts_(self) -> None:
        """Forget the tokens counted since the last update."""
        for site in self.values():
            site.counters.discard_()

    def remove(self) -> None:
        """Remove balancing from the model. A bias that the model owns keeps its learnt values."""
        for site in self.values():
            detach_(site)
            site.token_mask.unwatch_()
        for experts in self.fused.values():
            unfuse_(experts)
        for loss in self.switched_off:
            loss.restore_()
        drop_biases_(self._model)
        del self._model.__dict__[_ATTRIBUTE]

    def state_dict(self) -> dict[str, Any]:
        """Return biases, rule states and the update counter. Counts of an incomplete step are left out."""
        sites = {}
        for name, site in self.items():
            memory = {key: value.clone() for key, value in self._memories[name].items()}
            sites[name] = {"bias": site.bias.clone(), "state": memory}
        return {"step": self.step, "sites": sites}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            CheckpointError: If it has other sites or other numbers of experts.
        """
        self._check_fits(state)
        self._count_steps_(state["step"])
        for name, saved in state["sites"].items():
            site = self[name]
            site.bias.copy_(saved["bias"])
            self._memories[name] = {key: value.to(site.bias.device) for key, value in saved["state"].items()}
        self.discard_counts_()

    def save(self, path: str | Path) -> None:
        """Write biases, rule states and the counter as a safetensors file next to the model's checkpoint."""
        write_sidecar(path, self.state_dict())

    def load(self, path: str | Path) -> None:
        """Continue from a file of `save`, or from a Lightning checkpoint, a file or a folder.

        Raises:
            CheckpointError: If it has no biases, other sites or other numbers of experts.
        """
        self.load_state_dict(read_sidecar(path))

    def warm_start(self, batches: Batches, *, num_batches: int = 8, passes: int = 3) -> dict[str, Violation]:
        """Set every bias to balance a pretrained model on a few batches, before it is trained.

        The model runs in evaluation mode without gradients, and its modes are restored. Padding is left out. Each rank
        gives its own batches, and biases are averaged. Memory: T x E x 4 bytes per site, for scores in fp32.

        Args:
            batches: What the model is called with: mappings by keyword, tuples and lists by position; or a function
                that takes the model and runs it.
            num_batches: Batches taken from an iterable.
            passes: How often all biases are solved for; each pass changes what later layers see.

        Returns:
            MaxVio over the batches of each site before and after; `calibrate` is the same at the end of training.

        Raises:
            EffectError: If a site sees no tokens.
        """
        from moe_plugin.attach.warm_start import warm_start

        limits = {"num_batches": num_batches, "passes": passes}
        return warm_start(self._model, self, batches, **limits, process_group=self.process_group)

    calibrate = warm_start

    def router_scores(self) -> AbstractContextManager[dict[str, RouterScores]]:
        """Keep scores and choices of the last forward of every site, while a ``with`` block runs.

        Examples:
            >>> with balanced.router_scores() as routers:  # doctest: +SKIP
            ...     model(**batch)
            >>> routers["model.layers.0.mlp.gate"].scores_TE  # doctest: +SKIP

        Without the block nothing is kept and nothing costs more. Compiled code runs uncompiled inside.
        """
        from moe_plugin.attach.recording.router_scores import router_scores

        return router_scores(self)

    def recorded_routes(self, batch_size: int) -> AbstractContextManager[Routes]:
        """Record which experts each token of each sequence chooses, while a ``with`` block runs.

        A trainer can then replay the routing of a rollout. Compiled code runs uncompiled inside. Beam search, which
        reorders its sequences, cannot be recorded.

        Args:
            batch_size: The sequences of each forward, batch first; 1 if they are packed.

        Raises:
            EffectError: At the end, if routers saw other tokens than those of the sequences.
        """
        from moe_plugin.attach.recording.routes import recorded_routes

        return recorded_routes(self, batch_size)

    def export(self, model: nn.Module | None = None, path: str | Path | None = None) -> Export:
        """Describe how the trained biases reach inference, and write those that the model does not own.

        Args:
            model: The part of the balanced model that inference loads, such as the model inside a LightningModule;
                None is all of it. Names in the sidecar are relative to it.
            path: Where to write the sidecar if one is needed; None writes nothing.

        Raises:
            AttachError: If 'model' is not part of the balanced model.
        """
        from moe_plugin.attach.export import export

        return export(self._model, self, self.step, model, None if path is None else Path(path))

    def _count_steps_(self, step: int) -> None:
        self.step = step
        for site in self.values():
            site.counters.looks_closely = step % SPREAD_EVERY == 0

    def _check_effect(self, steps: Sequence[GroupStep]) -> None:
        for step in steps:
            step.check_rule()
            for name, seen in step.num_seen().items():
                if seen == 0:
                    raise EffectError(
                        f"Router {name!r} counted no tokens in the first step. Is the model in eval() mode, run under "
                        "no_grad, or is this router not used? Leave it out with 'sites'."
                    )
        if any(site.is_interpreted for site in self.values()):
            self._check_fused()

    def _check_fused(self) -> None:
        for name, experts in self.fused.items():
            if not has_run(experts):
                raise EffectError(
                    f"Experts {name!r} were not called in the first step, so experts='fused' has no effect on them: "
                    "the model uses their weights in another way. Leave 'experts' out."
                )

    def _check_fits(self, state: Mapping[str, Any]) -> None:
        saved = {name: site["bias"].numel() for name, site in state["sites"].items()}
        if saved.keys() != self.keys():
            raise CheckpointError(f"The checkpoint balances {sorted(saved)}, this model {sorted(self)}.")
        wrong = [
            f"{name}: {saved[name]} experts in the checkpoint, {site.num_experts} in the model"
            for name, site in self.items()
            if saved[name] != site.num_experts
        ]
        if wrong:
            raise CheckpointError("; ".join(wrong) + ".")
