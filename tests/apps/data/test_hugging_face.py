from __future__ import annotations

import json

import pytest

from moe_plugin.apps.data import CorpusDataModule, HuggingFace
from moe_plugin.errors import ConfigError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    rows = [{"text": f"row {i} " * 20, "kind": ("code", "prose")[i % 2], "number": i} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return rows


def source(folder, **settings):
    return HuggingFace("json", data_files=str(folder / "rows.jsonl"), **settings)


class TestHuggingFace:
    @pytest.mark.parametrize("streamed", [{}, {"streaming": True, "max_bytes": 10**6}])
    def test_rows_become_documents_with_their_domain(self, rows, tmp_path, streamed):
        documents = list(source(tmp_path, domain="kind", **streamed).documents())
        assert [(d.domain, d.text) for d in documents] == [(row["kind"], row["text"]) for row in rows]
        assert len({d.file for d in documents}) == len(rows)

    def test_stream_stops_at_its_limit(self, rows, tmp_path):
        documents = list(source(tmp_path, streaming=True, max_bytes=500).documents())
        assert [d.text for d in documents] == [row["text"] for row in rows[:4]]  # of 120 bytes each

    def test_saved_folder_is_read(self, rows, tmp_path):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        documents = list(HuggingFace(str(tmp_path / "saved")).documents())
        assert [d.text for d in documents] == [row["text"] for row in rows]

    def test_data_module_trains_on_rows(self, rows, tmp_path):
        data = CorpusDataModule(
            source(tmp_path, domain="kind"),
            context_length=16,
            batch_size=4,
            val_batch_size=2,
            cache=str(tmp_path),
        )
        batch = next(iter(data.train_dataloader()))
        assert batch["tokens"].shape == (4, 17)
        assert data.domains == ["code", "prose"]
        for tokens, domain in zip(batch["tokens"].tolist(), batch["domain"].tolist(), strict=True):
            whole_words = bytes(tokens).decode().replace("\0", " ").split()[1:-1]
            numbers = [int(word) for word in whole_words if word.isdigit()]
            assert numbers == [number for number in numbers if number % 2 == domain] != []

    @pytest.mark.parametrize("columns", [{"text": "body"}, {"domain": "number"}])
    def test_wrong_column_names_those_of_text(self, rows, tmp_path, columns):
        (key, column), *_ = columns.items()
        message = rf"'source.{key}' must be a column of text, one of \['text', 'kind'\], got '{column}'"
        with pytest.raises(ConfigError, match=message):
            list(source(tmp_path, **columns).documents())

    def test_unknown_split_is_refused(self, rows, tmp_path):
        message = r"(?s)'source.path' must name a dataset that can be loaded \(split 'tset': .*, got 'json'"
        with pytest.raises(ConfigError, match=message):
            list(source(tmp_path, split="tset").documents())

    def test_missing_file_is_refused_in_the_constructor(self, tmp_path):
        with pytest.raises(ConfigError, match=r"'source.data_files' must match a file, got '.*rows.jsonl'"):
            source(tmp_path)

    @pytest.mark.parametrize("limit", [0, 1.5, "10"])
    def test_limit_that_is_no_positive_integer_is_refused(self, limit):
        message = f"'source.max_bytes' must be null or an integer >= 1, got {limit!r}"
        with pytest.raises(ConfigError, match=message):
            HuggingFace("owner/name", max_bytes=limit)

    def test_stream_without_limit_is_refused(self):
        message = "'source.max_bytes' must be given with source.streaming=true, got None"
        with pytest.raises(ConfigError, match=message):
            HuggingFace("owner/name", streaming=True)

    def test_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setattr("moe_plugin.extras.find_spec", lambda name: None)
        message = r"'source' needs the package 'datasets'\. Run: pip install 'moe_plugin\[hf\]'"
        with pytest.raises(ConfigError, match=message):
            HuggingFace("owner/name")
