"""The loop that generates one text, with drafts or without, in place of transformers' loop.

A drafted token is accepted if the model chooses the same token, greedily or by sampling. Every token is chosen in the
same way as without drafts: from the same scores and with the same random numbers, so a seed gives the same text.
For greedy drafts this is the rejection sampling of Leviathan et al. (arXiv:2211.17192): a draft is accepted with its
probability by the model; otherwise another token is drawn from the model's distribution without the draft.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from transformers import (
    EosTokenCriteria,
    GenerationMixin,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from scheduler.speculation import NO_DRAFTS, Window
from splitnet.checkpoint.families import max_positions
from splitnet.drafts.draft_stats import Drafted
from splitnet.drafts.drafter import Guess
from splitnet.drafts.speculator import Drafts
from splitnet.hf.cache import RemoteCache
from splitnet.hf.remote_blocks import Exchange
from splitnet.swarm.plan import Prediction

PREDICTION_S = 1.0  # how long a prediction is used
CHOICE_S = 0.05  # how long a chosen window is used: over short links, one choice takes 1 % of a step
LOOK_EVERY = 32  # tokens between two drafts, where drafts cost more time than they save
MOST_TEXTS = 4
"""Largest number of simultaneous texts for which "auto" makes drafts: drafts slowed eight texts down; five to seven
were not measured."""

_LEAST_TEMPERATURE = 1e-3  # with lower ones, and with higher ones than the inverse, differences might be lost
_BLIND = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)  # criteria that read no scores
_PREPARES = "prepare_inputs_for_generation"
_OTHERS = ("_sample", "_update_model_kwargs_for_generation", "_prefill")
_HANDED_OVER = frozenset({"input_ids", "cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep"})
LONGEST = 1 << 20  # tokens; longer texts are not tried


class Model(Protocol):
    """A causal LM whose calls can be split into sending and receiving, see `splitnet.hf.causal_lm.RemoteCausalLM`."""

    def step(self, input_ids: torch.Tensor, cache: RemoteCache) -> Outputs: ...

    def send_tokens(self, input_ids: torch.Tensor, cache: RemoteCache) -> Exchange: ...

    def receive_outputs(self, exchange: Exchange, input_ids: torch.Tensor, cache: RemoteCache) -> Outputs: ...


class Outputs(NamedTuple):
    """Outputs of new positions. logits: `[seq, vocabulary]`. features: `[seq, len(taps) * hidden]`, see `DraftHead`."""

    logits: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True, slots=True)
class _SentTokens:
    """Tokens under way.

    exchange: None: the tokens are sent later, in one call of the model. ids: `[1, seq]`: drafts, after the last token
    of the text if nothing else was under way. alone: nothing else was under way.
    """

    exchange: Exchange | None
    ids: torch.Tensor
    began: float
    sending_ms: float
    alone: bool


class GrowingText:
    """The tokens of a text, beginning with the prompt `[1, seq]`, and the choice of the next token.

    Tokens are chosen as in transformers' `generate()`, with its `LogitsProcessorList`, `StoppingCriteriaList` and
    `GenerationConfig`.
    """

    def __init__(self, prompt: torch.Tensor, processor: Any, criteria: Any, config: Any, streamer: Any) -> None:
        self.tokens: list[int] = prompt[0].tolist()
        self.finished = False
        self.most: int | None = config.max_length  # largest number of tokens
        self._held = torch.empty(1, 2 * prompt.shape[1] + 256, dtype=prompt.dtype, device=prompt.device)
        self._held[:, : prompt.shape[1]] = prompt
        self._processor = processor
        self._criteria = criteria
        self._samples: bool = config.do_sample
        self.streamer = streamer

    def ids(self, start: int = 0) -> torch.Tensor:
        """The tokens from `start` on, `[1, seq]`."""
        return self._held[:, start : len(self.tokens)]

    @property
    def best(self) -> int:
        """How many of the largest logits decide the choices of tokens, with those equal to the least; 0: all may.

        A call with these logits and -inf for others chooses the same tokens with the same random numbers: after
        `TopKLogitsWarper`, the scores are the same.
        """
        processors = list(self._processor)
        while processors and type(processors[0]) is TemperatureLogitsWarper:
            if not _LEAST_TEMPERATURE <= processors.pop(0).temperature <= 1 / _LEAST_TEMPERATURE:
                return 0
        first = processors[0] if processors else None
        if type(first) is TopKLogitsWarper:
            return first.top_k if first.filter_value == -math.inf else 0
        if first is not None or self._samples:
            return getattr(first, "best_logits_read", 0) if len(processors) == len(self._processor) else 0
        blind = (type(each) in _BLIND or not getattr(each, "reads_scores", True) for each in self._criteria)
        return 1 if len(self._processor) == 0 and all(blind) else 0

    def choose_token(self, logits: torch.Tensor) -> int:
        """Chooses and appends the next token from logits `[vocabulary]`."""
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
    """The generation of one text.

    cache: holds the prompt, or embeddings in its place. text: ends with the prompt. drafts: None: one token at a time.
    """

    def __init__(
        self,
        model: Model,
        cache: RemoteCache,
        text: GrowingText,
        drafts: Drafts | None = None,
        max_positions: int | None = None,
    ) -> None:
        self._model = model
        self._layer = cache.remote
        self._cache = cache
        self._text = text
        self._drafts = drafts
        # Columns of the cache before the first token: embeddings at the beginning of the prompt.
        self._offset = cache.remote.columns - len(text.tokens)
        limits = (text.most, None if max_positions is None else max_positions - self._offset + 1)
        self._most = min((limit for limit in limits if limit is not None), default=None)
        self._under_way: deque[_SentTokens] = deque()
        self._drafted: deque[Drafted] = deque()  # tokens that were sent after the text
        self._imagined: Guess | None = None  # a guess that was not sent, to measure the acceptance rate
        self._unseen = 0  # tokens since the latest draft, if none of its tokens was sent
        self._looked = False  # a draft was made in this turn
        self._begins = True  # no draft was made yet
        self._predictions: Callable[[int], Prediction] | None = None
        self._predicted_at = self._chosen_at = 0.0  # seconds
        self._chosen: dict[int, Window] = {}  # by the kind of the first guess

    def run(self, prompt: Outputs) -> torch.Tensor:
        """Generates until the text is finished. prompt: outputs of the last positions of the prompt.

        Returns `[1, seq]`, the prompt and all new tokens. Raises SplitnetError: as a call of the model.
        """
        with self._drafts.stats.text() if self._drafts is not None else nullcontext():
            if self._drafts is not None:
                self._drafts.drafter.begin_text(self._text.tokens, prompt.features[:-1])
            self._take_outputs(prompt.logits[-1], prompt.features[-1])
            try:
                while not self._text.finished:
                    self._run_turn()
            finally:
                self._forget_drafts()
        if self._text.streamer is not None:
            self._text.streamer.end()
        return self._text.ids()

    def _run_turn(self) -> None:
        """Sends the next tokens and drafts, and handles the first outputs."""
        window, guesses = self._plan()
        if not self._under_way:
            self._send_drafts(guesses, whole=window.in_flight == 1)
            guesses = []
        while len(self._under_way) < window.in_flight:
            guesses = guesses or [*itertools.islice(self._guesses(), window.length)]
            if not guesses:
                break
            self._send_drafts(guesses)
            guesses = []
        sent = self._under_way.popleft()
        began, waited_ms = time.perf_counter(), self._layer.waited_ms
        if sent.exchange is None:
            outputs = self._model.step(sent.ids, self._cache)
        else:
            outputs = self._model.receive_outputs(sent.exchange, sent.ids, self._cache)
        before = len(self._text.tokens)
        for logits, features in zip(*outputs, strict=True):
            token = self._take_outputs(logits, features)
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
        """The best window and its guesses. If none should be sent, keeps one guess to measure the acceptance rate."""
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
        """Guesses after the text and the drafts under way; fewer near the end, because the model adds a token."""
        if self._drafts is None:
            return
        bound = None if self._layer.bound is None else self._layer.bound - self._offset
        most = min((limit for limit in (self._most, bound) if limit is not None), default=None)
        room = None if most is None else max(0, most - len(self._text.tokens) - 1 - len(self._drafted))
        guesses = self._drafts.drafter.draft_tokens([drafted.token for drafted in self._drafted])
        timed = self._drafts.stats.timed(guesses, catches_up=self._begins)
        self._begins = False
        yield from itertools.islice(timed, room)

    def _send_drafts(self, guesses: Sequence[Guess], *, whole: bool = False) -> None:
        """Sends drafts after the drafts under way, or after the last token of the text."""
        alone = not self._under_way
        ids = self._text.ids(len(self._text.tokens) - alone)
        before = self._drafted[-1].kind if self._drafted else None
        for place, guess in enumerate(guesses):
            self._drafted.append(Drafted(*guess, place, before))
            before = guess.kind
        if guesses:
            ids = torch.cat((ids, ids.new_tensor([[guess.token for guess in guesses]])), dim=1)
        began = time.perf_counter()
        exchange = None if whole else self._model.send_tokens(ids, self._cache)
        sending_ms = (time.perf_counter() - began) * 1000
        if guesses and self._drafts is not None:
            self._drafts.stats.sent(len(guesses))
        self._under_way.append(_SentTokens(exchange, ids, began, sending_ms, alone))

    def _take_outputs(self, logits: torch.Tensor, features: torch.Tensor) -> int:
        token = self._text.choose_token(logits)
        if self._drafts is not None:
            self._drafts.drafter.observe_token(token, features)
            if self._imagined is not None:
                self._drafts.stats.compared(self._imagined.kind, self._imagined.token == token)
                self._imagined = None
        return token

    def _goes_on_with(self, token: int) -> bool:
        """Whether the first draft under way equals this token, which was appended to the text."""
        if not self._drafted or self._drafts is None:
            return False
        sent = self._drafted.popleft()
        self._drafts.stats.verified(sent, sent.token == token)
        return sent.token == token

    def _forget_drafts(self) -> None:
        """Abandons all drafts under way, and crops the cache to the text."""
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
    """Finds whether `Decoding` can replace transformers' loop for a family.

    transformers calls methods of a family's class before each call of the model (`prepare_inputs_for_generation`) and
    after each call. Most classes inherit these methods. For other classes, a trial finds the lengths of a text at which
    they do more than pass the last token, the cache and the mask. family: the transformers class of the model.
    """

    def __init__(self, model: Any, family: Any) -> None:
        self._model = model
        self._family = family

    def differs(self, prompt: int, most: int | None) -> list[str]:
        """Deviations of the family while a text grows from `prompt` to `most` tokens; empty: none."""
        own = getattr(self._model, _PREPARES)
        if getattr(own, "__func__", None) is not getattr(type(self._model), _PREPARES):
            return [f"{_PREPARES} of the caller's"]
        for name in _OTHERS:
            if name in vars(self._model) or getattr(self._family, name) is not getattr(GenerationMixin, name):
                return [f"{name} of the family"]
        last = LONGEST if most is None else most
        lengths = [length for length in self._lengths if prompt < length <= last]
        return [f"a text of {lengths[0]} tokens, where the family's own loop differs,"] if lengths else []

    @cached_property
    def _lengths(self) -> list[int]:
        """Lengths of a text at whose last token the family deviates from transformers' loop."""
        if getattr(self._family, _PREPARES) is getattr(GenerationMixin, _PREPARES):
            return []
        return [length for length in sorted(set(self._likely())) if not self._hands_over(length)]

    def _likely(self) -> Iterator[int]:
        """Lengths to try: short ones, and those around every number of the config."""
        config = self._model.config.get_text_config()
        most = min(max_positions(config) or LONGEST, LONGEST)
        values = list(vars(config).values())
        values += [inner for value in values if isinstance(value, dict) for inner in value.values()]
        numbers = [1, *(value for value in values if isinstance(value, int))]
        yield from (length for number in numbers for length in range(number, number + 3) if 1 < length <= most)

    @torch.no_grad()
    def _hands_over(self, length: int) -> bool:
        """Whether the family passes only the last token, after the cached tokens."""
        cache = self._model.new_cache()
        cache.remote.columns = length - 1
        ids = torch.zeros(1, length, dtype=torch.long, device=self._model.device)
        mask, positions = torch.ones_like(ids), torch.arange(length, device=ids.device)[None]
        given = {"cache": cache, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        try:
            found = getattr(self._family, _PREPARES)(self._model, ids, next_sequence_length=1, **given)
        except Exception:  # a family's code may raise any exception
            return False
        same = found.keys() <= _HANDED_OVER and found.get("cache") is cache and found["input_ids"].equal(ids[:, -1:])
        seen, place = found.get("attention_mask"), found.get("position_ids")
        return same and (seen is None or seen.equal(mask)) and (place is None or place.equal(positions[:, -1:]))
