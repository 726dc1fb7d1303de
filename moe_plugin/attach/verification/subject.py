"""The model under test: copies of it with and without balancing, and how they are run.

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import BalancedModel, find_balanced
from moe_plugin.attach.discovery.probing.trace import tensors_in
from moe_plugin.attach.settings import Sites
from moe_plugin.attach.verification.observation import observing
from moe_plugin.attach.verification.result import MODEL_ERRORS, first_line, require, skip_if

Run = Callable[[nn.Module], Any]


class Outcome(NamedTuple):
    """What a run gave: the tensors of the model's output, and the gradients by parameter, none in evaluation."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


class Balanced(NamedTuple):
    """A copy of the model with balancing, and its sites."""

    model: nn.Module
    sites: BalancedModel


class Subject:
    """A model, how it is run and how it is balanced; checks change copies only."""

    def __init__(self, model: nn.Module, run: Run, adapters: Sequence[Adapter], sites: Sites) -> None:
        """Copy the model, and run the copy once: some models set attributes in their first forward.

        Args:
            model: The model.
            run: Calls a model on fixed inputs and returns its output.
            adapters: As for `balance_`.
            sites: As for `balance_`.
        """
        self._original = copy.deepcopy(model)
        self._run = run
        # What a router's first forward proves is checked here by other means.
        own: dict[str, Any] = {"frozen_routers": "balance", "verify": False}
        self._settings = {"adapters": adapters, "sites": sites, **own}
        self.evaluate(self._original)

    def plain(self) -> nn.Module:
        """Return a new copy without balancing."""
        return copy.deepcopy(self._original)

    def attached(self) -> Balanced:
        """Return a new copy that has just been balanced, with a bias of zero or the model's own."""
        model = self.plain()
        return Balanced(model, balance_(model, **self._settings))

    def balanced(self) -> Balanced:
        """Return a copy of one balanced model: this is quicker than to search for the routers again."""
        return balanced_part(copy.deepcopy(self.prototype))

    def biased(self) -> Balanced:
        """Return a balanced copy with random biases of the size of the scores' spread."""
        model, sites = self.balanced()
        generator = torch.Generator().manual_seed(2)
        for name, site in sites.items():
            site.bias.add_(
                self.spreads[name] * torch.randn(site.num_experts, generator=generator).to(site.bias)
            )
        return Balanced(model, sites)

    @cached_property
    def spreads(self) -> dict[str, float]:
        """By router, the standard deviation of the scores of a token's experts; 1 if it saw none."""
        model, sites = self.balanced()
        with observing(sites) as seen:
            self.evaluate(model)
        return {name: _spread([each.scores_TE for each in calls]) for name, calls in seen.items()}

    @cached_property
    def prototype(self) -> nn.Module:
        """The balanced model of which `balanced` gives copies."""
        return self.attached().model

    def train(self, model: nn.Module) -> Outcome:
        """Run a training step without an optimizer: the loss is the mean of the squares of each output."""
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        outputs = list(tensors_in(self._run(model)))
        losses = [output.float().square().mean() for output in outputs if _can_be_loss(output)]
        if losses:
            torch.stack(losses).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return Outcome([output.detach() for output in outputs], gradients)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Outcome:
        """Run the model in evaluation mode."""
        model.eval()
        return self.forward(model)

    def forward(self, model: nn.Module) -> Outcome:
        """Run the model in the mode in which it is, without a backward."""
        torch.manual_seed(0)
        return Outcome([output.detach() for output in tensors_in(self._run(model))], {})

    def skip_unless_plain(self, works: Callable[[nn.Module], object], *, what: str) -> None:
        """Skip the check if the model without balancing does not run in some way.

        Args:
            works: Runs it so.
            what: What the model cannot be, such as "cast to bf16".
        """
        try:
            works(self.plain())
        except MODEL_ERRORS as error:
            skip_if(True, f"the model without balancing cannot be {what} ({first_line(error)})")


def balanced_part(model: nn.Module) -> Balanced:
    """Return a copy of a balanced model with the sites that it holds."""
    sites = find_balanced(model)
    require(sites is not None, "a copy of the balanced model is not balanced")
    assert sites is not None
    return Balanced(model, sites)


def _can_be_loss(output: Tensor) -> bool:
    differentiable = output.requires_grad and output.is_floating_point()
    return differentiable and output.numel() > 0 and bool(output.isfinite().all())


def _spread(scores: list[Tensor]) -> float:
    if not scores:
        return 1.0
    open_N = torch.cat([(each - _mean(each))[each.isfinite()] for each in scores])
    return open_N.square().mean().sqrt().item() or 1.0


def _mean(scores_TE: Tensor) -> Tensor:
    return scores_TE.masked_fill(~scores_TE.isfinite(), torch.nan).nanmean(-1, keepdim=True)
