from __future__ import annotations

import torch

from moe_plugin.balancing.reduce import all_reduce_


def reduce_on_rank(rank, results):
    import torch.distributed as dist

    calls = []
    plain = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))[1]
    counts = [torch.arange(3) * (rank + 1), torch.tensor([[rank, 2**40]])]
    all_reduce_(counts)
    results[rank] = ([count.tolist() for count in counts], len(calls))


class TestAllReduce:
    def test_without_process_group_nothing_changes(self):
        counts = [torch.arange(4)]
        all_reduce_(counts)
        assert counts[0].tolist() == [0, 1, 2, 3]

    def test_two_ranks_sum_in_one_collective(self, on_ranks):
        results = on_ranks(2, reduce_on_rank)
        assert results[0] == results[1] == ([[0, 3, 6], [[1, 2**41]]], 1)
