"""The loop that generates one text, with drafts or without, in the place of transformers' own.

A drafted token is right if it is what the model chooses, greedily or by sampling, at that place. So every token is
chosen as without drafts, from the same scores and with the same random numbers, and a seed gives the same text. For a
draft that is certain of its token this is the rejection sampling of Leviathan et al. (arXiv:2211.17192): it is accepted
with the probability that the model gives it, and otherwise another is drawn from what the model gives to the others.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from transformers import GenerationMixin

from scheduler.speculation import NO_DRAFTS, Window
from splitnet.checkpoint.families import max_positions
from splitnet.drafts.draft_stats import Drafted
from splitnet.drafts.drafter import Guess
from splitnet.drafts.speculator import Drafts
from splitnet.hf.cache import RemoteCache
from splitnet.hf.remote_blocks import Exchange
from splitnet.swarm.plan import Prediction

PREDICTION_S = 1.0  # how long a prediction is used
CHOICE_S = 0.05  # how long a chosen window is used: over short links a choice takes 1 % of a step
LOOK_EVERY = 32  # tokens between two drafts, where drafts cost more time than they save
MOST_TEXTS = 4
"""Texts at once that "auto" drafts for: drafts slowed eight streams down; five to seven were not measured."""

_PREPARES = "prepare_inputs_for_generation"
_OTHERS = ("_sample", "_update_model_kwargs_for_generation", "_prefill")
_HANDED_OVER = frozenset({"input_ids", "cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep"})
LONGEST = 1 << 20  # tokens; longer texts are not tried


class Model(Protocol):
    """A causal LM whose calls can be cut in two, see `splitnet.hf.causal_lm.RemoteCausalLM`."""

    def step(self, input_ids: torch.Tensor, cache: RemoteCache) -> Outputs: ...

    def send(self, input_ids: torch.Tensor, cache: RemoteCache) -> Exchange: ...

    def receive(self, exchange: Exchange, input_ids: torch.Tensor, cache: RemoteCache) -> Outputs: ...


class Outputs(NamedTuple):
    """Of new positions. logits: `[seq, vocabulary]`. features: `[seq, len(taps) * hidden]`, see `DraftHead`."""

    logits: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Sent:
    """Tokens under way.

    exchange: None: they go through the model in one piece, once it is their turn. ids: `[1, seq]`: drafts, behind the
    last token of the text if nothing else was under way. alone: nothing else was.
    """

    exchange: Exchange | None
    ids: torch.Tensor
    began: float
    sending_ms: float
    alone: bool


class Text:
    """The tokens so far, from the prompt `[1, seq]` on, and how the next one is chosen: as in transformers'
    `generate()`, by the `LogitsProcessorList`, `StoppingCriteriaList` and `GenerationConfig` that it has prepared.
    """

    def __init__(self, prompt: torch.Tensor, processor: Any, criteria: Any, config: Any, streamer: Any) -> None:
        self.tokens: list[int] = prompt[0].tolist()
        self.finished = False
        self.most: int | None = config.max_length  # tokens that it may have
        self._held = torch.empty(1, 2 * prompt.shape[1] + 256, dtype=prompt.dtype, device=prompt.device)
        self._held[:, : prompt.shape[1]] = prompt
        self._processor = processor
        self._criteria = criteria
        self._samples: bool = config.do_sample
        self.streamer = streamer

    def ids(self, start: int = 0) -> torch.Tensor:
        """`[1, seq]`, from the token at `start` on."""
        return self._held[:, start : len(self.tokens)]

    def choose(self, logits: torch.Tensor) -> int:
        """Takes the next token by its logits `[vocabulary]`."""
        scores = logits[None].to(torch.float32, copy=len(self._processor) > 0)  # processors may write into it
        scores = self._processor(self.ids(), scores)
        if self._samples:
            chosen = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)[0]
        else:
            chosen = scores.argmax(dim=-1)
        token = int(chosen)
        if len(self.tokens) == self._held.shape[1]:
            self._held = torch.cat((self._held, torch.empty_like(self._held)), dim=1)
        self._held[0, len(self.tokens)] = token
        self.tokens.append(token)
        if self.streamer is not None:
            self.streamer.put(chosen.cpu())
        self.finished = bool(self._criteria(self.ids(), scores).all())
        return token


class Decoding:
    """One text on its way.

    cache: holds the prompt, or embeddings in its place. text: ends with the prompt. drafts: None: one token at a time.
    """

    def __init__(
        self,
        model: Model,
        cache: RemoteCache,
        text: Text,
        drafts: Drafts | None = None,
        max_positions: int | None = None,
    ) -> None:
        self._model = model
        self._layer = cache.remote
        self._cache = cache
        self._text = text
        self._drafts = drafts
        # Columns of the cache before the first token: embeddings that the prompt began with.
        self._offset = cache.remote.columns - len(text.tokens)
        limits = (text.most, None if max_positions is None else max_positions - self._offset + 1)
        self._most = min((limit for limit in limits if limit is not None), default=None)
        self._under_way: deque[_Sent] = deque()
        self._drafted: deque[Drafted] = deque()  # tokens behind the text that were sent
        self._imagined: Guess | None = None  # what was not sent, only to see whether it is right
        self._unseen = 0  # tokens since the latest draft, if nothing of that was sent
        self._looked = False  # a draft was made in this turn
        self._begins = True  # no draft was made yet
        self._predictions: Callable[[int], Prediction] | None = None
        self._predicted_at = self._chosen_at = 0.0  # seconds
        self._chosen: dict[int, Window] = {}  # by the kind of the first guess

    def run(self, prompt: Outputs) -> torch.Tensor:
        """Goes on until the text is finished, from the outputs of the last positions of the prompt.

        Returns `[1, seq]`, the prompt and all further tokens. Raises SplitnetError: as a call of the model.
        """
        with self._drafts.stats.text() if self._drafts is not None else nullcontext():
            if self._drafts is not None:
                self._drafts.drafter.begin(self._text.tokens, prompt.features[:-1])
            self._take(prompt.logits[-1], prompt.features[-1])
            try:
                while not self._text.finished:
                    self._turn()
            finally:
                self._forget_drafts()
        if self._text.streamer is not None:
            self._text.streamer.end()
        return self._text.ids()

    def _turn(self) -> None:
        """Sends what can be sent, and takes in what comes back first."""
        window, guesses = self._plan()
        if not self._under_way:
            self._send(guesses, whole=window.in_flight == 1)
            guesses = []
        while len(self._under_way) < window.in_flight:
            guesses = guesses or [*itertools.islice(self._guesses(), window.length)]
            if not guesses:
                break
            self._send(guesses)
            guesses = []
        sent = self._under_way.popleft()
        began, waited_ms = time.perf_counter(), self._layer.waited_ms
        if sent.exchange is None:
            outputs = self._model.step(sent.ids, self._cache)
        else:
            outputs = self._model.receive(sent.exchange, sent.ids, self._cache)
        before = len(self._text.tokens)
        for logits, features in zip(*outputs, strict=True):
            token = self._take(logits, features)
            if self._text.finished or not self._goes_on_with(token):
                self._forget_drafts()
                break
        if self._drafts is None:
            return
        self._drafts.stats.received(len(self._text.tokens) - before, drafted=self._looked)
        if sent.alone:
            now = time.perf_counter()
            client_ms = sent.sending_ms + (now - began) * 1000 - (self._layer.waited_ms - waited_ms)
            self._drafts.stats.observe_latency(
                sent.ids.shape[1], (now - sent.began) * 1000, client_ms, self._prediction
            )

    def _plan(self) -> tuple[Window, list[Guess]]:
        """The best window now, and its guesses; where that is to send none, notes one to see whether it is right."""
        drafts, self._looked = self._drafts, False
        if drafts is None or not drafts.stats.knows_steps:
            return NO_DRAFTS, []
        if not drafts.required and drafts.stats.texts > MOST_TEXTS:
            return NO_DRAFTS, []
        stats, self._imagined = drafts.stats, None
        if self._unseen and not stats.drafts_pay(self._prediction):
            self._unseen = (self._unseen + 1) % LOOK_EVERY
            return NO_DRAFTS, []
        guesses = self._guesses()
        first = next(guesses, None)
        if first is None:
            return NO_DRAFTS, []
        self._looked = True
        if time.monotonic() - self._chosen_at > CHOICE_S:
            self._chosen, self._chosen_at = {}, time.monotonic()
        if first.kind not in self._chosen:
            self._chosen[first.kind] = stats.window(first.kind, self._prediction)
        window = self._chosen[first.kind]
        if window.in_flight > 1:
            self._unseen = 0
            return window, [first, *itertools.islice(guesses, window.length - 1)]
        if self._under_way:
            return NO_DRAFTS, []
        taken = [first]
        noted = (taken.append(guess) or guess for guess in guesses)
        del taken[stats.best_length(itertools.chain(taken[:1], noted), self._prediction) :]
        self._imagined = None if taken else first
        self._unseen = 0 if taken else 1
        return Window(len(taken), 1), taken

    def _guesses(self) -> Iterator[Guess]:
        """Of tokens behind the text and what is under way; fewer near the end: the model itself adds one at least."""
        if self._drafts is None:
            return
        bound = None if self._layer.bound is None else self._layer.bound - self._offset
        most = min((limit for limit in (self._most, bound) if limit is not None), default=None)
        room = None if most is None else max(0, most - len(self._text.tokens) - 1 - len(self._drafted))
        guesses = self._drafts.drafter.draft([drafted.token for drafted in self._drafted])
        timed = self._drafts.stats.timed(guesses, catches_up=self._begins)
        self._begins = False
        yield from itertools.islice(timed, room)

    def _send(self, guesses: Sequence[Guess], *, whole: bool = False) -> None:
        """Sends drafts behind what is under way, or else behind the last token of the text."""
        alone = not self._under_way
        ids = self._text.ids(len(self._text.tokens) - alone)
        before = self._drafted[-1].kind if self._drafted else None
        for place, guess in enumerate(guesses):
            self._drafted.append(Drafted(*guess, place, before))
            before = guess.kind
        if guesses:
            ids = torch.cat((ids, ids.new_tensor([[guess.token for guess in guesses]])), dim=1)
        began = time.perf_counter()
        exchange = None if whole else self._model.send(ids, self._cache)
        sending_ms = (time.perf_counter() - began) * 1000
        if guesses and self._drafts is not None:
            self._drafts.stats.sent(len(guesses))
        self._under_way.append(_Sent(exchange, ids, began, sending_ms, alone))

    def _take(self, logits: torch.Tensor, features: torch.Tensor) -> int:
        token = self._text.choose(logits)
        if self._drafts is not None:
            self._drafts.drafter.observe(token, features)
            if self._imagined is not None:
                self._drafts.stats.compared(self._imagined.kind, self._imagined.token == token)
                self._imagined = None
        return token

    def _goes_on_with(self, token: int) -> bool:
        """Whether what was sent behind the text begins with this token, which belongs to the text now."""
        if not self._drafted or self._drafts is None:
            return False
        sent = self._drafted.popleft()
        self._drafts.stats.verified(sent, sent.token == token)
        return sent.token == token

    def _forget_drafts(self) -> None:
        """What was sent behind the text counts no more; the cache holds what it shares with the text."""
        for sent in self._under_way:
            if sent.exchange is not None:
                sent.exchange.abandon()
        self._under_way.clear()
        self._drafted.clear()
        self._layer.crop(min(0, self._offset + len(self._text.tokens) - 1 - self._layer.columns))

    def _prediction(self, positions: int) -> Prediction:
        session, now = self._cache.session, time.monotonic()
        if self._predictions is None or now - self._predicted_at > PREDICTION_S:
            assert session is not None
            self._predictions, self._predicted_at = session.predictions(), now
        return self._predictions(positions)


class FamilyLoop:
    """transformers' loop with what a family adds to it: whether `Decoding` can take its place.

    transformers asks a family's class before each call of the model, in `prepare_inputs_for_generation`, and after it.
    Most classes do what transformers does. Of the others it is found by trying at which lengths of a text they do more
    than hand over the last token, the cache and the mask. family: the transformers class of the model.
    """

    def __init__(self, model: Any, family: Any) -> None:
        self._model = model
        self._family = family

    def differs(self, prompt: int, most: int | None) -> list[str]:
        """What the family does of its own while a text grows from `prompt` to `most` tokens; empty: nothing."""
        own = getattr(self._model, _PREPARES)
        if getattr(own, "__func__", None) is not getattr(type(self._model), _PREPARES):
            return [f"{_PREPARES} of the caller's"]
        for name in _OTHERS:
            if name in vars(self._model) or getattr(self._family, name) is not getattr(GenerationMixin, name):
                return [f"{name} of the family"]
        last = LONGEST if most is None else most
        lengths = [length for length in self._lengths if prompt < length <= last]
        return [f"a text of {lengths[0]} tokens, which the family treats in a way of its own,"] if lengths else []

    @cached_property
    def _lengths(self) -> list[int]:
        """Lengths of a text before whose last token the family does something of its own."""
        if getattr(self._family, _PREPARES) is getattr(GenerationMixin, _PREPARES):
            return []
        return [length for length in sorted(set(self._likely())) if not self._hands_over(length)]

    def _likely(self) -> Iterator[int]:
        """Two short ones, and those around every number of the config."""
        config = self._model.config.get_text_config()
        most = min(max_positions(config) or LONGEST, LONGEST)
        values = list(vars(config).values())
        values += [inner for value in values if isinstance(value, dict) for inner in value.values()]
        numbers = [1, *(value for value in values if isinstance(value, int))]
        yield from (length for number in numbers for length in range(number, number + 3) if 1 < length <= most)

    @torch.no_grad()
    def _hands_over(self, length: int) -> bool:
        """Whether it leaves it at the last token, behind what the cache holds."""
        cache = self._model.new_cache()
        cache.remote.columns = length - 1
        ids = torch.zeros(1, length, dtype=torch.long, device=self._model.device)
        mask, positions = torch.ones_like(ids), torch.arange(length, device=ids.device)[None]
        given = {"cache": cache, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        try:
            found = getattr(self._family, _PREPARES)(self._model, ids, next_sequence_length=1, **given)
        except Exception:  # the code of any family
            return False
        same = found.keys() <= _HANDED_OVER and found.get("cache") is cache and found["input_ids"].equal(ids[:, -1:])
        seen, place = found.get("attention_mask"), found.get("position_ids")
        return same and (seen is None or seen.equal(mask)) and (place is None or place.equal(positions[:, -1:]))
