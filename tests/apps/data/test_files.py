from __future__ import annotations

import os
import re
import socket

import pytest
from omegaconf import OmegaConf

from moe_plugin.apps.data import Files
from moe_plugin.errors import ConfigError


@pytest.fixture
def tree(tmp_path):
    for name in ("src/a.py", "src/deep/b.py", "docs/x.md", "docs/y.md", "top.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return tmp_path


def names(source):
    return [(document.domain, document.file) for document in source.documents()]


class TestFiles:
    @pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
    def test_globs_give_their_domain_in_the_order_of_names(self, tree, wrap):
        source = Files(wrap({"code": "src/**/*.py", "prose": ["top.md", "docs/*.md"]}), root=str(tree))
        assert names(source) == [
            ("code", "src/a.py"),
            ("code", "src/deep/b.py"),
            ("prose", "docs/x.md"),
            ("prose", "docs/y.md"),
            ("prose", "top.md"),
        ]

    def test_byte_order_mark_is_left_out_and_newlines_are_lf(self, tree):
        (tree / "docs/x.md").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
        documents = list(Files({"prose": "docs/*.md"}, root=str(tree)).documents())
        assert documents[0].text == "one\ntwo\n"

    @pytest.mark.parametrize(
        ("content", "wrong"),
        [
            ("Gru\xdf und schluss".encode("latin-1"), "invalid continuation byte at byte 3"),
            (b"text\xff\xd8\xff\xe0", "invalid start byte at byte 4"),
            ("text".encode("utf-16"), "invalid start byte at byte 0"),
            ("gru\xdf".encode("utf-16-le")[:6], "a NUL (binary, or UTF-16?) at byte 1"),
            ("\N{GREEK SMALL LETTER ALPHA}\0".encode(), "a NUL (binary, or UTF-16?) at byte 2"),
            (b"cut \xe2\x82", "unexpected end of data at byte 4"),
        ],
    )
    def test_files_that_are_no_text_are_named_with_the_first_wrong_byte(self, tree, content, wrong):
        (tree / "docs/z.md").write_bytes(content)
        message = (
            "'source.sources.prose' must match utf-8 text, but 1 of 3 files are not, "
            f"got ['docs/z.md: {wrong}']. Narrow the glob, or set source.encoding, or "
            "source.errors to replace or ignore."
        )
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            list(Files({"prose": "docs/*.md"}, root=str(tree)).documents())

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-8-sig", "cp1252"])
    def test_other_encodings_are_read(self, tree, encoding):
        for name in ("x", "y"):
            (tree / f"docs/{name}.md").write_bytes(f"gru\xdf {name}\r\n".encode(encoding))
        source = Files({"prose": "docs/*.md"}, root=str(tree), encoding=encoding)
        assert [document.text for document in source.documents()] == ["gru\xdf x\n", "gru\xdf y\n"]

    @pytest.mark.parametrize(("errors", "text"), [("ignore", "ab"), ("replace", "a\ufffd\ufffdb")])
    def test_wrong_bytes_are_replaced_or_ignored_on_request(self, tree, errors, text):
        (tree / "docs/x.md").write_bytes(b"a\xff\0b")
        source = Files({"prose": "docs/*.md"}, root=str(tree), errors=errors)
        assert next(iter(source.documents())).text == text

    @pytest.mark.parametrize("kind", ["pipe", "socket", "broken link", "link to a device", "forbidden"])
    def test_what_is_no_readable_file_is_refused_by_name(self, tree, kind, monkeypatch):
        path = tree / "docs/z.md"
        with socket.socket(socket.AF_UNIX) as listener:
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "socket":
                monkeypatch.chdir(path.parent)  # a socket's path is short
                listener.bind(path.name)
            elif kind == "forbidden":  # root may read everything
                path.write_text("text")
                access = os.access
                monkeypatch.setattr(os, "access", lambda p, mode: p.name != path.name and access(p, mode))
            else:
                path.symlink_to({"broken link": "nowhere", "link to a device": "/dev/zero"}[kind])
            message = r"'source.sources.prose' must match files that can be read: .*, got 'docs/z.md'\."
            with pytest.raises(ConfigError, match=message):
                Files({"prose": "docs/*.md"}, root=str(tree))

    def test_folders_are_left_out(self, tree):
        (tree / "docs/folder.md").mkdir()
        assert len(Files({"prose": "docs/*"}, root=str(tree)).files["prose"]) == 2

    def test_fingerprint_follows_the_files(self, tree):
        before = Files({"prose": "docs/*.md"}, root=str(tree)).fingerprint()
        assert Files({"prose": "docs/*.md"}, root=str(tree)).fingerprint() == before
        for other in ({"encoding": "latin-1"}, {"errors": "ignore"}):
            assert Files({"prose": "docs/*.md"}, root=str(tree), **other).fingerprint() != before
        (tree / "docs/x.md").write_text("longer than before, certainly")
        assert Files({"prose": "docs/*.md"}, root=str(tree)).fingerprint() != before

    @pytest.mark.parametrize(
        ("sources", "message"),
        [
            ({}, r"'source.sources' must name at least one domain, such as .*, got {}"),
            ({"code": "src/*.rs"}, r"'source.sources.code' must match a file under .*, got 'src/\*.rs'"),
            (
                {"code": "scr/*.py"},
                r"'source.sources.code' must start in a folder that exists, not in .*scr, got 'scr/\*.py'",
            ),
            ({"code": "src/*.py"}, r"'source.sources.code' must match at least 2 .*, got \['src/a.py'\]"),
            (
                {"a": "docs/*.md", "b": "**/*.md"},
                r"'source.sources' must match docs/x.md in one domain only, got \['a', 'b'\]",
            ),
        ],
    )
    def test_globs_that_give_no_corpus_are_refused(self, tree, sources, message):
        with pytest.raises(ConfigError, match=message):
            Files(sources, root=str(tree))

    def test_empty_files_are_refused(self, tree):
        for name in ("x", "y"):
            (tree / f"docs/{name}.md").write_text("")
        message = "'source.sources.prose' must match a file with text; its 2 files are empty"
        with pytest.raises(ConfigError, match=message):
            Files({"prose": "docs/*.md"}, root=str(tree))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"encoding": "utf-9"}, "'source.encoding' must be one of Python's text encodings, got 'utf-9'"),
            ({"encoding": "base64"}, "'source.encoding' must be one of .*, got 'base64'"),
            ({"errors": "skip"}, "'source.errors' must be one of strict, replace, ignore, got 'skip'"),
        ],
    )
    def test_unknown_decodings_are_refused(self, tree, setting, message):
        with pytest.raises(ConfigError, match=message):
            Files({"prose": "docs/*.md"}, root=str(tree), **setting)

    def test_missing_root_is_refused(self, tree):
        with pytest.raises(ConfigError, match=r"'source.root' must be a folder that exists, got '.*nowhere'"):
            Files({"code": "*"}, root=str(tree / "nowhere"))
