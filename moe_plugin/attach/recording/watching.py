"""Show every selection of some sites to an observer for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from moe_plugin.attach.site import Observer, Site


@contextmanager
def watching(sites: Mapping[str, Site], observers: Mapping[str, Observer]) -> Iterator[None]:
    """Show each selection of a site to its observer; it counts as usual.

    Compiled code runs uncompiled meanwhile, since nothing outside sees what it selects.

    Args:
        sites: By name.
        observers: The observer of each site, by its name.
    """
    key = object()
    for name, site in sites.items():
        site.witnesses[key] = observers[name]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for site in sites.values():
            del site.witnesses[key]
