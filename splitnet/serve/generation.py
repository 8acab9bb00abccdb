"""Running requests on the model: the only file here that calls it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from splitnet.checkpoint.families import RopeLengths
from splitnet.errors import ContextTooLong, PeerBusy, SessionClosed
from splitnet.hf.cache import RemoteCache, RemoteLayer
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.quant.device import end_threads
from splitnet.serve.answers.grammars import AllowedTokens, Grammar
from splitnet.serve.answers.sampling import Sampling, ScoredToken, TokenChooser, score_tokens
from splitnet.serve.answers.text import Detokenizer, StopStrings
from splitnet.serve.progress import Progress, ProgressLog, routes_of
from splitnet.serve.session_cache import KeepLimits, SessionCache

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What is new of one answer."""

    choice: int  # which answer of the request
    text: str  # may be empty while a character or a stop string is not complete
    scored: tuple[ScoredToken, ...]  # the new tokens, if they are scored; also one that ends the answer and is no text
    finish: Finish | None  # why the answer ends here; None: it goes on
    begins: int = 0  # characters of the answer before those tokens
    stopped: str | None = None  # the stop string that ended it
    tokens: tuple[int, ...] = ()  # the new ones


@dataclass(eq=False)
class Choice:
    """Takes the tokens of one answer, and counts them."""

    index: int  # which answer of the request
    decode: Callable[[list[int]], str]
    max_tokens: int  # after which it ends
    end_tokens: Collection[int]  # with which it ends; they are not text
    stop_strings: Sequence[str]  # before which it ends
    prompt: Sequence[int] = ()  # the tokens whose text it goes on from; empty: it stands alone
    stops_apart: tuple[Sequence[str], str] = ((), "")  # see `StopStrings`

    def __post_init__(self) -> None:
        self.tokens = 0
        self.finished = False
        self._characters = 0
        self._detokenizer = Detokenizer(self.decode, self.prompt)
        self._stops = StopStrings(self.stop_strings, self.stops_apart)

    def push(self, token: int, scored: ScoredToken | None) -> Piece:
        self.tokens += 1
        begins = self._characters
        text, finish = self._text_of(token)
        self.finished = finish is not None
        score = () if scored is None else (scored,)
        return Piece(self.index, text, score, finish, begins, self._stops.found, (token,))

    def _text_of(self, token: int) -> tuple[str, Finish | None]:
        if token in self.end_tokens:
            text, stopped = self._stops.push(self._detokenizer.rest())
            return text + ("" if stopped else self._stops.rest()), "stop"
        new = self._detokenizer.push(token)
        self._characters += len(new)
        text, stopped = self._stops.push(new)
        if stopped:
            return text, "stop"
        if self.tokens < self.max_tokens:
            return text, None
        last, stopped = self._stops.push(self._detokenizer.rest())
        if stopped:
            return text + last, "stop"
        return text + last + self._stops.rest(), "length"


RESERVED_ANSWER = 512
"""Positions of an answer of no certain length that peers keep free from its start; it asks for as many on its way."""

LEAST_ANSWER = 64
"""And so many where they have no more; before that many are left, more are asked for."""

SCORED_LOGITS = 2**24  # How many logits are looked at in one step when a prompt is scored


READ_POSITIONS = 2**13  # Of texts that are read together at most, padding included, if there are several


@dataclass(frozen=True)
class Reading:
    """What is wanted of texts that are read and not answered; the prompt is all of them, one after the other.

    keep: how many last positions of a text are looked at; 0: all. take: is given the numbers of some texts, and of each
    `[positions, hidden]` behind the final norm.
    """

    lengths: Sequence[int]
    keep: int
    take: Callable[[Sequence[int], Sequence[torch.Tensor]], object]


@dataclass(frozen=True)
class Ask:
    """What is wanted of the model."""

    prompt: list[int]  # token ids, at least one
    max_tokens: int  # of each answer; 0: only the prompt is scored
    sampling: Sampling
    choices: int = 1  # how many answers
    stop_strings: Sequence[str] = ()
    stops_apart: tuple[Sequence[str], str] = ((), "")  # see `StopStrings`
    top_logprobs: int | None = None  # how many of the likeliest tokens to score beside each token; None: score nothing
    score_prompt: bool = False  # also the tokens of the prompt
    grammar: Grammar | None = None  # what the answers must keep to
    stop_tokens: Collection[int] = ()  # with which an answer ends, besides those of the model
    ignores_ends: bool = False  # those of the model end nothing
    # the answers go on from the text of the prompt, as completions do; a message of a chat stands alone
    goes_on: bool = False
    owner: str = ""  # whose kept sessions may be used
    # there is memory for `max_tokens` from the start; otherwise for some, and an answer ends where there is no more
    reserves_all: bool = True
    reading: Reading | None = None  # with 0 `max_tokens`: the prompt is read, and not scored


