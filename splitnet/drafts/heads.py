"""Drafts by a head: one or a few blocks at the client, whose input is the hidden states that hops return.

Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", arXiv:2401.15077, section 4.1. EAGLE
heads and the blocks for multi-token prediction of DeepSeek-V3 (arXiv:2412.19437, section 2.2) have different layers,
but draft in the same manner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from splitnet.blocks.kv_cache import SequenceCache
from splitnet.drafts.drafter import Guess, shared
from splitnet.drafts.prompt_lookup import PromptLookup

PIECE = 512  # maximum positions that a head runs at once, to limit memory
CONFIDENCES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
"""Thresholds between kinds of guesses, in the probability that the head gives its likeliest token."""


class DraftHead(Protocol):
    """Guesses the token after the next one, from a position's features and the next token.

    taps: boundaries whose hidden states are the features, each as a number of blocks; the number of all blocks means
    the output of the last block, before the final norm. draft_vocabulary: `[draft vocabulary]`, ids of the tokens that
    the head knows; None: all tokens.
    """

    @property
    def taps(self) -> tuple[int, ...]: ...

    @property
    def draft_vocabulary(self) -> Tensor | None: ...

    def run(self, tokens: Tensor, features: Tensor, cache: SequenceCache, *, own: bool = False) -> Tensor:
        """The outputs `[seq, hidden]` of new positions, at most `PIECE`; appends the positions to the cache.

        tokens: `[seq]`, the token after each position. features: `[seq, len(taps) * hidden]` of the model; with `own`
        `[seq, hidden]`, the head's outputs at the previous positions.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """`[seq, hidden]` -> `[seq, draft vocabulary]`."""
        ...


class HeadDrafter:
    """Greedy drafts by a head.

    Positions with features of the model are run with these; for later positions, the head's own outputs are the
    features.
    """

    priors = tuple((low + high) / 2 for low, high in zip((0.0, *CONFIDENCES), (*CONFIDENCES, 1.0), strict=True))

    def __init__(self, head: DraftHead) -> None:
        self.taps = head.taps
        self._head = head
        self._cache = SequenceCache()
        self._known: list[tuple[int, Tensor]] = []  # tokens and features of positions that were not run yet
        self._length = 0  # positions of the cache with features of the model
        self._drafted: list[int] = []  # drafted tokens after these positions; the cache may hold some of them
        self._outputs: list[Tensor] = []  # of the head, `[hidden]`: at the last position with features, and at drafts

    def begin_text(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self._cache, self._length = SequenceCache(), 0
        self._drafted, self._outputs = [], []
        # Positions with embeddings in place of a prompt have no tokens, so these positions are left out.
        count = 0 if features is None else max(0, min(len(features), len(tokens) - 1))
        self._known = [] if features is None or not count else [*zip(tokens[-count:], features[-count:], strict=True)]

    def observe_token(self, token: int, features: Tensor | None = None) -> None:
        if features is not None:
            self._known.append((token, features))

    @torch.inference_mode()
    def draft_tokens(self, pending: Sequence[int]) -> Iterator[Guess]:
        self._catch_up()
        if not self._outputs:
            return
        keep = shared(self._drafted, pending)
        self._forget_drafts(keep)
        for token in pending[keep:]:
            self._go_on(token)
        while True:
            probabilities = self._head.logits(self._outputs[-1][None])[0].float().softmax(dim=-1)
            confidence, index = (one.item() for one in probabilities.max(dim=-1))
            known = self._head.draft_vocabulary
            token = int(index if known is None else known[int(index)])
            yield Guess(token, sum(confidence >= bound for bound in CONFIDENCES))
            self._go_on(token)

    def _catch_up(self) -> None:
        """Runs the positions whose features have arrived since the last draft."""
        if not self._known:
            return
        self._forget_drafts(0)
        tokens, features = zip(*self._known, strict=True)
        stacked = torch.stack(features)
        ids = torch.tensor(tokens, device=stacked.device)
        for some, states in zip(ids.split(PIECE), stacked.split(PIECE), strict=True):
            self._outputs = [self._head.run(some, states, self._cache)[-1]]
        self._length += len(tokens)
        self._known = []

    def _go_on(self, token: int) -> None:
        last = self._outputs[-1][None]
        self._outputs.append(self._head.run(torch.tensor([token], device=last.device), last, self._cache, own=True)[0])
        self._drafted.append(token)

    def _forget_drafts(self, keep: int) -> None:
        """Forgets all drafted tokens but the first `keep`."""
        if len(self._drafted) > keep:
            self._cache.crop(self._length + keep)
            del self._drafted[keep:], self._outputs[keep + 1 :]


_COPIES = len(PromptLookup.priors)  # kinds of guesses that are copies; the kinds of the head follow


class CombinedDrafter:
    """Drafts by a head, or copies of the text where copies of this kind are accepted more often.

    acceptance: the acceptance rate of guesses of some kinds.
    """

    priors = (*PromptLookup.priors, *HeadDrafter.priors)

    def __init__(self, head: DraftHead, acceptance: Callable[[Iterable[int]], float]) -> None:
        self.taps = head.taps
        self._copies = PromptLookup()
        self._head = HeadDrafter(head)
        self._acceptance = acceptance

    def begin_text(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self._copies.begin_text(tokens)
        self._head.begin_text(tokens, features)

    def observe_token(self, token: int, features: Tensor | None = None) -> None:
        self._copies.observe_token(token)
        self._head.observe_token(token, features)

    def draft_tokens(self, pending: Sequence[int]) -> Iterator[Guess]:
        copies = self._copies.draft_tokens(pending)
        first = next(copies, None)
        of_head = range(_COPIES, len(self.priors))
        if first is not None and self._acceptance([first.kind]) >= self._acceptance(of_head):
            yield first
            yield from copies
            return
        for token, kind in self._head.draft_tokens(pending):
            yield Guess(token, _COPIES + kind)
