"""Names of routers as people read them: what all have in common is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os.path import commonprefix


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return a short name for each router: `network.layers.3.feed_forward.router` becomes `layers.3`.

    The parts at both ends that all names share are cut, except the one before the first difference. Short names differ
    as the names do. A single name stays whole, since nothing shows which part matters.

    Args:
        names: Paths of all routers of a model.
    """
    paths = {name: name.split(".") for name in names}
    if len(paths) < 2:
        return {name: name for name in paths}
    room = min(map(len, paths.values())) - 1
    before = min(len(commonprefix(list(paths.values()))), room)
    after = min(len(commonprefix([path[::-1] for path in paths.values()])), room - before)
    return {
        name: ".".join(path[max(before - 1, 0) : len(path) - after]) for name, path in paths.items()
    }


def with_short_tags(scalars: Mapping[str, float], short: Mapping[str, str]) -> dict[str, float]:
    """Return scalars whose tags end in short names of routers, `load_layers/entropy/layers.3`.

    Args:
        scalars: Values by tag; the tags of one router end in its name.
        short: What `short_names` returns.
    """
    tags = {tag: tag.rpartition("/") for tag in scalars}
    return {f"{kind}{slash}{short.get(name, name)}": scalars[tag] for tag, (kind, slash, name) in tags.items()}
