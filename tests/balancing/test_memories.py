from __future__ import annotations

import torch

from moe_plugin.balancing.memories import remember_, stacked


class TestMemories:
    def test_what_a_site_lacks_is_zero(self):
        memories = [{"a": torch.tensor([1.0, 2.0])}, {"b": torch.tensor(3.0)}]
        memory = stacked(memories)
        assert memory["a"].tolist() == [[1.0, 2.0], [0.0, 0.0]]
        assert memory["b"].tolist() == [0.0, 3.0]

    def test_nothing_remembered_is_nothing(self):
        assert stacked([{}, {}]) == {}

    def test_sites_without_tokens_keep_what_they_had(self):
        memories = [{"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0])}]
        before = stacked(memories)
        remember_(
            memories,
            before,
            {"a": before["a"] + 10, "new": torch.tensor([5.0, 6.0])},
            torch.tensor([True, False]),
        )
        assert [memory["a"].tolist() for memory in memories] == [[11.0], [2.0]]
        assert [memory["new"].tolist() for memory in memories] == [5.0, 0.0]

    def test_what_the_rule_left_alone_is_not_written(self):
        memories = [{"a": torch.tensor([1.0])}]
        kept, before = memories[0]["a"], stacked(memories)
        remember_(memories, before, dict(before), torch.tensor([True]))
        assert memories[0]["a"] is kept
