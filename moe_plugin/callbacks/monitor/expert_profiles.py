"""The tokens that each expert of a layer takes, in words: their top kinds, and typical text.

Shape legend: G kinds of tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_plugin.callbacks.monitor.typical_tokens import Snippet
from moe_plugin.plots.lift import lift

TOP = 2
"""Number of kinds that are named."""
LINE = "<br>"
"""Ends a line in a cell."""


def expert_profiles(
    counts: Mapping[str, np.ndarray],
    names: Mapping[str, Sequence[str]],
    snippets: Sequence[Sequence[Snippet]],
) -> list[dict[str, Any]]:
    """Describe the experts that have snippets.

    Args:
        counts: By kind, how often tokens of each kind used each expert; integers (G, E).
        names: By kind, the names of its numbers (G).
        snippets: For each of the first experts, its typical text.

    Returns:
        For each expert `expert`, its `load` over the ideal load, `kinds` (by kind, names with how often the expert
        takes them over chance, the highest first, only those above 1), and `snippets`.
    """
    tokens_E = next(iter(counts.values())).sum(0)
    ideal = max(tokens_E.mean(), 1e-9)
    lifts = {kind: np.exp2(lift(table_GE)) for kind, table_GE in counts.items()}
    return [
        {
            "expert": expert,
            "load": round(float(tokens_E[expert] / ideal), 3),
            "kinds": {kind: _top(lifts_GE[:, expert], names[kind]) for kind, lifts_GE in lifts.items()},
            "snippets": [list(snippet) for snippet in of_expert],
        }
        for expert, of_expert in enumerate(snippets)
    ]


def profile_table(experts: Sequence[Mapping[str, Any]]) -> str:
    """Return the experts of a layer as a table in Markdown.

    Each kind and each text has its own line: TensorBoard breaks words of narrow columns next to a wide one.
    """
    kinds = list(experts[0]["kinds"]) if experts else []
    lines = [
        "| expert | load | " + " | ".join(kinds) + " | typical text, at `[the token]` |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for each in experts:
        cells = [LINE.join(f"{name} {ratio:.1f}x" for name, ratio in each["kinds"][kind]) for kind in kinds]
        texts = LINE.join(
            f"`{_plain(before)}[{_plain(token)}]{_plain(after)}`" for before, token, after in each["snippets"]
        )
        lines.append(f"| {each['expert']} | {each['load']:.2f} | " + " | ".join([*cells, texts]) + " |")
    return "\n".join(lines)


def _top(lifts_G: np.ndarray, names: Sequence[str]) -> list[tuple[str, float]]:
    order = np.argsort(-np.nan_to_num(lifts_G))[:TOP]
    return [(names[int(place)], round(float(lifts_G[place]), 2)) for place in order if lifts_G[place] > 1]


def _plain(text: str) -> str:
    """Return the text on one line, without the characters that end a cell or code in Markdown."""
    shown = text.replace("\n", "↵").replace("\t", "→").replace("|", "¦").replace("`", "'")
    return "".join(character if character.isprintable() else "·" for character in shown)