@dataclass(frozen=True)
class ScoredPrompt:
    """The tokens of a prompt with their scores."""

    scored: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class Ended:
    """A prompt is answered: of its tokens the peers held `cached_tokens`, and all answers have `answer_tokens`."""

    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    prompt: Sequence[int] = ()  # its tokens


Event = ScoredPrompt | Piece | Ended | BaseException
Numbered = tuple[int, ScoredPrompt | Piece | Ended]  # an event, and the number of the prompt that it belongs to
Listener = Callable[[Event], object]


@dataclass(eq=False)
class Generations:
    """Runs requests on a model with remote blocks, `at_a_time`."""

    model: RemoteCausalLM  # of its generation config only the tokens that end an answer are left
    decode: Callable[[list[int]], str]
    at_a_time: int
    limits: KeepLimits
    speculate: Any = None  # where drafts come from, see `RemoteCausalLM.generate`

    def __post_init__(self) -> None:
        # For a cache, what notes the news of its session at each call.
        self.watch_session: Callable[[RemoteCache], Callable[[], None]] = lambda cache: lambda: None
        self.vocabulary: int = self.model.config.get_text_config().vocab_size
        self.progress = ProgressLog()
        self.kept: SessionCache[RemoteCache] = SessionCache(self.limits, RemoteCache.close)
        ends = self.model.generation_config.eos_token_id
        self.end_tokens: set[int] = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        # A request says how tokens are chosen; transformers would add what the checkpoint says, in silence.
        self.model.generation_config = GenerationConfig(eos_token_id=ends)
        self._threads = ThreadPoolExecutor(self.at_a_time, thread_name_prefix="splitnet-serve")
        self._running: set[Generation] = set()
        self._ending = False
        self.draining = False  # the server is to end once the requests have: what would go on for ever ends now

    def start(self, ask: Ask, listener: Listener, answer: str = "") -> Generation:
        """Begins a part of an answer; `listener` is called from another thread, at last with `Ended` or an error.

        Raises SessionClosed after `close`.
        """
        progress = self.progress.begin(answer, len(ask.prompt))
        generation = Generation(self, ask, listener, progress)
        try:
            running = self._threads.submit(generation.run)
        except RuntimeError:
            self.progress.end(progress)
            raise SessionClosed("the model is closed") from None
        self._running.add(generation)
        running.add_done_callback(lambda _: self._running.discard(generation))
        if self._ending:
            generation.cancel()
        return generation

    def end(self) -> None:
        """Ends all requests, those that come later too, with an error; returns at once."""
        self._ending = True
        for generation in list(self._running):
            generation.cancel()

    def close(self) -> None:
        """Ends all requests and frees what is kept; returns when the threads have ended."""
        self.end()
        self._threads.shutdown()
        self.kept.clear()


