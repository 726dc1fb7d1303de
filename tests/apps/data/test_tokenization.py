from __future__ import annotations

import pytest

from moe_plugin.apps.data.tokenization import BytePairs, Bytes
from moe_plugin.errors import ConfigError


class TestBytes:
    def test_texts_become_their_utf8_each_with_a_separator(self):
        stream = Bytes().fit([])(["aé", "b"])
        assert bytes(stream.tolist()) == "aé\0b\0".encode()


class TestBytePairs:
    def test_trained_ids_stay_below_vocab_size_and_end_documents_with_zero(self):
        pytest.importorskip("tokenizers")
        texts = ["the cat and the hat and the bat", "the the the and é"] * 5
        stream = BytePairs(vocab_size=270).fit(texts)([*texts[:2], "日本 unseen"])
        ids = stream.tolist()
        assert max(ids) < 270
        assert ids.count(0) == 3
        assert ids[-1] == 0
        assert len(ids) < sum(len(t.encode()) + 1 for t in [*texts[:2], "日本 unseen"])

    def test_vocab_size_without_room_for_bytes_is_refused(self):
        with pytest.raises(ConfigError, match=r"'tokenizer.vocab_size' must be an integer >= 257, got 256"):
            BytePairs(vocab_size=256)

    def test_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setattr("moe_plugin.extras.find_spec", lambda name: None)
        message = r"'tokenizer' needs the package 'tokenizers'\. Run: pip install 'moe_plugin\[hf\]'"
        with pytest.raises(ConfigError, match=message):
            BytePairs()


class TestByteClasses:
    def test_every_byte_has_a_class_and_words_are_told_apart(self):
        names, classes_V = Bytes().token_classes
        assert len(classes_V) == 256
        shown = [names[classes_V[byte]] for byte in b"aZ7 \n{\xff"]
        assert shown == ["letter", "capital", "digit", "space", "newline", "punctuation", "other"]
