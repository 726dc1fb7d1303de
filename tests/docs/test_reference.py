"""Generated pages are what the code says now; make reference writes them."""

from __future__ import annotations

import pytest

from docs.generate.pages import PAGES, REFERENCE


@pytest.mark.parametrize("name", PAGES)
def test_page_is_as_generated(name):
    assert (REFERENCE / name).read_text() == PAGES[name](), "run: make reference"


def test_every_file_is_generated():
    assert {path.name for path in REFERENCE.iterdir()} == set(PAGES)
