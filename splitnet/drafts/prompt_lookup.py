"""Drafts that copy earlier parts of the text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor

from splitnet.drafts.drafter import Guess

LONGEST_NGRAM = 3  # maximum tokens of the n-gram that is looked up
LONGEST_MATCH = 16  # maximum tokens before a place that are compared to rate the place
LEARNING_MATCH = 3  # minimum equal tokens before a replaced token for which the replacement is learnt
RENAMED_WITHIN = 2048  # latest tokens that are indexed again after a replacement was learnt: the copy, not its source
TIMES_FORGOTTEN = 3  # a token that has lost its replacement this often gets no further replacement
TIMES_SEEN = 2  # how often a token must be replaced by the same token before the replacement is drafted


class PromptLookup:
    """Drafts the tokens that followed the last tokens earlier in the text; needs no model and hardly any time.

    Saxena, "Prompt Lookup Decoding" (2023). The text after the latest place with the last `LONGEST_NGRAM` tokens, or
    else with fewer of them, is copied. The kind of a guess grows with the number of equal tokens before the place.

    A copy with changes, such as edited code, is followed further: if a token differs from the source and the next ones
    are equal, the new token replaces the old one. From then on the two tokens count as equal when places are compared,
    and the new token is drafted. The source is followed as long as the text agrees with it; a new look-up would mostly
    find a place within the copy.
    """

    priors = (0.1, 0.2, 0.4, 0.6, 0.75, 0.85)
    taps = ()

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._renamed: dict[int, int] = {}  # the replacement of each replaced token
        self._former: dict[int, int] = {}  # the inverse of `_renamed`
        self._seen: Counter[tuple[int, int]] = Counter()  # how often a token was replaced by another one
        self._forgotten: Counter[int] = Counter()  # how often a token has lost its replacement
        self._places: dict[tuple[int, ...], int] = {}  # index after the last occurrence of an n-gram
        self._source: int | None = None  # index of the next token of the source; None: there is no source
        self._suspect: tuple[int, int] | None = None  # a token of the source, and the text's latest token in its place

    def begin_text(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self._tokens, self._places, self._source, self._suspect = [], {}, None, None
        self._renamed, self._former, self._seen, self._forgotten = {}, {}, Counter(), Counter()
        for token in tokens:
            self.observe_token(token)

    def observe_token(self, token: int, features: Tensor | None = None) -> None:
        self._follow(token)
        self._tokens.append(token)
        self._remember(len(self._tokens) - 1)
        if self._source is None:
            self._source = self._latest(self._tokens[-LONGEST_NGRAM:])

    def draft_tokens(self, pending: Sequence[int]) -> Iterator[Guess]:
        tail = [*self._tokens[-LONGEST_MATCH:], *pending][-LONGEST_MATCH:]
        place = self._place(tail, pending)
        if place is None:
            return
        same = self._same(tail, place)
        kind = (sum(same) if same and same[0] else 0).bit_length()
        copied = (self._tokens[index] for index in range(place, len(self._tokens)))
        renamed = (self._renamed.get(token, token) for token in copied)
        # A repetition is expected to continue.
        yield from (Guess(token, kind) for token in itertools.cycle(itertools.chain(renamed, pending)))

    def _follow(self, token: int) -> None:
        """Compares a new token with the source."""
        source = self._source
        if source is None:
            self._suspect = None
            return
        expected = self._tokens[source]
        self._source = source + 1
        if self._former.get(expected, expected) == self._former.get(token, token):
            self._learn()
            if self._renamed.get(expected, token) != token:
                self._forget_place(expected)
            return
        same = self._same(self._tokens[-LONGEST_MATCH:], source)[:LEARNING_MATCH]
        if self._suspect is None and sum(same) == LEARNING_MATCH:
            self._suspect = expected, token
        else:
            self._suspect = self._source = None

    def _learn(self) -> None:
        """Learns a replacement: after one different token, the text agrees with its source."""
        if self._suspect is None:
            return
        former, new = self._suspect
        self._seen[self._suspect] += 1
        is_one = former in self._former or new in self._former
        if self._seen[self._suspect] >= TIMES_SEEN and not is_one and self._forgotten[former] < TIMES_FORGOTTEN:
            self._forget_place(former)
            self._renamed[former], self._former[new] = new, former
            self._remember_latest()
        self._suspect = None

    def _forget_place(self, former: int) -> None:
        """Drops the replacement of a token."""
        new = self._renamed.pop(former, None)
        if new is not None:
            del self._former[new], self._seen[former, new]
            self._forgotten[former] += 1
            self._remember_latest()

    def _remember_latest(self) -> None:
        """Indexes the latest tokens again after a replacement has changed; the source keeps its tokens."""
        for index in range(max(0, len(self._tokens) - RENAMED_WITHIN), len(self._tokens)):
            self._remember(index)

    def _remember(self, index: int) -> None:
        for size in range(1, min(LONGEST_NGRAM, index) + 1):
            self._places[self._former_of(self._tokens[index - size : index])] = index

    def _place(self, tail: Sequence[int], pending: Sequence[int]) -> int | None:
        """The index from which to copy the tokens after the text and the pending drafts."""
        source = self._source
        if source is not None and source + len(pending) <= len(self._tokens):
            ahead = self._tokens[source : source + len(pending)]
            if self._former_of(ahead) == self._former_of(pending) and source + len(pending) < len(self._tokens):
                return source + len(pending)
        return self._latest(tail)

    def _latest(self, tail: Sequence[int]) -> int | None:
        for size in range(min(LONGEST_NGRAM, len(tail)), 0, -1):
            place = self._places.get(self._former_of(tail[-size:]))
            if place is not None and place < len(self._tokens):
                return place
        return None

    def _same(self, tail: Sequence[int], place: int) -> list[bool]:
        """Which tokens before `place` equal the tokens at the end of the text, from the last token back."""
        before = self._former_of(self._tokens[max(0, place - len(tail)) : place])
        return [one == other for one, other in zip(reversed(before), reversed(self._former_of(tail)), strict=False)]

    def _former_of(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._former.get(token, token) for token in tokens)
