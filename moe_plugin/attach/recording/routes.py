"""Which experts each token of each sequence chose, so that another program can replay the routing of a rollout.

Shape legend: B sequences, S positions, L MoE layers, T tokens (B x S), K experts selected per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from moe_plugin.attach.recording.watching import watching
from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site
from moe_plugin.balancing.recompute import is_recomputation
from moe_plugin.errors import EffectError


class Routes(Mapping[str, Tensor]):
    """The experts of each token by router; int16 (B, S, K), -1 for one that the token does not use.

    Positions of later forwards, such as those of ``generate``, come after those of earlier ones. Padding is recorded
    too: positions are those of the model's input.
    """

    def __init__(self, batch_size: int) -> None:
        """Start without a forward; every one has ``batch_size`` sequences."""
        self.batch_size = batch_size
        self._seen: dict[str, list[Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Return the experts of this router."""
        return torch.cat(self._seen[name], dim=1)

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the routers that ran, in forward order."""
        return iter(self._seen)

    def __len__(self) -> int:
        """Return the number of routers that ran."""
        return len(self._seen)

    def stacked(self) -> Tensor:
        """Return all layers as one tensor, (B, S, L, K); every router must have the same K."""
        return torch.stack(list(self.values()), dim=2)

    def look(self, name: str, selection: Selection, valid_T: Tensor | None) -> None:
        """Take in a forward of a router; see `Site.witnesses`.

        Raises:
            EffectError: If its tokens are not those of the sequences.
        """
        if is_recomputation():
            return
        ids_TK = selection.expert_ids_TK
        if selection.used_TK is not None:
            ids_TK = ids_TK.masked_fill(~selection.used_TK, -1)
        ids_TK = ids_TK.reshape(-1, ids_TK.shape[-1])
        if len(ids_TK) % self.batch_size:
            raise EffectError(
                f"Router {name!r} saw {len(ids_TK)} tokens, which are not whole positions of {self.batch_size} "
                "sequences. Give the number of sequences of each forward as 'batch_size'; 1 if they are packed."
            )
        self._seen.setdefault(name, []).append(
            ids_TK.to(torch.int16).view(self.batch_size, -1, ids_TK.shape[1])
        )

    def check(self) -> None:
        """Check that all routers saw the same positions.

        Raises:
            EffectError: If they did not, or none ran.
        """
        lengths = {name: sum(ids.shape[1] for ids in seen) for name, seen in self._seen.items()}
        if not lengths:
            raise EffectError(
                "No router ran while routes were recorded. Run the model inside the 'with' block."
            )
        if len(set(lengths.values())) != 1:
            raise EffectError(
                f"Every router must see the same positions to record routes, but they saw {lengths}. Leave routers of "
                "some tokens only out with 'sites'."
            )


@contextmanager
def recorded_routes(sites: Mapping[str, Site], batch_size: int) -> Iterator[Routes]:
    """Record the forwards inside.

    Args:
        sites: The routers, by name.
        batch_size: The sequences of each forward.

    Raises:
        EffectError: If routers saw other tokens than those of the sequences.
    """
    routes = Routes(batch_size)
    with watching(sites, {name: partial(routes.look, name) for name in sites}):
        yield routes
    routes.check()
