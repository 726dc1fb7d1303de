from __future__ import annotations

import hashlib

import pytest

from moe_plugin.apps.data.corpus import build_corpus
from moe_plugin.apps.data.documents import Document
from moe_plugin.apps.data.tokenization import Bytes
from moe_plugin.errors import ConfigError


class Texts:
    def __init__(self, documents):
        self._documents = documents

    def fingerprint(self):
        return "texts"

    def documents(self):
        return iter(self._documents)


def texts(count=30):
    for i in range(count):
        yield Document(f"{i}.py", "code", f"code {i} " * (i + 1))
        yield Document(f"{i}.py", "prose", f"prose {i} ")


def decoded(corpus, split):
    parts = [bytes(v.tolist()).decode() for k, v in corpus.streams.items() if k.startswith(split)]
    return [text for part in parts for text in part.split("\0")[:-1]]


class TestBuildCorpus:
    def test_every_text_is_in_one_stream_and_files_in_one_split(self):
        documents = list(texts())
        corpus = build_corpus(Texts(documents), Bytes(), 0.1)
        assert sorted(decoded(corpus, "train") + decoded(corpus, "validation")) == sorted(
            d.text for d in documents
        )
        entries = corpus.manifest["documents"]
        files = {
            split: {e["file"] for e in entries if e["split"] == split} for split in ("train", "validation")
        }
        assert files["train"].isdisjoint(files["validation"])
        assert corpus.domains == ["code", "prose"]

    def test_manifest_tells_bytes_hashes_and_totals(self):
        documents = list(texts())
        corpus = build_corpus(Texts(documents), Bytes(), 0.1)
        by_text = {hashlib.sha256(d.text.encode()).hexdigest(): d for d in documents}
        for entry in corpus.manifest["documents"]:
            document = by_text[entry["sha256"]]
            assert (entry["file"], entry["domain"], entry["bytes"]) == (*document[:2], len(document.text))
        for split, domains in corpus.manifest["totals"].items():
            for domain, total in domains.items():
                own = [
                    e for e in corpus.manifest["documents"] if (e["split"], e["domain"]) == (split, domain)
                ]
                assert total["bytes"] == sum(e["bytes"] for e in own)
                assert (
                    total["tokens"]
                    == len(corpus.streams[f"{split}/{domain}"])
                    == total["bytes"] + total["files"]
                )

    def test_identical_and_blank_texts_are_read_once_or_never(self):
        copies = [Document(f"copy/{i}", "code", "code 3 " * 4) for i in range(20)] + [
            Document("z", "code", " \n")
        ]
        corpus = build_corpus(Texts([*texts(), *copies]), Bytes(), 0.1)
        assert corpus.manifest == build_corpus(Texts(list(texts())), Bytes(), 0.1).manifest

    def test_digest_follows_the_text(self):
        digests = {build_corpus(Texts(list(texts(n))), Bytes(), 0.1).manifest["digest"] for n in (30, 30, 31)}
        assert len(digests) == 2

    def test_no_text_is_refused(self):
        with pytest.raises(ConfigError, match="'source' must give text, but has no file"):
            build_corpus(Texts([]), Bytes(), 0.1)

    @pytest.mark.parametrize("text", ["", " \n", "code 3 " * 4])
    def test_domain_that_ends_up_empty_is_refused(self, text):
        documents = [*texts(), *(Document(f"copy/{i}", "copies", text) for i in range(9))]
        message = "'source' must give text in domain 'copies', but all of it is blank or already in another"
        with pytest.raises(ConfigError, match=message):
            build_corpus(Texts(documents), Bytes(), 0.1)
