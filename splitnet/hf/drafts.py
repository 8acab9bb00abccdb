"""Where drafts of the next tokens come from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import Cache, DynamicCache

from scheduler.batching import MovingAverage
from splitnet.blocks.kv_cache import OneSequence, SequenceCache, SequenceStates
from splitnet.checkpoint.families import family_of, keeps_states, states_per_block
from splitnet.errors import SplitnetError

SHARE = 0.2  # weight of the latest draft in the average of its time


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next.

    tokens: none if there is nothing to guess from. kind: drafts of one kind are accepted about equally often.
    """

    tokens: list[int]
    kind: int = 0


class Drafter(Protocol):
    """Guesses how a text goes on; follows one text at a time.

    priors: by kind, how often a drafted token is accepted, before anything is known of the text. draft_ms: per token; 0
    if that does not count, so that a draft may be made just to see whether it would be right.
    """

    @property
    def priors(self) -> Sequence[float]: ...

    @property
    def draft_ms(self) -> float: ...

    def begin(self, tokens: Sequence[int]) -> None:
        """A new text, which begins with these tokens."""

    def observe(self, token: int) -> None:
        """The text goes on with `token`."""

    def draft(self, pending: Sequence[int], count: int) -> Draft:
        """At most `count` tokens that may follow the text and `pending`, which was drafted before."""
        ...


