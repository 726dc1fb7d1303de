"""What becomes of the bias of a router that is not trained, as in fine-tuning with LoRA.

Shape legend: D model width, E experts.
"""

from __future__ import annotations

from moe_plugin.attach.settings import FrozenRouters
from moe_plugin.attach.site import Site


def keeps_bias(site: Site, frozen_routers: FrozenRouters) -> bool:
    """Return whether this site's bias must stay as it is.

    With 'auto' it stays if the router is frozen and the model owns a bias that was trained: the two were trained
    together, and experts were chosen by their sum. Any other is balanced.
    """
    if frozen_routers == "balance" or not is_frozen(site):
        return False
    return frozen_routers == "keep" or _was_trained(site)


def is_frozen(site: Site) -> bool:
    """Whether nothing that scores the experts is trained: no matrix of the router with a row or column per expert.

    A router may be a block that holds its experts too, of which some part is trained.
    """
    matrices = [parameter for parameter in site.router.parameters() if parameter.dim() == 2]
    scoring = [matrix for matrix in matrices if site.num_experts in matrix.shape] or matrices
    return not any(matrix.requires_grad for matrix in scoring)


def _was_trained(site: Site) -> bool:
    # On the meta device the values are still to come: then a pretrained model's, which loads them.
    return site.host_owns_bias and (site.bias.is_meta or bool((site.bias != 0).any()))
