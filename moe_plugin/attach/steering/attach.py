"""Turn a router that was found into a balanced site, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_plugin.attach.discovery.survey import Found
from moe_plugin.attach.site import Site
from moe_plugin.attach.steering.bias import (
    OWN_NAME,
    add_own_bias_,
    keep_fp32_,
    release_fp32_,
    remove_own_bias_,
)
from moe_plugin.attach.steering.router import unwatch_, watch_
from moe_plugin.attach.token_mask import TokenMask
from moe_plugin.errors import AttachError


def attach_(found: Found, token_mask: TokenMask) -> Site:
    """Give the router a bias, unless its model has one, and make it report to a site.

    Raises:
        AttachError: The model's own bias is sharded over ranks, so that none could move it.
    """
    owner, name = found.bias_owner, found.bias_name
    if owner is None or name is None:
        owner, name = found.module, OWN_NAME
        device = next((tensor.device for tensor in owner.parameters()), torch.device("cpu"))
        add_own_bias_(owner, found.num_experts, device)
    else:
        _refuse_sharded(found.name, name, getattr(owner, name))
        keep_fp32_(owner, name)
    site = Site(
        found.name,
        found.module,
        num_experts=found.num_experts,
        top_k=found.top_k,
        kind=found.kind,
        use=found.use,
        bias_owner=owner,
        bias_name=name,
        host_owns_bias=found.bias_owner is not None,
        zeros_masked=found.zeros_masked,
        proven=found.proven or found.bias_owner is None,
        token_mask=token_mask,
    )
    watch_(found.module, site, found.adapter)
    return site


def _refuse_sharded(router: str, name: str, bias: Tensor) -> None:
    if isinstance(bias, DTensor):
        raise AttachError(
            f"The bias {name!r} of router {router!r} must be whole on every rank, but it is sharded. Shard the model "
            "by moe_plugin.shard_, or pass the bias to fully_shard in 'ignored_params'."
        )


def detach_(site: Site) -> None:
    """Undo `attach_`. A bias that the model owns keeps the values it has learnt."""
    unwatch_(site.router)
    if site.host_owns_bias:
        release_fp32_(site.bias_owner, site.bias_name)
    else:
        remove_own_bias_(site.bias_owner)
