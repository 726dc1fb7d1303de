from __future__ import annotations

import pytest
import torch

from moe_plugin.apps.data import BytePairs, CorpusDataModule, Document, Files
from moe_plugin.errors import ConfigError


class Texts:
    """60 files; a sequence's first bytes tell its file."""

    def fingerprint(self):
        return "texts for the data module"

    def documents(self):
        for i in range(60):
            yield Document(f"{i}.py", "code", f"code {i:03d} " * 40)
            yield Document(f"{i}.py", "prose", f"prose {i:03d} " * 20)


@pytest.fixture
def make(tmp_path):
    def module(source=None, **settings):
        settings = {
            "context_length": 16,
            "batch_size": 8,
            "val_batch_size": 4,
            "cache": str(tmp_path),
            **settings,
        }
        return CorpusDataModule(source or Texts(), **settings)

    return module


def files_of(data, sequences):
    """The file numbers that occur whole in the sequences' text."""
    text = " ".join(bytes(row).decode() for row in sequences.tokens.tolist())
    return {word for word in text.replace("\0", " ").split() if word.isdigit() and len(word) == 3}


class TestCorpusDataModule:
    def test_batches_have_tokens_and_domains_of_their_text(self, make):
        data = make()
        for loader, size in ((data.train_dataloader(), 8), (data.val_dataloader(), 4)):
            for batch in loader:
                assert batch["tokens"].shape == (size, 17)
                assert batch["tokens"].dtype == batch["domain"].dtype == torch.int64
                for row, label in zip(batch["tokens"].tolist(), batch["domain"].tolist(), strict=True):
                    assert data.domains[label][:1] in bytes(row).decode()
                    other = {"code": "pros", "prose": "code"}[data.domains[label]]
                    assert other not in bytes(row).decode()

    def test_training_and_validation_share_no_file(self, make):
        data = make()
        assert files_of(data, data.train_sequences).isdisjoint(files_of(data, data.val_sequences))

    def test_validation_sees_each_sequence_once_in_equal_ranks(self, make):
        data = make()
        rows = [row for batch in data.val_dataloader() for row in batch["tokens"].tolist()]
        assert sorted(rows) == sorted(data.val_sequences.tokens.tolist())
        assert len(rows) % 4 == 0

    def test_token_limits_are_kept(self, make):
        data = make(max_train_tokens=16 * 50, max_val_tokens=16 * 9)
        assert len(data.train_sequences.tokens) == 50
        assert len(data.val_sequences.tokens) == 8  # the largest multiple of val_batch_size, 4, that 9 hold

    def test_manifest_and_domains_are_reachable(self, make):
        data = make()
        assert data.domains == ["code", "prose"]
        assert {entry["split"] for entry in data.manifest["documents"]} == {"train", "validation"}

    def test_state_of_one_module_continues_in_another(self, make):
        data = make()
        iterator = iter(data.train_dataloader())
        seen = [next(iterator)["tokens"] for _ in range(3)]
        resumed = make()
        resumed.load_state_dict(data.state_dict())
        rest = [batch["tokens"] for batch in resumed.train_dataloader()]
        whole = [batch["tokens"] for batch in make().train_dataloader()]
        assert torch.equal(torch.cat(seen + rest), torch.cat(whole))

    def test_state_in_mid_epoch_of_other_data_is_refused(self, make):
        data = make()
        next(iter(data.train_dataloader()))
        other = make(seed=1)
        other.load_state_dict(data.state_dict())
        message = (
            "'data' must be the checkpoint's, which stopped in the middle of epoch 0. Resume with the same"
        )
        with pytest.raises(ConfigError, match=message):
            other.train_dataloader()


class TestErrors:
    @pytest.mark.parametrize("key", ["context_length", "batch_size", "val_batch_size", "max_train_tokens"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, "abc", True])
    def test_size_that_is_no_positive_integer_is_refused(self, make, key, value):
        allowed = f"{'null or ' * key.startswith('max_')}an integer >= 1"
        with pytest.raises(ConfigError, match=rf"'data.{key}' must be {allowed}, got {value!r}"):
            make(**{key: value})

    @pytest.mark.parametrize(("value", "allowed"), [(0, "> 0"), (1, ">= 0 and < 1"), (1.5, ">= 0 and < 1")])
    def test_fraction_outside_0_and_1_is_refused(self, make, value, allowed):
        message = rf"'data.validation_fraction' must be a number {allowed}, got {value}\."
        with pytest.raises(ConfigError, match=message):
            make(validation_fraction=value)

    def test_vocab_size_of_another_tokenizer_is_refused(self, make):
        pytest.importorskip("tokenizers")
        message = r"'data.vocab_size' must be the tokenizer's \(300\), got 256\. Set data.vocab_size=300\."
        with pytest.raises(ConfigError, match=message):
            make(tokenizer=BytePairs(300))

    def test_less_text_than_a_sequence_names_the_domain(self, make):
        data = make(context_length=5000, batch_size=1)
        count = len(data.corpus.streams["validation/code"])
        message = f"must be < the {count} tokens of domain 'code' in validation, got 5000."
        with pytest.raises(ConfigError, match=f"'data.context_length' {message}"):
            data.validate()

    def test_less_text_than_a_batch_is_refused(self, make):
        count = len(make().train_sequences.tokens)
        message = rf"'data.batch_size' must be <= {count}, the train sequences .* \(None\), got 5000\."
        with pytest.raises(ConfigError, match=message):
            make(batch_size=5000).setup()

    def test_token_limit_below_a_batch_is_refused(self, make):
        message = r"'data.val_batch_size' must be <= 3, the validation .* token limit \(50\), got 4\."
        with pytest.raises(ConfigError, match=message):
            make(max_val_tokens=50).setup()

    def test_constructor_writes_nothing(self, make, tmp_path):
        make()
        assert list(tmp_path.iterdir()) == []


class TestBytePairsInModule:
    def test_byte_pairs_give_a_smaller_corpus(self, make):
        pytest.importorskip("tokenizers")
        pairs = make(tokenizer=BytePairs(300), vocab_size=300)
        assert len(pairs.train_sequences.tokens) < len(make().train_sequences.tokens)
        assert int(pairs.train_sequences.tokens.max()) < 300


class TestFilesInModule:
    def test_users_files_train(self, make, tmp_path):
        for i in range(20):
            (tmp_path / f"{i}.md").write_text(f"note {i} " * 50)
        data = make(Files({"notes": ["*.md"]}, root=str(tmp_path)))
        assert data.domains == ["notes"]
        assert next(iter(data.train_dataloader()))["domain"].tolist() == [0] * 8
