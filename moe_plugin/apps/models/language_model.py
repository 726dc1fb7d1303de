"""The reference language model as a LightningModule.

Shape legend: B batch, S sequence, T tokens (B x S), V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional
from torch.nn.utils import clip_grad_value_
from torch.optim import Optimizer

from moe_plugin.apps.models.attention import CausalSelfAttention
from moe_plugin.apps.models.clipping import clip_gradients_
from moe_plugin.apps.models.optimizer import AdamWWarmupCosine
from moe_plugin.apps.models.tensor_parallel import tensor_parallel_
from moe_plugin.apps.models.transformer import ActivationCheckpointing, Transformer, TransformerLayer
from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertChoiceBlock, ExpertShape, GroupedExperts, MoEBlock, SwiGLU, ZeroExperts
from moe_plugin.losses import AuxiliaryLoss
from moe_plugin.number_checks import check_integer, check_positive_integers
from moe_plugin.routing import ExpertChoiceRouter, Router, ZeroExpertRouter
from moe_plugin.sharding import materialize_, shard_

Batch = dict[str, Tensor]


class TokenModel(lightning.LightningModule):
    """Trains a network to predict the next token.

    Batches are `{"tokens": int64 (B, S + 1), ...}`: inputs are all tokens but the last, targets all but the first.
    `train/loss` and `val/loss` are cross-entropies in nats, means over the tokens of a micro-batch of all ranks and of
    the validation set.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        context_length: int,
        optimizer: AdamWWarmupCosine | None = None,
        auxiliary_loss: AuxiliaryLoss | None = None,
    ) -> None:
        """Take the network.

        Args:
            network: Called with token ids (B, S) and `auxiliary_loss`; returns logits (B, S, V) and the sum of the
                auxiliary losses over its layers, a scalar.
            context_length: Longest sequence S.
            optimizer: Optimizer and schedule, by default `AdamWWarmupCosine()`.
            auxiliary_loss: Balancing loss; its sum over the layers is added to the cross-entropy.
        """
        super().__init__()
        self.network = network
        self.context_length = context_length
        self.optimizer = optimizer or AdamWWarmupCosine()
        self.auxiliary_loss = auxiliary_loss

    def configure_model(self) -> None:
        """Spread the network over the strategy's device mesh, if any, and draw parameters without storage."""
        if self.device_mesh is not None:
            tensor_parallel_(self.network, self.device_mesh["tensor_parallel"])
            experts_over = getattr(self.trainer.strategy, "expert_parallel_size", 1)
            shard_(self.network, self.device_mesh, expert_parallel_size=experts_over)
        materialize_(self.network, self.trainer.strategy.root_device)

    def forward(self, token_ids_BS: Tensor) -> Tensor:
        """Predict the next token: logits (B, S, V)."""
        return self.network(token_ids_BS)[0]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tell the auxiliary loss where the micro-batches of an optimizer step begin."""
        if self.auxiliary_loss is not None and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.auxiliary_loss.start_window_()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return cross-entropy plus auxiliary loss."""
        cross_entropy, auxiliary = self._losses(batch)
        self._log_step("train/loss", cross_entropy)
        if self.auxiliary_loss is None:
            return cross_entropy
        self._log_step("train/auxiliary_loss", auxiliary)
        return cross_entropy + auxiliary

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Log `val/loss`, and give callbacks the loss of each token, in nats: `token_losses` (B, S)."""
        losses_BS = self.token_losses(batch)
        self._log_token_mean("val/loss", losses_BS.mean(), batch)
        return {"token_losses": losses_BS}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `test/loss`."""
        self._log_token_mean("test/loss", self._losses(batch)[0], batch)

    def token_losses(self, batch: Batch) -> Tensor:
        """Return cross-entropy of the prediction of each token, in nats; fp32 (B, S)."""
        targets_BS = batch["tokens"][:, 1:]
        logits_TV = self._predict(batch)[0]
        return functional.cross_entropy(logits_TV, targets_BS.flatten(), reduction="none").view_as(targets_BS)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule over all steps of the fit.

        Raises:
            ConfigError: The trainer does not know how many steps it will take.
        """
        total_steps = self.trainer.estimated_stepping_batches
        # Infinite for an endless number of epochs, -1 for an endless loader.
        if math.isinf(total_steps) or total_steps < 0:
            rule = "must be >= 1 in an endless run, because the learning-rate schedule uses it"
            raise ConfigError("trainer.max_steps", rule, self.trainer.max_steps)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        optimizer = self.optimizer.optimizer(self.parameters(), fused=scaler is None)
        schedule = self.optimizer.schedule(optimizer, int(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as asked. Lightning cannot clip by norm over several meshes or under FSDP1, or, fused, in bf16."""
        root = self.trainer.strategy.model
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            clip_grad_value_(self.parameters(), gradient_clip_val)
        elif isinstance(root, FullyShardedDataParallel):
            root.clip_grad_norm_(gradient_clip_val)
        else:
            clip_gradients_(self.parameters(), gradient_clip_val)

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits_TV, auxiliary = self._predict(batch)
        return functional.cross_entropy(logits_TV, batch["tokens"][:, 1:].flatten()), auxiliary

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits in fp32, (B x S, V), and the auxiliary loss."""
        tokens = batch["tokens"]
        if tokens.shape[1] - 1 > self.context_length:
            rule = f"must have at most context_length + 1 ({self.context_length + 1}) columns"
            raise ConfigError("tokens", rule, tokens.shape[1])
        logits_BSV, auxiliary = self.network(tokens[:, :-1], self.auxiliary_loss)
        return logits_BSV.flatten(0, 1).float(), auxiliary

    def _log_step(self, name: str, value: Tensor) -> None:
        # `sync_dist=True` would make all ranks wait for one another in every step, `prog_bar=True` each for its device.
        # Between the steps that are logged the progress bar shows this rank's own value.
        value = value.detach()
        if self.trainer._logger_connector.should_update_logs:
            value = self.trainer.strategy.reduce(value, reduce_op="mean")
        self.log(name, value)

    def _log_token_mean(self, name: str, value: Tensor, batch: Batch) -> None:
        # Lightning weighs by batch size, over batches and over ranks: with the number of tokens as batch size the
        # mean is over tokens, whatever the sizes of the batches. Over ranks it takes an integer mean of the sizes,
        # which truncates unless they are multiples of the world size.
        weight = batch["tokens"][:, 1:].numel() * self.trainer.world_size
        self.log(name, value.detach(), batch_size=weight, sync_dist=True, prog_bar=True)


class LanguageModel(TokenModel):
    """A decoder-only mixture-of-experts language model."""

    network: Transformer

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        router: partial[Router] | None,
        experts: ExpertShape,
        dense_hidden_dim: int | None = None,
        num_dense: int = 0,
        moe_every: int = 1,
        tie_embeddings: bool = False,
        activation_checkpointing: ActivationCheckpointing | None = None,
        optimizer: AdamWWarmupCosine | None = None,
        auxiliary_loss: AuxiliaryLoss | None = None,
    ) -> None:
        """Create the model.

        Args:
            vocab_size: Token ids are in [0, vocab_size).
            context_length: Longest sequence S.
            dim: Model width.
            num_layers: Layers.
            num_heads: Attention heads.
            router: Router without its sizes; its `top_k`, if it has one, replaces that of `experts`.
            experts: Sizes of the expert layers.
            dense_hidden_dim: Hidden width of the dense layers; by default that of a token's experts together.
            num_dense: Dense layers at the start.
            moe_every: After those, every n-th layer has experts and the others are dense.
            tie_embeddings: Use the token embedding as output projection too.
            activation_checkpointing: Recompute the layers in the backward: "reentrant" or "non_reentrant".
            optimizer: Optimizer and schedule, see `TokenModel`.
            auxiliary_loss: Balancing loss, see `TokenModel`.

        Raises:
            ConfigError: A size is out of range, or sizes do not fit together.
        """
        if router is None:
            raise ConfigError("router", "must be our own for this model", "native", "Take sigmoid_top_k.")
        if dense_hidden_dim is None:
            dense_hidden_dim = (experts.top_k + experts.num_shared) * experts.hidden_dim
        check_positive_integers(vocab_size=vocab_size, context_length=context_length, dim=dim)
        check_positive_integers(num_layers=num_layers, moe_every=moe_every, dense_hidden_dim=dense_hidden_dim)
        _validate_choices(num_layers, num_dense, activation_checkpointing)
        # Each layer adds to the residual stream twice: keep its variance at 1 over the depth.
        gain, layers = (2 * num_layers) ** -0.5, []
        for layer in range(num_layers):
            attention = CausalSelfAttention(dim, num_heads, residual_gain=gain)
            if layer >= num_dense and (layer - num_dense + 1) % moe_every == 0:
                feed_forward = moe_block(dim, router, experts, gain)
            else:
                feed_forward = SwiGLU(dim, dense_hidden_dim, residual_gain=gain)
            layers.append(TransformerLayer(dim, attention, feed_forward, activation_checkpointing))
        network = Transformer(vocab_size, dim, layers, tie_embeddings=tie_embeddings)
        super().__init__(
            network, context_length=context_length, optimizer=optimizer, auxiliary_loss=auxiliary_loss
        )


def moe_block(
    dim: int, router: partial[Router], experts: ExpertShape, residual_gain: float = 1.0
) -> MoEBlock | ExpertChoiceBlock:
    """Return an expert layer with its router and shared experts.

    Args:
        dim: Model width.
        router: Router without its sizes.
        experts: Sizes of the layer.
        residual_gain: Initial gain of the projections that write to the residual stream.
    """
    sizes: dict[str, Any] = {"top_k": experts.top_k, **router.keywords}
    shared = None
    if experts.num_shared:
        shared = SwiGLU(dim, experts.num_shared * experts.hidden_dim, residual_gain=residual_gain)
    gate = router(dim, experts.num_experts, **sizes)
    grouped = GroupedExperts(experts.num_experts, dim, experts.hidden_dim, residual_gain=residual_gain)
    if isinstance(gate, ExpertChoiceRouter):
        return ExpertChoiceBlock(gate, grouped, shared)
    zero_experts = None
    if isinstance(gate, ZeroExpertRouter):
        zero_experts = ZeroExperts(experts.num_experts, dim, gate.zero_experts)
    return MoEBlock(gate, grouped, shared, zero_experts)


def _validate_choices(num_layers: int, num_dense: int, activation_checkpointing: str | None) -> None:
    check_integer("num_dense", num_dense, least=0)
    if num_dense > num_layers:
        raise ConfigError("num_dense", f"must be <= num_layers ({num_layers})", num_dense)
    if activation_checkpointing not in (None, "reentrant", "non_reentrant"):
        rule = "must be null, 'reentrant' or 'non_reentrant'"
        raise ConfigError("activation_checkpointing", rule, activation_checkpointing)
