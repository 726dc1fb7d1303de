from __future__ import annotations

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

    def test_binary_files_are_left_out_and_newlines_are_lf(self, tree):
        (tree / "docs/z.md").write_bytes(b"\xff\xfe\x00")
        (tree / "docs/nul.md").write_bytes(b"a\0b")
        (tree / "docs/x.md").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
        documents = list(Files({"prose": "docs/*.md"}, root=str(tree)).documents())
        assert [document.file for document in documents] == ["docs/x.md", "docs/y.md"]
        assert documents[0].text == "one\ntwo\n"

    def test_fingerprint_follows_the_files(self, tree):
        before = Files({"prose": "docs/*.md"}, root=str(tree)).fingerprint()
        assert Files({"prose": "docs/*.md"}, root=str(tree)).fingerprint() == before
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

    def test_missing_root_is_refused(self, tree):
        with pytest.raises(ConfigError, match=r"'source.root' must be a folder that exists, got '.*nowhere'"):
            Files({"code": "*"}, root=str(tree / "nowhere"))
