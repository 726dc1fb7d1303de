"""Write the generated pages of docs/reference: ``python -m docs.generate``, in the repository's root."""

from __future__ import annotations

import sys

from docs.generate.pages import PAGES, REFERENCE


def main() -> None:
    """Write every page that is generated."""
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
        sys.stdout.write(f"{REFERENCE / name}\n")


if __name__ == "__main__":
    main()
