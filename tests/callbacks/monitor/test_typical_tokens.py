from __future__ import annotations

import torch

from moe_plugin.callbacks.monitor.expert_profiles import expert_profiles, profile_table
from moe_plugin.callbacks.monitor.token_kinds import TokenKinds
from moe_plugin.callbacks.monitor.typical_tokens import AFTER, BEFORE, SHOWN, TypicalTokens

EXPERTS, B, S = 3, 4, 40


class Letters:
    token_bytes = tuple(bytes([32 + token]) for token in range(90))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(0, 90, (B, S), generator=generator)
    ids_TK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(B * S)])
    scores_TK = torch.rand(B * S, 2, generator=generator)
    scores_TK[torch.rand(B * S, 2, generator=generator) < 0.3] = -torch.inf
    return scores_TK, ids_TK, tokens_BS


class TestSnippets:
    def test_are_the_best_scores_of_all_batches_with_their_text(self):
        typical, best = TypicalTokens(EXPERTS), {expert: [] for expert in range(EXPERTS)}
        for seed in range(3):
            scores_TK, ids_TK, tokens_BS = batch(seed)
            typical.add_(scores_TK, ids_TK, tokens_BS)
            for token in range(B * S):
                text, place = "".join(chr(32 + t) for t in tokens_BS[token // S].tolist()), token % S
                parts = (
                    text[max(place - BEFORE, 0) : place],
                    text[place],
                    text[place + 1 : place + 1 + AFTER],
                )
                for score, expert in zip(scores_TK[token].tolist(), ids_TK[token].tolist(), strict=True):
                    best[expert].append((score, parts))
        for expert, snippets in enumerate(typical.snippets(TokenKinds(Letters()))):
            expected = [parts for _, parts in sorted(best[expert], reverse=True)[:SHOWN]]
            assert snippets == expected

    def test_expert_without_tokens_has_none(self):
        typical = TypicalTokens(2)
        typical.add_(torch.ones(B * S, 1), torch.zeros(B * S, 1, dtype=torch.int64), batch(0)[2])
        assert typical.snippets(TokenKinds(Letters()))[1] == []

    def test_like_places_are_shown_once(self):
        typical = TypicalTokens(1)
        tokens_BS = torch.arange(10).repeat(4, 4)
        typical.add_(torch.rand(160, 1), torch.zeros(160, 1, dtype=torch.int64), tokens_BS)
        (snippets,) = typical.snippets(TokenKinds(Letters()))
        assert len({(before[-4:], token) for before, token, _ in snippets}) == len(snippets) > 1


class TestProfiles:
    def test_top_kinds_are_those_above_chance(self):
        counts = {"domain": torch.tensor([[30, 10], [0, 20]]).numpy()}
        first, second = expert_profiles(counts, {"domain": ["code", "prose"]}, [[("a", "b", "c|`\n")], []])
        assert first["load"] == 1.0
        assert first["kinds"]["domain"] == [("code", 1.5)]
        assert second["kinds"]["domain"] == [("prose", 2.0)]
        table = profile_table([first, second])
        assert table.splitlines()[2] == "| 0 | 1.00 | code 1.5x | `a[b]c¦'↵` |"
        assert all(line.count("|") == 5 for line in table.splitlines())

    def test_no_line_of_a_cell_is_longer_than_a_kind_or_a_text(self):
        kinds = {"domain": [("code", 2.1), ("prose", 1.3)], "syntax": [("name", 1.8)]}
        text = ("a" * 20, "b", "c" * 12)
        table = profile_table([{"expert": 0, "load": 1.0, "kinds": kinds, "snippets": [text] * 4}])
        cells = [cell.split("<br>") for cell in table.splitlines()[2].strip("| ").split(" | ")]
        expected = [
            ["0"],
            ["1.00"],
            ["code 2.1x", "prose 1.3x"],
            ["name 1.8x"],
            [f"`{'a' * 20}[b]{'c' * 12}`"] * 4,
        ]
        assert cells == expected
