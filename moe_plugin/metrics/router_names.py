"""Names of routers as people read them: what all have in common is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


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
    before = min(_shared(list(paths.values())), room)
    after = min(_shared([path[::-1] for path in paths.values()]), room - before)
    return {name: ".".join(path[max(before - 1, 0) : len(path) - after]) for name, path in paths.items()}


def with_short_tags(scalars: Mapping[str, float], short: Mapping[str, str]) -> dict[str, float]:
    """Return scalars whose tags end in short names of routers, `load_layers/entropy/layers.3`.

    Args:
        scalars: Values by tag; the tags of one router end in its name.
        short: What `short_names` returns.
    """
    tags = {tag: tag.rpartition("/") for tag in scalars}
    return {
        f"{kind}{slash}{short.get(name, name)}": scalars[tag] for tag, (kind, slash, name) in tags.items()
    }


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """Return how many first parts all paths share."""
    differ = (place for place, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1)
    return next(differ, min(map(len, paths)))