class Generation:
    """One request that runs."""

    def __init__(self, generations: Generations, ask: Ask, listener: Listener, progress: Progress) -> None:
        self._own = generations
        self._ask = ask
        self._listener = listener
        self._progress = progress
        self._lock = threading.Lock()
        self._cache: RemoteCache | None = None
        self._cancelled = False
        self._begun = False

    def cancel(self) -> None:
        """Ends it and frees its session on the peers, in the middle of a step if need be; from any thread."""
        with self._lock:
            self._cancelled = True
            if self._cache is not None:
                self._cache.close()

    def run(self) -> None:
        kept = self._own.kept
        try:
            if self._ask.reading is not None:
                self._listener(self._read(self._ask.reading))
                return
            needs_all = self._ask.score_prompt or not self._ask.max_tokens
            taken = None if needs_all else kept.take(self._ask.owner, self._ask.prompt)
            rooms = [self._ask.max_tokens]
            if not self._ask.reserves_all:
                rooms = sorted({min(most, self._ask.max_tokens) for most in (RESERVED_ANSWER, LEAST_ANSWER)})[::-1]
            attempts = [(taken, rooms[0]), *((None, room) for room in rooms)]
            while True:
                session, room = attempts.pop(0)
                try:
                    ended = self._run_in(session, room)
                    break
                except PeerBusy as error:
                    # What is kept for others takes the memory that is needed now, or what was kept for this one is
                    # bound to a route that has none.
                    freed = not isinstance(error, ContextTooLong) and kept.clear()
                    if not freed and session is None and attempts and attempts[0] == (None, room):
                        attempts.pop(0)
                    if self._begun or not attempts:
                        raise
            self._listener(ended)
        except BaseException as error:
            self._listener(error)
        finally:
            self._own.progress.end(self._progress)
            end_threads()  # the next request may be another thread's

    def _run_in(self, taken: tuple[RemoteCache, int] | None, room: int) -> Ended:
        """Runs in a session that was kept, with the tokens that it shares with the prompt, or in a new one.

        room: tokens of each answer that the peers have memory for from the start.
        """
        ask = self._ask
        cache, shared = taken or (self._own.model.new_cache(ask.owner), 0)
        held: list[int] | None = None
        look = self._take(cache)
        try:
            prompt = torch.tensor([ask.prompt])
            # The model must see one token at least, to tell what comes after it.
            cached = min(shared, len(ask.prompt) - 1, self._own.model.fitting(cache, len(ask.prompt)))
            self._progress.cached = cached
            cache.remote.crop(cached - cache.remote.columns)
            cache.remote.reserve(len(ask.prompt) + room, ask.choices, bounded=room < ask.max_tokens)
            if ask.score_prompt:
                self._score(prompt, cache)
            answer_tokens = 0
            if ask.max_tokens:
                answer_tokens, tokens = self._answer(prompt, cache, look)
                cached = cached or (cache.session.reused if cache.session is not None else 0)
                if ask.choices == 1:
                    held = tokens[: cache.remote.columns]
            else:
                self._begun = True
                for choice in range(ask.choices):
                    self._listener(Piece(choice, "", (), "length"))
            return Ended(len(ask.prompt), cached, answer_tokens, ask.prompt)
        finally:
            look()
            self._let_go(cache, held)

    def _take(self, cache: RemoteCache) -> Callable[[], None]:
        """Uses a cache until `_let_go`; what it returns notes the news of its session."""
        before = _passed(cache)
        self._progress.follow(lambda: routes_of(self._own.model.swarm, cache.session), lambda: _passed(cache) - before)
        with self._lock:
            self._cache = cache
            if self._cancelled:
                cache.close()
        return self._own.watch_session(cache)

    @torch.no_grad()
    def _read(self, reading: Reading) -> Ended:
        """Reads texts of similar lengths together, fewer where the peers have no room for so many."""
        texts = torch.tensor(self._ask.prompt).split(list(reading.lengths))
        # All rows of a step have the rotary frequencies of the longest.
        alone = RopeLengths(self._own.model.config.get_text_config()).matter
        groups = similar(reading.lengths, 0 if alone else READ_POSITIONS)
        while groups:
            group = groups.pop()
            try:
                reading.take(group, self._states([texts[number] for number in group], reading.keep))
            except PeerBusy:
                half = len(group) if self._own.kept.clear() else len(group) // 2
                if not half:
                    raise
                groups += filter(None, [group[half:], group[:half]])
        return Ended(len(self._ask.prompt), 0, 0)

    def _states(self, texts: list[torch.Tensor], keep: int) -> list[torch.Tensor]:
        """Of each text `[positions, hidden]` behind the final norm, in a session of their own."""
        model = self._own.model
        ids = pad_sequence(texts, batch_first=True, padding_side="left").to(model.device)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True, padding_side="left")
        cache = model.new_cache()
        cache.remote.reserve_step = 1
        look = self._take(cache)
        try:
            states = model.states_for_head(ids, mask.to(model.device), cache, keep)
            return [row[-(keep or len(text)) :] for row, text in zip(states, texts, strict=True)]
        finally:
            look()
            self._let_go(cache, None)

    @torch.no_grad()
    def _score(self, prompt: torch.Tensor, cache: RemoteCache) -> None:
        """Tells the scores of the prompt's tokens, of which the first has none."""
        length, top = prompt.shape[1], self._ask.top_logprobs or 0
        scored = [ScoredToken(self._ask.prompt[0], None, ())]
        step = max(1, SCORED_LOGITS // self._own.vocabulary)
        for start in range(0, length, step):
            logits = self._forward(prompt[:, start : start + step], cache).logits[0]
            following = prompt[0, start + 1 : start + 1 + len(logits)]
            scored += score_tokens(logits[: len(following)], following, top)
        cache.remote.crop(-1)  # for the answer, which begins with the logits of the last token
        self._listener(ScoredPrompt(tuple(scored)))

    def _answer(self, prompt: torch.Tensor, cache: RemoteCache, look: Callable[[], None]) -> tuple[int, list[int]]:
        ask, own = self._ask, self._own
        if ask.choices > 1:
            if prompt.shape[1] - 1 > cache.remote.columns:
                with torch.no_grad():
                    self._forward(prompt[:, cache.remote.columns : -1], cache, logits_to_keep=1)
            cache.remote.batch_repeat_interleave(ask.choices)
            prompt = prompt.expand(ask.choices, -1)
        allowed = [AllowedTokens(ask.grammar) for _ in range(ask.choices)] if ask.grammar is not None else []
        ends = {*ask.stop_tokens, *(() if ask.ignores_ends else own.end_tokens)}
        chooser = TokenChooser(ask.sampling, ask.top_logprobs, prompt.shape[1], allowed, ends)
        before = ask.prompt if ask.goes_on else ()
        choices = [
            Choice(index, own.decode, ask.max_tokens, ends, ask.stop_strings, before, ask.stops_apart)
            for index in range(ask.choices)
        ]
        seen = prompt.shape[1]

        def stepped(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """Tells the text of the tokens that were chosen; returns which answers have ended."""
            nonlocal seen
            if self._cancelled:
                raise SessionClosed("the request was cancelled")
            look()
            for position in range(seen, input_ids.shape[1]):
                for row, choice in enumerate(choices):
                    if not choice.finished:
                        own.progress.token(self._progress)
                        self._begun = True
                        scored = chooser.scored.pop((row, position), None)
                        self._listener(choice.push(int(input_ids[row, position]), scored))
            seen = input_ids.shape[1]
            self._get_room(cache.remote, choices)
            return torch.tensor([choice.finished for choice in choices], device=input_ids.device)

        drafts = ask.choices == 1 and own.model.can_draft(prompt.shape[1], ask.max_tokens)
        output = own.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            cache=cache,
            speculate=own.speculate if drafts else None,
            max_new_tokens=ask.max_tokens,
            do_sample=False,
            logits_processor=[chooser],
            stopping_criteria=[stepped],
            # Which tokens end an answer is for `Choice` to know.
            eos_token_id=None,
            pad_token_id=0,
        )
        return sum(choice.tokens for choice in choices), output[0].tolist()

    def _get_room(self, layer: RemoteLayer, choices: Sequence[Choice]) -> None:
        """Before memory for the answers runs out asks for more; where there is none, they end with what they have."""
        tokens, prompt = max(choice.tokens for choice in choices), len(self._ask.prompt)
        most = max(choice.max_tokens for choice in choices)
        if layer.bound is None or layer.bound >= prompt + most or prompt + tokens + LEAST_ANSWER // 2 < layer.bound:
            return
        if not layer.grow(min(layer.bound + RESERVED_ANSWER, prompt + most)):
            for choice in choices:
                choice.max_tokens = layer.bound - prompt

    def _forward(self, ids: torch.Tensor, cache: RemoteCache, **options: Any) -> Any:
        mask = torch.ones(1, cache.remote.columns + ids.shape[1], dtype=torch.long)
        with self._own.model.pieces_of(len(self._ask.prompt)):
            return self._own.model(input_ids=ids, attention_mask=mask, cache=cache, use_cache=True, **options)

    def _let_go(self, cache: RemoteCache, held: list[int] | None) -> None:
        """Keeps a session for the next turn if it is known which tokens it holds, or closes it."""
        self._progress.follow(None)
        with self._lock:
            self._cache = None
            keeps = not self._cancelled
        if held and keeps:
            self._own.kept.keep(self._ask.owner, held, cache.remote.reserved, cache)
        else:
            cache.close()


def _passed(cache: RemoteCache) -> int:
    return cache.session.passed + cache.session.prefix_hit if cache.session is not None else 0


def similar(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of texts in groups of similar lengths, the longest of each first.

    With padding to the longest, a group of several has `most` positions at most.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > most:
            groups.append([])
        groups[-1].append(number)
    return groups
