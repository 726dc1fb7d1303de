"""What is known of the tokens of a batch: their domain, their class, the difficulty of their place, their text.

The trainer's data module may have any of these: `domains` (names of what
`batch["domain"]` numbers), `token_classes` (names, and a class for each token id), `difficulty_names` and
`difficulty(tokens_BS)` (labels of each token by its surroundings), and `token_bytes` (the text of each token id).

Shape legend: B sequences, S tokens in each, T tokens (B x S), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenBatch(NamedTuple):
    """The tokens of a batch.

    Attributes:
        tokens_BS: Token ids that the model read; int64. None if they are not known.
        kinds: By kind ('domain', 'token class', ...), a number for each token; int64 (T,).
    """

    tokens_BS: Tensor | None
    kinds: Mapping[str, Tensor]


NOTHING = TokenBatch(None, {})


class TokenKinds:
    """The kinds of tokens that a data module knows.

    Attributes:
        names: By kind, the names of its numbers.
        difficulty: The kinds of `names` that are labels of difficulty.
        token_bytes: The text of each token id; None if it is not known.
    """

    def __init__(self, data: object) -> None:
        """Ask a data module, which may be None."""
        classes, self._class_of_V = getattr(data, "token_classes", ([], None))
        self._label: Any = getattr(data, "difficulty", None)
        self.difficulty = dict(getattr(data, "difficulty_names", {}))
        names = {"domain": getattr(data, "domains", ()), "token class": classes} | self.difficulty
        self.names: dict[str, list[str]] = {kind: list(each) for kind, each in names.items() if len(each)}
        self.token_bytes: list[bytes] | None = getattr(data, "token_bytes", None)

    def of(self, batch: Any) -> TokenBatch:
        """Return what is known of a batch: a mapping with `tokens`, int64 (B, S + 1), or `input_ids`, int64 (B, S)."""
        if not isinstance(batch, Mapping):
            return NOTHING
        tokens_BS = batch["tokens"][:, :-1] if "tokens" in batch else batch.get("input_ids")
        if not isinstance(tokens_BS, Tensor) or tokens_BS.dim() != 2:
            return NOTHING
        kinds: dict[str, Tensor] = {}
        if isinstance(batch.get("domain"), Tensor) and "domain" in self.names:
            kinds["domain"] = batch["domain"].repeat_interleave(tokens_BS.shape[1])
        if self._class_of_V is not None:
            kinds["token class"] = self._class_of_V.to(tokens_BS.device)[tokens_BS.flatten()]
        if self.difficulty:
            kinds |= {name: labels_BS.flatten() for name, labels_BS in self._label(tokens_BS).items()}
        return TokenBatch(tokens_BS, kinds)

    def text(self, tokens_S: Tensor) -> list[str]:
        """Return the text of each token, with dots for broken characters; `token_bytes` must be known."""
        assert self.token_bytes is not None
        return [
            self.token_bytes[token].decode("utf-8", "replace").replace("\ufffd", "·")
            for token in tokens_S.tolist()
        ]


def positions_of(tokens_BS: Tensor) -> Tensor:
    """Return the place of each token in its sequence; int64 (T,), on the host."""
    return torch.arange(tokens_BS.shape[1]).repeat(tokens_BS.shape[0])
