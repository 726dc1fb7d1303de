"""Write the section of docs/models.md about repositories beyond transformers.

``python -m tests.strangers`` takes about a minute, and needs no network. It exits with 1 if a block is wrong.
"""

from __future__ import annotations

import sys

import torch

from tests.strangers.table import PAGE, section, with_section


def main() -> int:
    """Run every block and write the section; return the exit status."""
    torch.set_num_threads(1)
    made = section()
    PAGE.write_text(with_section(PAGE.read_text(), made))
    wrong = [row for row in made.splitlines() if "| wrong: " in row]
    sys.stdout.write("\n".join([*wrong, f"{len(wrong)} wrong: {PAGE}", ""]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
