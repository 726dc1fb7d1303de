from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from moe_plugin.apps.data import CorpusDataModule, StandardLibrary
from moe_plugin.apps.data.__main__ import table
from moe_plugin.apps.data.standard_library import library_files, module_documents
from moe_plugin.errors import ConfigError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return CorpusDataModule(StandardLibrary(), cache=str(tmp_path_factory.mktemp("cache")))


class TestStandardLibrary:
    def test_four_domains_are_held_out_alike(self, data):
        assert data.domains == ["code", "headers", "prose", "tables"]
        totals = data.manifest["totals"]
        for domain in data.domains:
            train, validation = (totals[split][domain]["bytes"] for split in ("train", "validation"))
            assert validation / (train + validation) == pytest.approx(0.09, abs=0.01)
            assert train > 1_000_000  # shares alone would also hold for a few files

    def test_no_file_and_no_text_is_on_both_sides(self, data):
        entries = data.manifest["documents"]
        for key in ("file", "sha256"):
            train, validation = (
                {e[key] for e in entries if e["split"] == s} for s in ("train", "validation")
            )
            assert train.isdisjoint(validation)

    def test_headers_stay_below_their_limit(self, data):
        headers = [e for e in data.manifest["documents"] if e["domain"] == "headers"]
        assert sum(e["bytes"] for e in headers) <= 3_000_000
        assert all(e["file"].startswith("torch/include/") for e in headers)

    def test_limited_validation_holds_the_mix(self, data):
        few = CorpusDataModule(data.source, max_val_tokens=50_000, cache=str(data.cache))
        whole, kept = (m.val_sequences.domain.bincount() / len(m.val_sequences.domain) for m in (data, few))
        assert whole.tolist() == pytest.approx(kept.tolist(), abs=0.02)

    def test_table_shows_every_domain(self, data):
        assert list(table(data.corpus).columns[0].cells) == [*data.domains, "all"]

    def test_negative_header_bytes_is_refused(self):
        with pytest.raises(ConfigError, match="'header_bytes' must be an integer >= 0, got -1"):
            StandardLibrary(header_bytes=-1)

    def test_library_without_its_source_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        message = rf"'source' needs a folder .* got '{tmp_path}'\. Use data=files\."
        with pytest.raises(ConfigError, match=message):
            StandardLibrary()


class TestLibraryFiles:
    def test_tests_and_installed_packages_are_left_out(self):
        names = library_files(Path(sysconfig.get_paths()["stdlib"]))
        assert {"ast.py", "email/message.py"} <= set(names)
        assert names == sorted(names)
        assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)


class TestModuleDocuments:
    @pytest.mark.parametrize(
        ("name", "domains"),
        [
            ("encodings/cp437.py", ["tables"]),
            ("pydoc_data/topics.py", ["prose"]),
            ("ast.py", ["code", "prose"]),
        ],
    )
    def test_module_gives_its_domains(self, name, domains):
        text = (Path(sysconfig.get_paths()["stdlib"]) / name).read_text(encoding="utf-8")
        assert [document.domain for document in module_documents(name, text)] == domains
