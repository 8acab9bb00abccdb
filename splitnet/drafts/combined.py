"""Drafts by a head, and copies of the text where these are right more often."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from splitnet.drafts.drafter import Guess
from splitnet.drafts.heads import DraftHead, HeadDrafter
from splitnet.drafts.prompt_lookup import PromptLookup

_COPIES = len(PromptLookup.priors)  # kinds of guesses that are copies, before those of the head


class Combined:
    """Of the two, each time the one whose guesses of this kind have been right more often.

    acceptance: how often guesses of some kinds are right.
    """

    priors = (*PromptLookup.priors, *HeadDrafter.priors)

    def __init__(self, head: DraftHead, acceptance: Callable[[Iterable[int]], float]) -> None:
        self.taps = head.taps
        self._copies = PromptLookup()
        self._head = HeadDrafter(head)
        self._acceptance = acceptance

    def begin(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self._copies.begin(tokens)
        self._head.begin(tokens, features)

    def observe(self, token: int, features: Tensor | None = None) -> None:
        self._copies.observe(token)
        self._head.observe(token, features)

    def draft(self, pending: Sequence[int]) -> Iterator[Guess]:
        copies = self._copies.draft(pending)
        first = next(copies, None)
        of_head = range(_COPIES, len(self.priors))
        if first is not None and self._acceptance([first.kind]) >= self._acceptance(of_head):
            yield first
            yield from copies
            return
        for token, kind in self._head.draft(pending):
            yield Guess(token, _COPIES + kind)
