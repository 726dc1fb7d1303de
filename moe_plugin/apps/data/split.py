"""Splits files into training and validation, by file and alike in every domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from moe_plugin.apps.data.documents import Document, sha256
from moe_plugin.errors import ConfigError

Sizes = Mapping[str, Mapping[str, int]]
"""File -> domain -> bytes."""


def file_sizes(documents: Iterable[Document]) -> dict[str, dict[str, int]]:
    """Return bytes of each file by domain, in the documents' order."""
    sizes: dict[str, dict[str, int]] = {}
    for document in documents:
        domains = sizes.setdefault(document.file, {})
        domains[document.domain] = domains.get(document.domain, 0) + len(document.text.encode())
    return sizes


def validation_files(sizes: Sizes, fraction: float) -> frozenset[str]:
    """Choose the files held out for validation.

    In the order of a hash of their names, a file is taken when that brings the domains' held-out shares closer to
    `fraction` (in the sum of squares); then files are moved across as long as that still brings them closer. A
    domain left without any takes its smallest file.

    Args:
        sizes: File -> domain -> bytes.
        fraction: Share of each domain's bytes to hold out, in (0, 1).

    Returns:
        Names of the files to validate on.

    Raises:
        ConfigError: If a domain has too few files to be on both sides.
    """
    total = _total(sizes.values())
    missing = {domain: fraction * size for domain, size in total.items()}
    chosen: set[str] = set()
    while any([_move(file, sizes[file], chosen, missing, total) for file in sorted(sizes, key=sha256)]):
        pass
    for domain in sorted(total):
        if not any(domain in sizes[file] for file in chosen):
            chosen.add(min((f for f in sizes if domain in sizes[f]), key=lambda f: (sizes[f][domain], f)))
    _check_both_sides(sizes, chosen)
    return frozenset(chosen)


def _move(
    file: str, size: Mapping[str, int], chosen: set[str], missing: dict[str, float], total: Counter[str]
) -> bool:
    """Move `file` to the other side if the shares `missing` from validation get smaller; return whether it did."""
    sign = -1 if file not in chosen else 1
    moved = {domain: missing[domain] + sign * size[domain] for domain in size}
    before = {domain: missing[domain] for domain in size}
    if _distance(moved, total) > _distance(before, total) - 1e-9:  # a strict gain: the moves end
        return False
    missing.update(moved)
    chosen ^= {file}
    return True


def _distance(missing: Mapping[str, float], total: Counter[str]) -> float:
    return sum((bytes_ / total[domain]) ** 2 for domain, bytes_ in missing.items())


def _check_both_sides(sizes: Sizes, chosen: set[str]) -> None:
    trained = {domain for file in sizes if file not in chosen for domain in sizes[file]}
    for domain in sorted(_total(sizes.values())):
        if domain not in trained:
            count = sum(domain in domains for domains in sizes.values())
            rule = (
                f"must have 2 files or more in domain '{domain}', as training and validation never share one"
            )
            raise ConfigError("source", rule, count, "Add files to it or merge it into another domain.")


def _total(sizes: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for domains in sizes:
        total.update(domains)
    return total
