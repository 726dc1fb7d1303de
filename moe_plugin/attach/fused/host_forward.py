"""Let the fused experts compute a host's layer of experts: on its own parameters, under its own names.

Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_plugin.attach.fused.projections import Projections
from moe_plugin.attach.steering.class_swap import Mixin, swap_, unswap_
from moe_plugin.experts.fused import fused_experts
from moe_plugin.experts.kernels.dtypes import compute_dtype
from moe_plugin.types import Routing

_ATTRIBUTE = "_moe_fusion"


@dataclass
class Fusion:
    """What a layer computed by the fused experts carries.

    Attributes:
        projections: How it holds its projections.
        leaves_out_zeros: Whether pairs of gate weight 0 are skipped: if tokens use different numbers of experts, those
            are not used. Finding them waits for the device.
        has_run: Whether it has run outside of compiled code.
    """

    projections: Projections
    leaves_out_zeros: bool = False
    has_run: bool = False


class FusedHostExperts(Mixin):
    """The forward of a layer of stacked experts with the shapes that its `Projections` describes."""

    _moe_fusion: Fusion

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the selected experts to each token, in the dtype of their weights or of the autocast.

        Args:
            hidden_states: (T, D).
            top_k_index: Expert ids, int64 (T, K).
            top_k_weights: Gate weights, (T, K).

        Returns:
            (T, D) in the dtype of `hidden_states`.
        """
        if not torch.compiler.is_compiling():
            self._moe_fusion.has_run = True
        projections = self._moe_fusion.projections
        # Looked up by name each time: sharding and adapters replace these tensors during a forward.
        gate_up: Tensor = getattr(self, projections.gate_up)
        down: Tensor = getattr(self, projections.down)
        if not projections.input_first:
            gate_up, down = gate_up.mT, down.mT
        used_TK = top_k_weights != 0 if self._moe_fusion.leaves_out_zeros else None
        routing = Routing(top_k_weights, top_k_index, scores_TE=top_k_weights, used_TK=used_TK)
        x_TD = hidden_states.to(compute_dtype(gate_up)).contiguous()
        return fused_experts(x_TD, routing, gate_up, down).to(hidden_states.dtype)


def fuse_(experts: nn.Module, fusion: Fusion) -> None:
    """Let the fused experts compute this layer; see `Fusion`."""
    vars(experts)[_ATTRIBUTE] = fusion
    swap_(experts, FusedHostExperts)


def has_run(experts: nn.Module) -> bool:
    """Return whether a layer given to `fuse_` has been computed since, outside of compiled code."""
    return vars(experts)[_ATTRIBUTE].has_run


def unfuse_(experts: nn.Module) -> None:
    """Undo `fuse_`."""
    unswap_(experts, FusedHostExperts)
    del vars(experts)[_ATTRIBUTE]
