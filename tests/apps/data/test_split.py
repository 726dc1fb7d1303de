from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.apps.data.documents import Document
from moe_plugin.apps.data.split import file_sizes, validation_files
from moe_plugin.errors import ConfigError

SIZES = st.dictionaries(
    st.text("abcdefgh/.", min_size=1, max_size=12),
    st.dictionaries(st.sampled_from(["code", "prose", "tables"]), st.integers(1, 500), min_size=1),
    min_size=2,
    max_size=40,
)


def held_shares(sizes, chosen):
    total, held = Counter(), Counter()
    for file, domains in sizes.items():
        total.update(domains)
        if file in chosen:
            held.update(domains)
    return {domain: held[domain] / total[domain] for domain in total}


class TestFileSizes:
    def test_documents_of_one_file_are_summed_by_domain(self):
        documents = [Document("a", "code", "é"), Document("a", "prose", "xyz"), Document("a", "code", "1")]
        assert file_sizes(documents) == {"a": {"code": 3, "prose": 3}}


class TestValidationFiles:
    @settings(max_examples=60, deadline=None)
    @given(SIZES, st.sampled_from([0.05, 0.09, 0.3]))
    def test_any_files_give_both_sides_every_domain_or_an_error(self, sizes, fraction):
        try:
            chosen = validation_files(sizes, fraction)
        except ConfigError:
            return
        sides = [set(), set()]
        for file, domains in sizes.items():
            sides[file in chosen] |= set(domains)
        assert sides[0] == sides[1]

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 1000), st.sampled_from([0.05, 0.09, 0.3]))
    def test_many_small_files_hold_out_the_share_of_each_domain(self, salt, fraction):
        sizes = {
            f"{salt}/{i}": {"code": 50 + 7 * i % 90, "prose": 1 + 13 * i % 40, f"table{i % 2}": 20}
            for i in range(200)
        }
        for share in held_shares(sizes, validation_files(sizes, fraction)).values():
            assert share == pytest.approx(fraction, abs=0.02)

    @settings(max_examples=30, deadline=None)
    @given(SIZES, st.randoms())
    def test_order_of_files_does_not_matter(self, sizes, random):
        names = list(sizes)
        random.shuffle(names)
        try:
            chosen = validation_files(sizes, 0.2)
        except ConfigError:
            return
        assert validation_files({name: sizes[name] for name in names}, 0.2) == chosen

    def test_one_big_file_is_trained_on(self):
        sizes = {"big": {"prose": 1000}, "small": {"prose": 10}, "tiny": {"prose": 5}}
        assert "big" not in validation_files(sizes, 0.09)

    def test_domain_of_one_file_is_refused(self):
        message = "'source' must have 2 files or more in domain 'prose', .*, got 1. Add files to it"
        with pytest.raises(ConfigError, match=message):
            validation_files({"a": {"code": 5}, "b": {"code": 5}, "c": {"prose": 5}}, 0.1)
