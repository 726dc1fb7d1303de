from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.apps.data.order import Share, StepOrder, shuffled
from moe_plugin.errors import ConfigError


def order(num_sequences=50, batch_size=8, seed=0, **share):
    return StepOrder(num_sequences, batch_size, partial(shuffled, num_sequences, seed), Share(**share))


class TestShuffled:
    def test_order_is_a_permutation_fixed_by_seed_and_epoch(self):
        one = shuffled(100, seed=3, epoch=2)
        assert sorted(one.tolist()) == list(range(100))
        assert torch.equal(one, shuffled(100, seed=3, epoch=2))
        assert not torch.equal(one, shuffled(100, seed=3, epoch=3))
        assert not torch.equal(one, shuffled(100, seed=2, epoch=3))

    def test_known_order_is_the_same_on_every_machine(self):
        # Read from torch's generator once: a run that is resumed elsewhere must find this order.
        assert shuffled(6, seed=0, epoch=0).tolist() == [1, 5, 3, 0, 2, 4]


class TestStepOrder:
    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 4),
        st.sampled_from([1, 2, 4]),
        st.integers(1, 3),
        st.integers(0, 60),
        st.integers(0, 5),
    )
    def test_any_world_sees_the_same_sequences_in_a_step(self, world, accumulation, micro, extra, seed):
        batch_size = world * accumulation * micro
        num_sequences = 2 * batch_size + extra
        expected = shuffled(num_sequences, seed, 0)
        ranks = [
            list(order(num_sequences, batch_size, seed, rank=r, world_size=world, accumulation=accumulation))
            for r in range(world)
        ]
        assert {len(batches) for batches in ranks} == {num_sequences // batch_size * accumulation}
        for step in range(num_sequences // batch_size):
            seen = [
                i for a in range(accumulation) for r in ranks for i in r[step * accumulation + a].tolist()
            ]
            assert seen == expected[step * batch_size : (step + 1) * batch_size].tolist()

    def test_exhausted_order_starts_the_next_epoch(self):
        own = order()
        first, second = torch.cat(list(own)), torch.cat(list(own))
        assert torch.equal(first, shuffled(50, 0, 0)[:48])
        assert torch.equal(second, shuffled(50, 0, 1)[:48])

    def test_iterating_anew_goes_on_from_the_position(self):
        own = order()
        iterator = iter(own)
        seen = [next(iterator), next(iterator)]
        assert torch.equal(torch.cat(seen + list(own)), shuffled(50, 0, 0)[:48])

    def test_same_epoch_keeps_the_position_and_another_resets_it(self):
        own = order()
        next(iter(own))
        own.set_epoch(0)
        assert own.position == 1
        own.set_epoch(4)
        assert torch.equal(next(iter(own)), shuffled(50, 0, 4)[:8])

    def test_position_moves_between_world_sizes(self):
        saved = order(accumulation=2)
        iterator = iter(saved)
        for _ in range(4):
            next(iterator)
        resumed = order(world_size=4, rank=1)
        resumed.seek(saved.epoch, saved.sequences_seen)
        assert torch.equal(next(iter(resumed)), shuffled(50, 0, 0)[16 + 2 : 16 + 4])

    def test_indivisible_batch_names_the_next_sizes(self):
        message = r"'batch_size' must be a multiple of .* \(3 x 2 = 6\), got 8\. Use 6 or 12\."
        with pytest.raises(ConfigError, match=message):
            order(world_size=3, accumulation=2)
