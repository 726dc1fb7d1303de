"""Links between pages lead to files and headings that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import NAMES, ROOT

FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
MADE_BY_THE_SITE = ("docs/reference/api.md",)
"""Anchors of names are made from docstrings when the site is built, which checks links to them."""


def links(page: Path) -> list[str]:
    """Return the targets of a page's links that are not on the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text())))
    return [target for target in found if not target.startswith(("http://", "https://", "mailto:"))]


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("name", [*NAMES, "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        known = not anchor or str(file.relative_to(ROOT)) in MADE_BY_THE_SITE or anchor in anchors(file)
        if not (file.exists() and known):
            broken.append(target)
    assert broken == []