class DraftModel:
    """A small causal LM of transformers with the same tokens, in this process, always takes what it finds likeliest.

    vocabulary: how many tokens the large model knows. Raises SplitnetError: it knows others, or keeps states that
    cannot be rewound.
    """

    priors = (0.6,)

    def __init__(self, model: Any, vocabulary: int) -> None:
        config = model.config.get_text_config()
        if config.vocab_size != vocabulary:
            raise SplitnetError(
                f"the draft model knows {config.vocab_size} tokens, the model {vocabulary}: "
                "use a draft model with the same tokenizer"
            )
        has_states = keeps_states(config)
        if not has_states and getattr(model, "_is_stateful", False):
            raise SplitnetError(
                f"draft models of the family {config.model_type!r} keep states that cannot be rewound: use one of "
                "another family, or prompt-lookup"
            )
        self._average = MovingAverage(SHARE, 1.0)
        self.draft_ms = self._average.value
        self._model = model
        self._text: list[int] = []
        self._cached: list[int] = []
        self._cache = DynamicCache()  # of full layers, which can always be cropped
        # In its place where blocks keep states; it has the tokens as what came in.
        self._row = SequenceCache(states=SequenceStates(states_per_block(config))) if has_states else None
        self._one_by_one = has_states and family_of(config).one_by_one

    def begin(self, tokens: Sequence[int]) -> None:
        self._text = list(tokens)

    def observe(self, token: int) -> None:
        self._text.append(token)

    @torch.inference_mode()
    def draft(self, pending: Sequence[int], count: int) -> Draft:
        known = [*self._text, *pending]
        self._keep_common(known)
        drafted: list[int] = []
        given = known[len(self._cached) :]
        began = time.perf_counter()
        while len(drafted) < count:
            logits = self._logits(torch.tensor(given, device=self._model.device))
            self._cached += given
            given = [int(logits[0, -1].argmax())]
            drafted += given
            if len(drafted) == 1:
                began = time.perf_counter()  # the first may come after a prefill
        if count > 1:
            self._average.add((time.perf_counter() - began) * 1000 / (count - 1))
            self.draft_ms = self._average.value
        return Draft(drafted)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """`[1, 1, vocabulary]`, after new tokens `[count]`."""
        if self._row is None:
            return self._run(ids, self._cache)
        to_run = self._row.begin_pass(ids[:, None])[:, 0]
        pieces = to_run.split(1) if self._one_by_one and self._row.computed else [to_run]
        logits = torch.empty(0)
        for piece in pieces:
            logits = self._run(piece, OneSequence(self._row))
            self._row.caught_up(self._row.computed + len(piece))
        self._row.advance(len(ids))
        return logits

    def _run(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self._model(input_ids=ids[None], cache=cache, use_cache=True, logits_to_keep=1).logits

    def _keep_common(self, known: Sequence[int]) -> None:
        """Crops the cache to what it shares with the text, less one token to go on from."""
        most = min(len(self._cached), len(known) - 1)
        same = next((index for index in range(most) if self._cached[index] != known[index]), most)
        if same < len(self._cached):
            if self._row is None:
                self._cache.crop(same - len(self._cached))
            else:
                self._row.crop(same)
            del self._cached[same:]


LONGEST_NGRAM = 3  # tokens that are looked up
LONGEST_MATCH = 16  # tokens before a place that are compared at most, to tell how sure it is
LEARNING_MATCH = 3  # tokens before a place that must be the same for another token there to be taken for a new name
RENAMED_WITHIN = 2048  # latest tokens in which a new name is looked for: the copy, not its source
TIMES_FORGOTTEN = 3  # how often a token may lose its new name before it gets none any more
TIMES_SEEN = 2  # how often a token must have become the same other one


class PromptLookup:
    """Drafts what followed the last tokens earlier in the text: no model, no time.

    Saxena, "Prompt Lookup Decoding" (2023). The latest place where the last `LONGEST_NGRAM` tokens, or else fewer,
    stood is taken; the more tokens before it are the same, too, the surer it is.

    A copy with changes, such as edited code, is followed further: when the text has one other token than its source and
    goes on like it, the one has become the other. From then on both count as the same token when places are compared,
    and the new one is drafted. The source is followed as long as the text goes on like it, rather than looked up anew,
    as the latest place would mostly be within the copy.
    """

    priors = (0.1, 0.2, 0.4, 0.6, 0.75, 0.85)
    draft_ms = 0.0

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._renamed: dict[int, int] = {}  # what tokens have become
        self._former: dict[int, int] = {}  # the same the other way round
        self._seen: Counter[tuple[int, int]] = Counter()  # how often a token has become another
        self._forgotten: Counter[int] = Counter()  # how often a token has lost its new name
        self._places: dict[tuple[int, ...], int] = {}  # where the text went on after an n-gram, the last time
        self._source: int | None = None  # the place that is copied from: where it goes on
        self._suspect: tuple[int, int] | None = None  # a token of the source, and the latest, which came in its place

    def begin(self, tokens: Sequence[int]) -> None:
        self._tokens, self._places, self._source, self._suspect = [], {}, None, None
        self._renamed, self._former, self._seen, self._forgotten = {}, {}, Counter(), Counter()
        for token in tokens:
            self.observe(token)

    def observe(self, token: int) -> None:
        self._follow(token)
        self._tokens.append(token)
        self._remember(len(self._tokens) - 1)
        if self._source is None:
            self._source = self._latest(self._tokens[-LONGEST_NGRAM:])

    def draft(self, pending: Sequence[int], count: int) -> Draft:
        tail = [*self._tokens[-LONGEST_MATCH:], *pending][-LONGEST_MATCH:]
        place = self._place(tail, pending)
        if place is None:
            return Draft([])
        found = [self._renamed.get(token, token) for token in self._tokens[place : place + count]]
        found += pending[: count - len(found)]
        while len(found) < count:  # a text that repeats itself goes on doing so
            found += found[: count - len(found)]
        same = self._same(tail, place)
        sure = sum(same) if same and same[0] else 0
        return Draft(found, sure.bit_length())

    def _follow(self, token: int) -> None:
        """What a new token says of the place that is copied from."""
        source = self._source
        if source is None:
            self._suspect = None
            return
        expected = self._tokens[source]
        self._source = source + 1
        if self._former.get(expected, expected) == self._former.get(token, token):
            self._learn()
            if self._renamed.get(expected, token) != token:
                self._forget(expected)
            return
        same = self._same(self._tokens[-LONGEST_MATCH:], source)[:LEARNING_MATCH]
        if self._suspect is None and sum(same) == LEARNING_MATCH:
            self._suspect = expected, token
        else:
            self._suspect = self._source = None

    def _learn(self) -> None:
        """The text went on as its source after a token that was another: that may have a new name."""
        if self._suspect is None:
            return
        former, new = self._suspect
        self._seen[self._suspect] += 1
        is_one = former in self._former or new in self._former
        if self._seen[self._suspect] >= TIMES_SEEN and not is_one and self._forgotten[former] < TIMES_FORGOTTEN:
            self._forget(former)
            self._renamed[former], self._former[new] = new, former
            self._remember_latest()
        self._suspect = None

    def _forget(self, former: int) -> None:
        """It is not, or no longer, what it had become."""
        new = self._renamed.pop(former, None)
        if new is not None:
            del self._former[new], self._seen[former, new]
            self._forgotten[former] += 1
            self._remember_latest()

    def _remember_latest(self) -> None:
        """After names have changed: what a token was stays as it is, so only where the copy has new ones."""
        for index in range(max(0, len(self._tokens) - RENAMED_WITHIN), len(self._tokens)):
            self._remember(index)

    def _remember(self, index: int) -> None:
        for size in range(1, min(LONGEST_NGRAM, index) + 1):
            self._places[self._former_of(self._tokens[index - size : index])] = index

    def _place(self, tail: Sequence[int], pending: Sequence[int]) -> int | None:
        """Where to copy from, behind the text and what is drafted already."""
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
        """Which tokens before `place` are those at the end of the text, from the last one back."""
        before = self._former_of(self._tokens[max(0, place - len(tail)) : place])
        return [one == other for one, other in zip(reversed(before), reversed(self._former_of(tail)), strict=False)]

    def _former_of(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._former.get(token, token) for token in tokens)
