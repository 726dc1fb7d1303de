"""A causal language model of Hugging Face transformers, trained from random weights like our own.

Shape legend: B batch, S sequence, T tokens (B x S), D model width, E experts, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.apps.models.language_model import TokenModel
from moe_plugin.apps.models.optimizer import AdamWWarmupCosine
from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertShape
from moe_plugin.losses import AuxiliaryLoss, load_statistics
from moe_plugin.routing import Router, ZeroExpertRouter
from moe_plugin.routing.rankings import tell_tokens_
from moe_plugin.types import Routing


def native_router() -> None:
    """Stands for the model's own router in the configuration."""


class HuggingFaceModel(TokenModel):
    """A language model of transformers with its own router, or with one of ours in its place."""

    def __init__(
        self,
        *,
        config: Any,
        context_length: int,
        router: partial[Router] | None,
        experts: ExpertShape,
        optimizer: AdamWWarmupCosine | None = None,
        auxiliary_loss: AuxiliaryLoss | None = None,
    ) -> None:
        """Create the model with random weights.

        Args:
            config: The model's `PretrainedConfig`; its numbers of experts are those of `experts`.
            context_length: Longest sequence S.
            router: Router without its sizes; None keeps the model's own.
            experts: Sizes of the expert layers.
            optimizer: Optimizer and schedule, by default `AdamWWarmupCosine()`.
            auxiliary_loss: Balancing loss; with one of our routers only.

        Raises:
            ConfigError: The model has no such experts, or an auxiliary loss is asked of its own router.
        """
        if getattr(config, "n_shared_experts", 0) != experts.num_shared:
            raise ConfigError(
                f"'experts.num_shared' must be 0 for {config.model_type}, got {experts.num_shared}. "
                "Set experts.num_shared=0."
            )
        if router is None and auxiliary_loss is not None:
            raise ConfigError(
                "'balancing' must be loss_free or none with router=native, got aux_loss. Choose another router."
            )
        network = HuggingFaceNetwork(config, router, experts)
        super().__init__(
            network, context_length=context_length, optimizer=optimizer, auxiliary_loss=auxiliary_loss
        )


class HuggingFaceNetwork(nn.Module):
    """Token ids to logits by a model of transformers."""

    def __init__(self, config: Any, router: partial[Router] | None, experts: ExpertShape) -> None:
        """Create the model and puts the router in."""
        from transformers import AutoModelForCausalLM

        super().__init__()
        with warnings.catch_warnings():
            # A model without shared experts has them all the same, with no width.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
            self.model = AutoModelForCausalLM.from_config(config)
        for parameter in self.model.parameters():
            # Nothing to train, and no strategy that shards could give the optimizer a shard of it.
            parameter.requires_grad_(parameter.numel() > 0)
        if router is not None:
            replace_routers_(self.model, router, experts)

    def forward(
        self, tokens_BS: Tensor, auxiliary_loss: AuxiliaryLoss | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits (B, S, V), and the auxiliary losses of the layers added up."""
        tell_tokens_(self, tokens_BS)
        with _routings_in(self) as routings:
            logits_BSV = self.model(input_ids=tokens_BS, use_cache=False).logits
        auxiliary = logits_BSV.new_zeros((), dtype=torch.float32)
        if auxiliary_loss is not None:
            scored = [
                (routing, router.score.probabilities(routing.scores_TE)) for router, routing in routings
            ]
            auxiliary = auxiliary_loss([load_statistics(*each, len(tokens_BS)) for each in scored])
        return logits_BSV, auxiliary


@contextmanager
def _routings_in(network: nn.Module) -> Iterator[list[tuple[Router, Routing]]]:
    """What our routers in the network decide while the context is open."""
    routings: list[tuple[Router, Routing]] = []

    def record(router: Any, _: object, routing: Any) -> None:
        routings.append((router, routing))

    routers = [module for module in network.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(record) for router in routers]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


class HostRouter(nn.Module):
    """One of our routers with the outputs of those of transformers."""

    def __init__(self, router: Router) -> None:
        """Wrap the router."""
        super().__init__()
        self.router = router
        self.top_k = router.top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores (T, E) as they are, gate weights in the dtype of the hidden states, and expert ids."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.router(x_TD)
        return routing.scores_TE, routing.weights_TK.to(x_TD.dtype), routing.expert_ids_TK


def replace_routers_(model: nn.Module, router: partial[Router], experts: ExpertShape) -> None:
    """Put one of our routers in the place of each of the model's own.

    Those are the modules named ``...Router`` that return scores, gate weights and expert ids, as transformers has had
    them since version 5.

    Raises:
        ConfigError: The model has none, or the router offers experts that the model has not.
    """
    if router.func is ZeroExpertRouter:
        raise ConfigError(
            "'router' must not be zero_experts for a model of transformers, which has no such experts."
        )
    sizes: dict[str, Any] = {"top_k": experts.top_k, **router.keywords}
    hosts = {
        name: module for name, module in model.named_modules() if type(module).__name__.endswith("Router")
    }
    if not hosts:
        raise ConfigError(
            f"'router' must be native for {type(model).__name__}, which has no router to replace."
        )
    for name, host in hosts.items():
        parent, _, attribute = name.rpartition(".")
        dim = host.get_parameter("weight").shape[-1]
        ours = router(dim, experts.num_experts, **sizes)
        if not isinstance(ours, Router):
            raise ConfigError(
                f"'router' must be one that chooses experts for tokens in {type(model).__name__}, got "
                f"{type(ours).__name__}. Take router=sigmoid_top_k."
            )
        setattr(model.get_submodule(parent), attribute, HostRouter(ours))
