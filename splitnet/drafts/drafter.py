"""What every source of drafts has in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Guess(NamedTuple):
    """A token that may come next. kind: guesses of one kind are right about equally often."""

    token: int
    kind: int


def shared(tokens: Sequence[int] | str, others: Sequence[int] | str) -> int:
    """How many tokens (or characters) two texts begin with in common."""
    pairs = zip(tokens, others, strict=False)
    different = (place for place, (one, other) in enumerate(pairs) if one != other)
    return next(different, min(len(tokens), len(others)))


class Drafter(Protocol):
    """Guesses how a text goes on; follows one text at a time.

    priors: by kind, how often a guess is right, before anything is known of the text. taps: boundaries of blocks whose
    hidden states it takes as features, see `DraftHead`; (): none.
    """

    @property
    def priors(self) -> Sequence[float]: ...

    @property
    def taps(self) -> tuple[int, ...]: ...

    def begin(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """A new text, which begins with these tokens.

        features: `[positions, len(taps) * hidden]` of the last positions before the last token; None: there are none.
        """

    def observe(self, token: int, features: Tensor | None = None) -> None:
        """The text goes on with `token`. features: `[len(taps) * hidden]` of the position before it."""

    def draft(self, pending: Sequence[int]) -> Iterator[Guess]:
        """Tokens that may follow the text and `pending`, which was drafted before; as many as are asked for."""
        ...
