"""The loop that generates with drafts, in the place of transformers' own.

A drafted token is right if it is what the model chooses, greedily or by sampling, at that place. So every token is
chosen as without drafts, from the same scores and with the same random numbers, and a seed gives the same text. For a
draft that is certain of its token this is the rejection sampling of Leviathan et al. (arXiv:2211.17192): it is accepted
with the probability that the model gives it, and otherwise another is drawn from what the model gives to the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from scheduler.speculation import NO_DRAFTS, Window
from splitnet.client.cache import RemoteCache
from splitnet.client.planner import Forecast
from splitnet.client.remote import Exchange
from splitnet.client.speculation.drafts import Draft, Drafter
from splitnet.client.speculation.experience import Experience
from splitnet.client.text import Text
from splitnet.errors import SplitnetError

LOOK_EVERY = 32
"""Where drafts cost time and promise nothing, one is made after so many tokens, to see whether that is still so."""


class Model(Protocol):
    """A causal LM whose calls can be cut in two: what is sent, and what comes back."""

    def prefill(self, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor:
        """The logits after `[1, seq]` new tokens, `[vocabulary]`."""
        ...

    def send(self, input_ids: torch.Tensor, cache: RemoteCache) -> Exchange:
        """Sends `[1, seq]` new tokens through the blocks."""
        ...

    def receive(self, exchange: Exchange, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor:
        """Their logits, `[seq, vocabulary]`."""
        ...


@dataclass(frozen=True, slots=True)
class _Sent:
    """Tokens under way."""

    exchange: Exchange
    ids: torch.Tensor
    """`[1, seq]`: drafts, behind the last token of the text if nothing else was under way."""
    began: float
    sending_ms: float
    alone: bool
    """Nothing else was under way."""


class SpeculativeDecoding:
    """Generates one text after the other, one row each.

    Args:
        drafter: guesses tokens.
        experience: decides how many of them are sent.
    """

    def __init__(self, drafter: Drafter, experience: Experience) -> None:
        self._drafter = drafter
        self._experience = experience

    def generate(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        cache: RemoteCache,
        streamer: Any = None,
    ) -> torch.Tensor:
        """Called by transformers' `generate()`; returns `[1, seq]`, the prompt and what comes after.

        Raises:
            SplitnetError: more than one row is asked for, or more than tokens are to be returned.
        """
        if len(input_ids) != 1 or generation_config.num_beams > 1 or generation_config.return_dict_in_generate:
            raise SplitnetError(
                "speculation is for one sequence at a time, of which only tokens are returned: leave out `speculate`"
            )
        text = Text(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        run = _Run(model, cache, text, self._drafter, self._experience)
        try:
            while not text.finished:
                run.turn()
        finally:
            run.stop()
        text.end()
        return text.ids()


class _Run:
    """One text on its way."""

    def __init__(self, model: Model, cache: RemoteCache, text: Text, drafter: Drafter, experience: Experience) -> None:
        self._model = model
        self._cache = cache
        self._text = text
        self._drafter = drafter
        self._experience = experience
        self._under_way: deque[_Sent] = deque()
        self._drafted: deque[tuple[int, int]] = deque()
        """Tokens behind the text that were sent, each with the kind of its draft."""
        self._imagined: Draft = Draft([])
        """What was not sent, only to see whether it is right."""
        self._unseen_drafts = 0
        drafter.begin(text.tokens)

    def turn(self) -> None:
        """Sends what can be sent, and takes in what comes back first."""
        unseen = self._text.ids(self._cache.remote.columns)
        if unseen.shape[1] > 1:
            self._take(self._model.prefill(unseen, self._cache))
            return
        self._send_windows()
        sent = self._under_way.popleft()
        logits = self._model.receive(sent.exchange, sent.ids, self._cache)
        for index in range(len(logits)):
            token = self._take(logits[index])
            if self._text.finished or not self._goes_on_with(token):
                self._forget_drafts()
                break
        if sent.alone:
            now = time.perf_counter()
            client_ms = sent.sending_ms + (now - sent.exchange.received_at) * 1000
            self._experience.took(sent.ids.shape[1], (now - sent.began) * 1000, client_ms, self._forecast)

    def stop(self) -> None:
        """Awaits nothing any more; the cache holds what it shares with the text."""
        self._forget_drafts()

    def _send_windows(self) -> None:
        window = self._window()
        if not self._under_way:
            self._send(self._draft(window.length))
        while len(self._under_way) < window.in_flight:
            draft = self._draft(window.length)
            if not draft.tokens:
                return
            self._send(draft)

    def _window(self) -> Window:
        """What is best now; where it is to draft nothing, a look at whether a draft would be right."""
        self._imagined = Draft([])
        costly = self._drafter.draft_ms > 0
        guess = Draft([]) if costly else self._draft(1)
        if not costly and not guess.tokens:
            return NO_DRAFTS
        window = self._experience.window(guess.kind, self._drafter.draft_ms, self._forecast)
        if not window.length and not self._under_way:
            self._unseen_drafts += 1
            if costly and self._unseen_drafts % LOOK_EVERY == 0:
                guess = self._draft(1)
            self._imagined = guess
        return window

    def _draft(self, count: int) -> Draft:
        """Of `count` further tokens those that are of use: the model itself adds one at least."""
        most = self._text.most
        room = count if most is None else min(count, most - len(self._text.tokens) - 1 - len(self._drafted))
        if room < 1:
            return Draft([])
        return self._drafter.draft([token for token, _ in self._drafted], room)

    def _send(self, draft: Draft) -> None:
        """Sends drafts behind what is under way, or else behind the last token of the text."""
        alone = not self._under_way
        ids = self._as_ids([*self._text.tokens[-1:], *draft.tokens] if alone else draft.tokens)
        began = time.perf_counter()
        exchange = self._model.send(ids, self._cache)
        sending_ms = (time.perf_counter() - began) * 1000
        self._drafted.extend((token, draft.kind) for token in draft.tokens)
        self._experience.sent(len(draft.tokens))
        self._under_way.append(_Sent(exchange, ids, began, sending_ms, alone))

    def _take(self, logits: torch.Tensor) -> int:
        token = self._text.choose(logits)
        self._drafter.observe(token)
        if self._imagined.tokens:
            self._experience.compared(self._imagined.kind, self._imagined.tokens[0] == token)
            self._imagined = Draft([])
        return token

    def _goes_on_with(self, token: int) -> bool:
        """Whether what was sent behind the text begins with this token, which belongs to the text now."""
        if not self._drafted:
            return False
        drafted, kind = self._drafted.popleft()
        self._experience.verified(kind, drafted == token)
        return drafted == token

    def _forget_drafts(self) -> None:
        """What was sent behind the text counts no more."""
        for sent in self._under_way:
            sent.exchange.abandon()
        self._under_way.clear()
        self._drafted.clear()
        layer = self._cache.remote
        layer.crop(min(0, len(self._text.tokens) - 1 - layer.columns))

    def _as_ids(self, tokens: Sequence[int]) -> torch.Tensor:
        """`[1, seq]`."""
        held = self._text.ids()
        return torch.tensor([tokens], dtype=held.dtype, device=held.device)

    def _forecast(self, positions: int) -> Forecast:
        session = self._cache.session
        assert session is not None
        return session.forecast(positions)
