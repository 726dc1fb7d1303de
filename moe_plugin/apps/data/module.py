"""The data module: a source's text as batches of token sequences with their domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor

from moe_plugin.apps.data.cache import cache_folder, load_or_build
from moe_plugin.apps.data.corpus import Corpus
from moe_plugin.apps.data.difficulty import DIFFICULTY_NAMES, label_tokens
from moe_plugin.apps.data.documents import Source, sha256
from moe_plugin.apps.data.loader import TrainingLoader, ValidationLoader
from moe_plugin.apps.data.order import Share, StepOrder, shuffled
from moe_plugin.apps.data.sequences import Sequences, cut
from moe_plugin.apps.data.tokenization import Bytes, Tokenizer
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_fraction, check_integer, check_positive


class CorpusDataModule(LightningDataModule):
    """Batches `{"tokens": int64 (B, S+1), "domain": int64 (B,)}` from text split by file.

    The order of training depends on `seed` and the epoch only: optimizer step i sees the same sequences for any
    number of ranks and any accumulation. `use_distributed_sampler` makes no difference.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer | None = None,
        *,
        vocab_size: int = 256,
        context_length: int = 256,
        batch_size: int = 32,
        val_batch_size: int = 32,
        seed: int = 0,
        validation_fraction: float = 0.09,
        max_train_tokens: int | None = None,
        max_val_tokens: int | None = None,
        cache: str | None = None,
    ) -> None:
        """Check the settings; nothing is read or written yet.

        Args:
            source: Where the text comes from.
            tokenizer: How it becomes tokens; `Bytes()` by default.
            vocab_size: Must be the tokenizer's; a model's config refers to it.
            context_length: S, tokens predicted per sequence.
            batch_size: Sequences per optimizer step, over all ranks and accumulated micro-batches.
            val_batch_size: Sequences per validation batch over all ranks. Validation uses a multiple of it, so ranks
                have equally many batches and no sequence counts twice; the few left out are the same for any number
                of ranks.
            seed: Seed of the order.
            validation_fraction: Share of each domain's bytes held out, by file.
            max_train_tokens: Train on at most this many (predicted) tokens, the same mix spread over all files.
            max_val_tokens: The same for validation.
            cache: Folder for tokens and manifest; default `$MOE_PLUGIN_CACHE` or the user's cache folder.

        Raises:
            ConfigError: If a value is not allowed.
        """
        super().__init__()
        self.source, self.tokenizer = source, tokenizer or Bytes()
        self.vocab_size, self.context_length, self.seed = vocab_size, context_length, seed
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.validation_fraction = validation_fraction
        self.max_train_tokens, self.max_val_tokens = max_train_tokens, max_val_tokens
        self.cache: Path = cache_folder(cache)
        self._check_values()
        self._train_loader: TrainingLoader | None = None
        self._restored: dict[str, Any] | None = None

    def _check_values(self) -> None:
        for key in ("context_length", "batch_size", "val_batch_size", "max_train_tokens", "max_val_tokens"):
            check_integer(f"data.{key}", getattr(self, key), or_none=key.startswith("max_"))
        check_positive("data.validation_fraction", self.validation_fraction)
        check_fraction("data.validation_fraction", self.validation_fraction)
        size = self.tokenizer.vocab_size
        if self.vocab_size != size:
            rule, fix = f"must be the tokenizer's ({size})", f"Set data.vocab_size={size}."
            raise ConfigError("data.vocab_size", rule, self.vocab_size, fix)

    @cached_property
    def corpus(self) -> Corpus:
        """Token streams and manifest, from the cache or built now."""
        return load_or_build(self.source, self.tokenizer, self.validation_fraction, self.cache)

    @property
    def manifest(self) -> dict[str, Any]:
        """What was read: each document's file, domain, split, bytes and sha256, and the totals."""
        return self.corpus.manifest

    @property
    def domains(self) -> list[str]:
        """Names of the domains; a batch's `domain` indexes them."""
        return self.corpus.domains

    @property
    def token_classes(self) -> tuple[list[str], Tensor | None]:
        """Names of classes of tokens, and the class of each token id, int64 (V,); none if the tokenizer has none."""
        return getattr(self.tokenizer, "token_classes", ([], None))

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """The text of each token id; None if the tokenizer does not give it."""
        return getattr(self.tokenizer, "token_bytes", None)

    @property
    def difficulty_names(self) -> Mapping[str, Sequence[str]]:
        """By label of difficulty, what its numbers mean; none if tokens have no text."""
        return {} if self.token_bytes is None else DIFFICULTY_NAMES

    def difficulty(self, tokens_BS: Tensor) -> dict[str, Tensor]:
        """Return the labels of each token; int64 (B, S), on the host."""
        assert self.token_bytes is not None
        return label_tokens(tokens_BS, self.token_bytes)

    @cached_property
    def train_sequences(self) -> Sequences:
        """What an epoch draws from.

        Raises:
            ConfigError: If it is less than one batch.
        """
        return self._sequences("train", self.max_train_tokens, "batch_size", 1)

    @cached_property
    def val_sequences(self) -> Sequences:
        """What is validated on, a multiple of `val_batch_size`.

        Raises:
            ConfigError: If it is less than one batch.
        """
        return self._sequences("validation", self.max_val_tokens, "val_batch_size", self.val_batch_size)

    def _sequences(self, split: str, max_tokens: int | None, batch_key: str, multiple: int) -> Sequences:
        prefix = f"{split}/"
        streams = {k.removeprefix(prefix): v for k, v in self.corpus.streams.items() if k.startswith(prefix)}
        _check_lengths(
            split, {domain: len(stream) for domain, stream in streams.items()}, self.context_length
        )
        sequences = cut(streams, self.domains, self.context_length)
        available = len(sequences.domain)
        if max_tokens is not None:
            available = min(available, max_tokens // self.context_length)
        batch_size = getattr(self, batch_key)
        if available < batch_size:
            rule = f"must be <= {available}, the {split} sequences within the token limit ({max_tokens})"
            fix = "Lower it or data.context_length, or allow more text."
            raise ConfigError(f"data.{batch_key}", rule, batch_size, fix)
        return sequences.thinned(available // multiple * multiple)

    def validate(self) -> None:
        """Check everything that can be wrong with the text; write nothing but the cache.

        Raises:
            ConfigError: If text is missing or too short, or the ranks do not divide a batch size.
        """
        share = self._share()
        share.micro_batch("batch_size", self.batch_size)
        Share(share.rank, share.world_size).micro_batch("val_batch_size", self.val_batch_size)
        _ = self.train_sequences, self.val_sequences

    def prepare_data(self) -> None:
        """Fill the cache and check the text, in one process; nothing is done twice."""
        self.validate()

    def setup(self, stage: str | None = None) -> None:
        """Load the tokens and check them, before the model is set up.

        Raises:
            ConfigError: If the text is not usable, or other text than the first rank's.
        """
        self.validate()
        digest = self.manifest["digest"]
        if self.trainer is not None and self.trainer.strategy.broadcast(digest) != digest:
            rule = f"must be the same text on all machines, but rank {self.trainer.global_rank} has other than rank 0"
            raise ConfigError("data", rule, fix="Copy the files to all machines, or share them.")

    def train_dataloader(self) -> TrainingLoader:
        """Return a stateful loader of `batch_size / (ranks x accumulation)` sequences per micro-batch."""
        num_sequences = len(self.train_sequences.domain)
        order = StepOrder(num_sequences, self.batch_size, partial(self._order, num_sequences), self._share())
        self._train_loader = TrainingLoader(self.train_sequences, order, self._digest())
        if self._restored is not None:
            self._train_loader.load_state_dict(self._restored)
            self._restored = None
        return self._train_loader

    def val_dataloader(self) -> ValidationLoader:
        """Return every validation sequence once, in a fixed order."""
        return ValidationLoader(self.val_sequences, self.val_batch_size, self._share())

    def test_dataloader(self) -> ValidationLoader:
        """Return the validation text: there is no third split."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in training, empty before it."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader continue at the saved position."""
        self._restored = state_dict or None

    def _order(self, num_sequences: int, epoch: int) -> Tensor:
        # Lightning sets the attribute outside its class.
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # pyright: ignore
        return shuffled(num_sequences, self.seed, epoch=0 if overfits else epoch)

    def _share(self) -> Share:
        """Return this rank's part; the strategy knows which ranks share their data (tensor parallel ones do)."""
        if self.trainer is None:
            return Share()
        ranks = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return Share(ranks["rank"], ranks["num_replicas"], self.trainer.accumulate_grad_batches)

    def _digest(self) -> str:
        settings = (self.context_length, self.batch_size, self.seed, self.max_train_tokens)
        return sha256(f"{self.manifest['digest']} {settings}")


def _check_lengths(split: str, tokens: dict[str, int], context_length: int) -> None:
    for domain, count in tokens.items():
        if count <= context_length:
            rule = f"must be < the {count} tokens of domain '{domain}' in {split}"
            fix = "Lower it, or give the domain more text."
            raise ConfigError("data.context_length", rule, context_length, fix)
