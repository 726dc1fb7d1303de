from __future__ import annotations

import re

import torch

from moe_plugin.apps.data.difficulty import BRANCHES, DIFFICULTY_NAMES, KEYWORDS, difficulty_of, label_tokens
from moe_plugin.apps.data.tokenization import Bytes

TEXT = b"def f(x1):\n    if x1 > 100 and y:\n          return 2024 + 'a b'\n\n# caf\xc3\xa9 \x85 12\n"


def names_of(text: bytes, label: str) -> list[str]:
    return [DIFFICULTY_NAMES[label][number] for number in difficulty_of(text)[label].tolist()]


class TestWords:
    def test_each_byte_is_of_its_word(self):
        expected = {
            "def": "keyword",
            "(": "punctuation",
            "x1": "identifier",
            "100": "number",
        }
        names = names_of(TEXT, "word")
        for word, name in expected.items():
            place = TEXT.index(word.encode())
            assert names[place : place + len(word)] == [name] * len(word), word
        assert names[TEXT.index(b"\xc3")] == "other"
        assert names[3] == "space"

    def test_keywords_are_those_of_a_slow_split(self):
        names = names_of(TEXT, "word")
        for match in re.finditer(rb"[A-Za-z]+", TEXT):
            if re.match(rb"[0-9_]", TEXT[match.end() : match.end() + 1]):
                continue
            wanted = "keyword" if match.group().decode() in KEYWORDS else "identifier"
            assert names[match.start()] == wanted


class TestLines:
    def test_labels_equal_a_loop_over_lines(self):
        indentation, digits = names_of(TEXT, "indentation"), names_of(TEXT, "digits in line")
        place = 0
        for line in TEXT.split(b"\n")[:-1]:
            columns = len(line) - len(line.lstrip(b" "))
            wide = (
                "none" if not columns else "1 to 4" if columns <= 4 else "5 to 8" if columns <= 8 else "more"
            )
            count = sum(line.count(b"%d" % digit) for digit in range(10))
            many = "none" if not count else "1 to 3" if count <= 3 else "4 or more"
            end = place + len(line) + 1
            assert indentation[place:end] == [wide] * (end - place)
            assert digits[place:end] == [many] * (end - place)
            place = end
        assert place == len(TEXT)

    def test_branches_are_counted_over_the_text(self):
        words = re.findall(r"[A-Za-z_]+", TEXT.decode("latin-1"))
        assert sum(word in BRANCHES for word in words) == 2
        assert set(names_of(TEXT, "branches")) == {"1 or 2"}
        assert set(names_of(b"x = 1", "branches")) == {"none"}


class TestTokens:
    def test_bytes_are_labelled_as_their_text(self):
        tokens_BS = torch.tensor([list(TEXT), list(TEXT[::-1])])
        labels = label_tokens(tokens_BS, Bytes().token_bytes)
        for name in DIFFICULTY_NAMES:
            assert labels[name].shape == tokens_BS.shape
            assert labels[name][0].tolist() == difficulty_of(TEXT)[name].tolist()

    def test_longer_tokens_have_the_label_of_their_first_byte(self):
        pieces = [b"", b"  if", b" x", b"\n", b"1234"]
        labels = label_tokens(torch.tensor([[1, 2, 3, 4, 0]]), pieces)
        assert labels["indentation"].tolist() == [[1, 1, 1, 0, 0]]
        assert labels["digits in line"].tolist() == [[0, 0, 0, 2, 2]]
