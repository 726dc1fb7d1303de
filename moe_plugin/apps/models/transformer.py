"""A decoder-only transformer with mixture-of-experts feed-forward networks.

Shape legend: B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_plugin.apps.models.attention import CausalSelfAttention, Rotary, rotary_table
from moe_plugin.apps.models.rms_norm import RMSNorm
from moe_plugin.experts import Linear, MoEBlock
from moe_plugin.experts.linear import linear
from moe_plugin.losses import AuxiliaryLoss, LoadStatistics, load_statistics
from moe_plugin.routing import Router
from moe_plugin.routing.rankings import tell_tokens_
from moe_plugin.types import Routing

ActivationCheckpointing = Literal["reentrant", "non_reentrant"]


class TransformerLayer(nn.Module):
    """Attention and a feed-forward network, each on the normalised residual stream."""

    def __init__(
        self,
        dim: int,
        attention: CausalSelfAttention,
        feed_forward: nn.Module,
        activation_checkpointing: ActivationCheckpointing | None = None,
    ) -> None:
        """Compose the layer.

        Args:
            dim: Model width.
            attention: Mixes positions.
            feed_forward: Maps (B, S, D) to (B, S, D): a `SwiGLU` or a `MoEBlock`.
            activation_checkpointing: Keep only the layer's input for the backward, and recompute the rest.
        """
        super().__init__()
        self.attention_norm = RMSNorm(dim)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(dim)
        self.feed_forward = feed_forward
        self.activation_checkpointing = activation_checkpointing

    def forward(
        self, x_BSD: Tensor, rotary: Rotary, *, measure: bool = False
    ) -> tuple[Tensor, LoadStatistics | None]:
        """Run the layer.

        Args:
            x_BSD: Residual stream.
            rotary: See `rotary_table`.
            measure: Also return what the router decided, for auxiliary losses.

        Returns:
            The residual stream, and the router's decisions; None without a router, or unless `measure`.
        """
        if self.activation_checkpointing is None or not torch.is_grad_enabled():
            x_BSD, *statistics = self._forward(x_BSD, rotary, measure)
        else:
            reentrant = self.activation_checkpointing == "reentrant"
            # Nothing in the layer is random, so there is no generator state to keep.
            x_BSD, *statistics = checkpoint(
                self._forward, x_BSD, rotary, measure, use_reentrant=reentrant, preserve_rng_state=False
            )  # pyright: ignore[reportGeneralTypeIssues]
        return x_BSD, LoadStatistics(*statistics) if statistics else None

    def _forward(self, x_BSD: Tensor, rotary: Rotary, measure: bool) -> tuple[Tensor, ...]:
        """Return the residual stream and the parts of `LoadStatistics`: flat, as checkpointing wants outputs."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary)
        if not measure or not isinstance(self.feed_forward, MoEBlock):
            return (x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD)),)
        with routings_of([self.feed_forward.router]) as routings:
            x_BSD = x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))
        ((router, routing),) = routings
        return x_BSD, *load_statistics(routing, router.score.probabilities(routing.scores_TE), len(x_BSD))


@contextmanager
def routings_of(routers: Iterable[nn.Module]) -> Iterator[list[tuple[Router, Routing]]]:
    """Record what routers decide while the context is open."""
    routings: list[tuple[Router, Routing]] = []

    def record(router: Any, _: object, routing: Any) -> None:
        routings.append((router, routing))

    hooks = [router.register_forward_hook(record) for router in routers]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


class Transformer(nn.Module):
    """Token ids to logits."""

    def __init__(
        self, vocab_size: int, dim: int, layers: Sequence[TransformerLayer], *, tie_embeddings: bool = False
    ) -> None:
        """Compose the network.

        Args:
            vocab_size: Token ids are in [0, vocab_size).
            dim: Model width.
            layers: The layers, first to last; at least one.
            tie_embeddings: Use the token embedding as output projection too.
        """
        super().__init__()
        self.embedding = Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(dim)
        self.head_dim = layers[0].attention.head_dim
        # Tied by use, not by sharing a Parameter between two modules, which `to_empty` would separate.
        gain = self.embedding.std * dim**0.5
        self.head = None if tie_embeddings else Linear(dim, vocab_size, gain=gain)

    def forward(
        self, token_ids_BS: Tensor, auxiliary_loss: AuxiliaryLoss | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict the next token at each position.

        Args:
            token_ids_BS: Token ids, int64.
            auxiliary_loss: Loss on the routers' decisions.

        Returns:
            logits_BSV, and the auxiliary loss: a scalar, fp32; 0 without routers or a loss.
        """
        tell_tokens_(self, token_ids_BS)
        x_BSD = self.embedding(token_ids_BS)
        rotary = rotary_table(token_ids_BS.shape[1], self.head_dim, token_ids_BS.device)
        measured: list[LoadStatistics] = []
        for layer in self.layers:
            x_BSD, statistics = layer(x_BSD, rotary, measure=auxiliary_loss is not None)
            measured += [statistics] if statistics is not None else []
        zero = x_BSD.new_zeros((), dtype=torch.float32)
        auxiliary = auxiliary_loss(measured) if auxiliary_loss is not None and measured else zero
        x_BSD = self.norm(x_BSD)
        if self.head is None:
            return linear(x_BSD, self.embedding.weight), auxiliary
        return self.head(x_BSD), auxiliary


class Embedding(nn.Embedding):
    """`nn.Embedding` with a small initial standard deviation."""

    std = 0.02

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=self.std)
