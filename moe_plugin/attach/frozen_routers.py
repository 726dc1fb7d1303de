"""Whether the bias of a frozen router moves, as in fine-tuning with LoRA."""

from __future__ import annotations

from moe_plugin.attach.settings import FrozenRouters
from moe_plugin.attach.site import Site


def keeps_bias(site: Site, frozen_routers: FrozenRouters) -> bool:
    """Return whether this site's bias must stay as it is; see `BalanceSettings` for the choices.

    With 'auto' the bias stays if the router is frozen and the model owns a bias that was trained: the two were trained
    together, and their sum chose the experts.
    """
    if frozen_routers == "balance" or not is_frozen(site):
        return False
    return frozen_routers == "keep" or _was_trained(site)


def is_frozen(site: Site) -> bool:
    """Return whether no matrix of the router with a row or column per expert is trained.

    Its other matrices may be: some routers are blocks that also hold their experts.
    """
    matrices = [parameter for parameter in site.router.parameters() if parameter.dim() == 2]
    scoring = [matrix for matrix in matrices if site.num_experts in matrix.shape] or matrices
    return not any(matrix.requires_grad for matrix in scoring)


def _was_trained(site: Site) -> bool:
    # A bias on the meta device has no values yet: a pretrained model will load them.
    return site.host_owns_bias and (site.bias.is_meta or bool((site.bias != 0).any()))
