"""The interface of all sources of drafts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Guess(NamedTuple):
    """A likely next token. kind: guesses of one kind are accepted about equally often."""

    token: int
    kind: int


def shared(tokens: Sequence[int] | str, others: Sequence[int] | str) -> int:
    """Length of the common prefix of two texts, in tokens or characters."""
    pairs = zip(tokens, others, strict=False)
    different = (place for place, (one, other) in enumerate(pairs) if one != other)
    return next(different, min(len(tokens), len(others)))


class Drafter(Protocol):
    """Guesses the next tokens of one text at a time.

    priors: expected acceptance rate of each kind of guess, before a text has been observed. taps: boundaries of blocks
    whose hidden states are the drafter's features, see `DraftHead`; (): the drafter needs no features.
    """

    @property
    def priors(self) -> Sequence[float]: ...

    @property
    def taps(self) -> tuple[int, ...]: ...

    def begin_text(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Begins a text with these tokens.

        features: `[positions, len(taps) * hidden]` of the last positions before the last token; None: no features.
        """

    def observe_token(self, token: int, features: Tensor | None = None) -> None:
        """Appends a token to the text. features: `[len(taps) * hidden]` of the position before the token."""

    def draft_tokens(self, pending: Sequence[int]) -> Iterator[Guess]:
        """Guesses the tokens after the text and `pending`, the drafts that are under way; yields guesses without
        end."""
        ...
