"""A causal language model of Hugging Face transformers, trained from random weights like our own.

Shape legend: B batch, S sequence, T tokens (B x S), D model width, E experts, V vocabulary.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.apps.models.language_model import TokenModel
from moe_plugin.apps.models.optimizer import AdamWWarmupCosine
from moe_plugin.apps.models.transformer import routings_of
from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertShape
from moe_plugin.losses import AuxiliaryLoss, load_statistics
from moe_plugin.routing import Router, ZeroExpertRouter
from moe_plugin.routing.rankings import tell_tokens_


def native_router() -> None:
    """Stand for the model's own router in the configuration."""


class HuggingFaceModel(TokenModel):
    """A language model of transformers with its own router, or with our router in its place."""

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
            ConfigError: The model has other shared experts, or its own router is to have an auxiliary loss.
        """
        num_shared = getattr(config, "n_shared_experts", 0)
        if experts.num_shared != num_shared:
            rule = f"must be {num_shared}, the shared experts of this {config.model_type}"
            fix = f"Set experts.num_shared={num_shared}."
            raise ConfigError("experts.num_shared", rule, experts.num_shared, fix)
        if router is None and auxiliary_loss is not None:
            given, fix = (
                type(auxiliary_loss).__name__,
                "Choose another router, or balancing=loss_free or none.",
            )
            raise ConfigError("balancing.auxiliary_loss", "must be null with router=native", given, fix)
        network = HuggingFaceNetwork(config, router, experts)
        super().__init__(
            network, context_length=context_length, optimizer=optimizer, auxiliary_loss=auxiliary_loss
        )


class HuggingFaceNetwork(nn.Module):
    """Token ids to logits by a model of transformers."""

    def __init__(self, config: Any, router: partial[Router] | None, experts: ExpertShape) -> None:
        """Create the model and put the router in, see `HuggingFaceModel`."""
        from transformers import AutoModelForCausalLM

        super().__init__()
        with warnings.catch_warnings():
            # A model without shared experts still has them, with no width.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
            self.model = AutoModelForCausalLM.from_config(config)
        for parameter in self.model.parameters():
            # Without elements there is nothing to train, and no shard that a strategy could give the optimizer.
            parameter.requires_grad_(parameter.numel() > 0)
        if router is not None:
            replace_routers_(self.model, router, experts)

    def forward(
        self, tokens_BS: Tensor, auxiliary_loss: AuxiliaryLoss | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits (B, S, V), and the auxiliary losses of the layers added up."""
        tell_tokens_(self, tokens_BS)
        with routings_of(module for module in self.modules() if isinstance(module, Router)) as routings:
            logits_BSV = self.model(input_ids=tokens_BS, use_cache=False).logits
        auxiliary = logits_BSV.new_zeros((), dtype=torch.float32)
        if auxiliary_loss is not None:
            scored = [
                (routing, router.score.probabilities(routing.scores_TE)) for router, routing in routings
            ]
            auxiliary = auxiliary_loss([load_statistics(*each, len(tokens_BS)) for each in scored])
        return logits_BSV, auxiliary


class HostRouter(nn.Module):
    """One of our routers with the outputs of a transformers router."""

    def __init__(self, router: Router) -> None:
        """Wrap the router."""
        super().__init__()
        self.router = router
        self.top_k = router.top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores (T, E), gate weights in the dtype of the hidden states, and expert ids."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.router(x_TD)
        return routing.scores_TE, routing.weights_TK.to(x_TD.dtype), routing.expert_ids_TK


def replace_routers_(model: nn.Module, router: partial[Router], experts: ExpertShape) -> None:
    """Replace each router of the model by our own, in place.

    The model's are modules named ``...Router`` that return scores, gate weights and expert ids, as in transformers
    since version 5.

    Args:
        model: A model of transformers.
        router: Router without its sizes.
        experts: Sizes of the expert layers.

    Raises:
        ConfigError: The model has no router, or the new one offers experts that the model does not have.
    """
    if router.func is ZeroExpertRouter:
        raise ConfigError(
            "router", "must be one without zero experts for a model of transformers", "zero_experts"
        )
    sizes: dict[str, Any] = {"top_k": experts.top_k, **router.keywords}
    kind = type(model).__name__
    hosts = {
        name: module for name, module in model.named_modules() if type(module).__name__.endswith("Router")
    }
    if not hosts:
        rule = f"must be native for {kind}, which has no router to replace"
        raise ConfigError("router", rule, router.func.__name__)
    for name, host in hosts.items():
        parent, _, attribute = name.rpartition(".")
        dim = host.get_parameter("weight").shape[-1]
        ours = router(dim, experts.num_experts, **sizes)
        if not isinstance(ours, Router):
            rule = f"must be one that chooses experts for tokens in {kind}"
            raise ConfigError("router", rule, type(ours).__name__, "Take router=sigmoid_top_k.")
        setattr(model.get_submodule(parent), attribute, HostRouter(ours))
