"""Turn a found router into a balanced site, and back."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from moe_plugin.attach.discovery.routing_style import BiasPlace, FoundRouter
from moe_plugin.attach.settings import BalanceSettings
from moe_plugin.attach.site import Site
from moe_plugin.attach.steering import bias
from moe_plugin.attach.steering.router import unwatch_, watch_
from moe_plugin.attach.token_mask import TokenMask
from moe_plugin.errors import AttachError


def attach_(found: FoundRouter, token_mask: TokenMask, settings: BalanceSettings) -> Site:
    """Give the router a bias, unless its model has one, and make it report to a site.

    Args:
        found: The router.
        token_mask: The mask of the model's forward.
        settings: Whether the first training forward is to prove that a bias does what it must, and where a bias goes.

    Raises:
        AttachError: If the model's own bias is sharded over ranks, so it cannot be moved.
    """
    place = found.bias
    if place is None:
        place = BiasPlace(found.module, bias.OWN_NAME)
        device = next((tensor.device for tensor in found.module.parameters()), torch.device("cpu"))
        persistent = settings.bias_in_state_dict
        bias.add_own_bias_(found.module, found.style.num_experts, device, persistent=persistent)
    else:
        _refuse_sharded(found.name, place)
        bias.keep_fp32_(place.owner, place.name)
    site = Site(found, place, token_mask)
    site.is_verified = not settings.verify
    watch_(site)
    return site


def detach_(site: Site) -> None:
    """Undo `attach_`. A bias that the model owns keeps its learnt values."""
    unwatch_(site.router)
    if site.host_owns_bias:
        bias.release_fp32_(site.bias_place.owner, site.bias_place.name)
    else:
        bias.remove_own_bias_(site.bias_place.owner)


def _refuse_sharded(router: str, place: BiasPlace) -> None:
    if isinstance(place.tensor(), DTensor):
        raise AttachError(
            f"The bias {place.name!r} of router {router!r} must be whole on every rank, but it is sharded. Shard the "
            "model by moe_plugin.shard_, or pass the bias to fully_shard in 'ignored_params'."
        )
