"""Runs requests on the model, each in a thread. No other file of the server calls the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from splitnet.checkpoint.rope_lengths import RopeLengths
from splitnet.errors import ContextTooLong, PeerBusy, SessionClosed
from splitnet.hf.cache import RemoteCache, RemoteLayer
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.quant.device import end_threads
from splitnet.serve.answers.grammars import AllowedTokens, Grammar
from splitnet.serve.answers.sampling import Sampling, ScoredToken, TokenChooser, score_tokens
from splitnet.serve.answers.text import Detokenizer, StopStrings
from splitnet.serve.progress import AnswerProgress, ProgressLog, routes_of
from splitnet.serve.session_cache import KeepLimits, SessionCache

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class TextDelta:
    """The new part of one answer."""

    choice: int  # which answer of the request
    text: str  # may be empty while a character or a stop string is not complete
    scored: tuple[ScoredToken, ...]  # the new tokens, if they are scored, including an end token that is not text
    finish: Finish | None  # why the answer ends here; None: the answer continues
    begins: int = 0  # number of characters of the answer before the new tokens
    stopped: str | None = None  # the stop string that ended the answer
    tokens: tuple[int, ...] = ()  # new token ids


@dataclass(eq=False)
class TokenCollector:
    """Takes and counts the tokens of one answer, and makes text from them."""

    index: int  # which answer of the request
    decode: Callable[[list[int]], str]
    max_tokens: int  # maximum number of tokens of the answer
    end_tokens: Collection[int]  # tokens that end the answer and are not part of the answer's text
    stop_strings: Sequence[str]  # strings before which the answer ends
    prompt: Sequence[int] = ()  # tokens whose text the answer continues; empty: the answer is a separate text
    unstopped_parts: tuple[Sequence[str], str] = ((), "")  # see `StopStrings`

    def __post_init__(self) -> None:
        self.tokens = 0
        self.finished = False
        self._characters = 0
        self._detokenizer = Detokenizer(self.decode, self.prompt)
        self._stops = StopStrings(self.stop_strings, self.unstopped_parts)

    def push_token(self, token: int, scored: ScoredToken | None) -> TextDelta:
        self.tokens += 1
        begins = self._characters
        text, finish = self._text_of(token)
        self.finished = finish is not None
        score = () if scored is None else (scored,)
        return TextDelta(self.index, text, score, finish, begins, self._stops.found, (token,))

    def _text_of(self, token: int) -> tuple[str, Finish | None]:
        if token in self.end_tokens:
            text, stopped = self._stops.push_text(self._detokenizer.flush())
            return text + ("" if stopped else self._stops.flush()), "stop"
        new = self._detokenizer.push_token(token)
        self._characters += len(new)
        text, stopped = self._stops.push_text(new)
        if stopped:
            return text, "stop"
        if self.tokens < self.max_tokens:
            return text, None
        last, stopped = self._stops.push_text(self._detokenizer.flush())
        if stopped:
            return text + last, "stop"
        return text + last + self._stops.flush(), "length"


RESERVED_ANSWER = 512
"""Positions that peers reserve at the start for an answer of unknown length; a reservation grows by this number."""

LEAST_ANSWER = 64
"""Positions that are reserved if peers lack memory for `RESERVED_ANSWER`. A reservation grows when half of this number
is left."""

SCORED_LOGITS = 2**24  # Maximum number of logits that one step computes while a prompt is scored; bounds memory


READ_POSITIONS = 2**13  # Maximum positions, padding included, of several texts that are read in one batch


@dataclass(frozen=True)
class ReadTask:
    """A request for the hidden states of texts, without an answer; the prompt is all texts, one after the other.

    keep: how many last positions of a text are wanted; 0: all. take: called with the numbers of some texts, and for
    each of these texts the states `[positions, hidden]` after the final norm.
    """

    lengths: Sequence[int]
    keep: int
    take: Callable[[Sequence[int], Sequence[torch.Tensor]], object]


@dataclass(frozen=True)
class GenerationRequest:
    """A request to the model: one prompt, and how to answer it."""

    prompt: list[int]  # token ids, at least one
    max_tokens: int  # maximum number of tokens of each answer; 0: no answer, the prompt is only scored or read
    sampling: Sampling
    choices: int = 1  # how many answers
    stop_strings: Sequence[str] = ()
    unstopped_parts: tuple[Sequence[str], str] = ((), "")  # see `StopStrings`
    top_logprobs: int | None = None  # how many of the likeliest tokens to score beside each token; None: score nothing
    score_prompt: bool = False  # also score the tokens of the prompt
    grammar: Grammar | None = None  # what the answers must match
    stop_tokens: Collection[int] = ()  # tokens that end an answer, besides the model's end tokens
    ignores_ends: bool = False  # the model's end tokens do not end an answer
    # The answers continue the text of the prompt, as completions do; a message of a chat is a separate text.
    continues_prompt: bool = False
    owner: str = ""  # the client whose kept sessions may be used
    # Peers reserve memory for `max_tokens` at the start. If False, they reserve memory for fewer tokens, and an answer
    # ends when memory runs out.
    reserve_max_tokens: bool = True
    reading: ReadTask | None = None  # with `max_tokens` 0: the prompt is read, not scored
    # The first tokens of the answer, from an earlier attempt; not with several answers, images, scores or readings.
    given: Sequence[int] = ()
    # Arguments of the model for the images of the prompt; then, there is one answer, and the prompt is not scored.
    pixels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """The tokens to compute before the next token of the answer is chosen."""
        return [*self.prompt, *self.given]

    @property
    def can_continue(self) -> bool:
        """Whether `given` can be set."""
        is_plain = self.choices == 1 and self.top_logprobs is None and not self.score_prompt
        return is_plain and self.max_tokens > 0 and not self.pixels


@dataclass(frozen=True)
class ScoredPrompt:
    """The tokens of a prompt with their scores."""

    scored: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class Ended:
    """The event that a prompt is answered, with numbers of tokens."""

    prompt_tokens: int
    cached_tokens: int  # tokens of the prompt whose keys and values the peers already held
    answer_tokens: int  # tokens of all answers together
    prompt: Sequence[int] = ()  # token ids


Event = ScoredPrompt | TextDelta | Ended | BaseException
Numbered = tuple[int, ScoredPrompt | TextDelta | Ended]  # the number of a prompt in its request, and an event
Listener = Callable[[Event], object]


@dataclass(eq=False)
class Generations:
    """Runs requests on a model with remote blocks, at most `at_a_time` at once."""

    model: RemoteCausalLM  # its generation config keeps only the end tokens
    decode: Callable[[list[int]], str]
    at_a_time: int
    limits: KeepLimits
    speculate: Any = None  # where drafts come from, see `RemoteCausalLM.generate`

    def __post_init__(self) -> None:
        # Takes a cache; returns a function that records the new measurements of the cache's session at each call.
        self.watch_session: Callable[[RemoteCache], Callable[[], None]] = lambda cache: lambda: None
        self.vocabulary: int = self.model.config.get_text_config().vocab_size
        self.ropes_vary: bool = RopeLengths(self.model.config.get_text_config()).frequencies_vary
        self.progress = ProgressLog()
        self.kept: SessionCache[RemoteCache] = SessionCache(self.limits, RemoteCache.close)
        ends = self.model.generation_config.eos_token_id
        self.end_tokens: set[int] = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        # The request alone determines how tokens are chosen; transformers would silently add the checkpoint's options.
        self.model.generation_config = GenerationConfig(eos_token_id=ends)
        self._threads = ThreadPoolExecutor(self.at_a_time, thread_name_prefix="splitnet-serve")
        self._running: set[Generation] = set()
        self._ending = False
        self.draining = False  # the server is ending: streams that have no end of their own must end now

    def start(self, ask: GenerationRequest, listener: Listener, answer: str = "") -> Generation:
        """Begins to answer a prompt. `listener` is called from another thread, finally with `Ended` or an error.

        answer: the id of the request's answer. Raises SessionClosed after `close`.
        """
        progress = self.progress.begin_answer(answer, len(ask.prompt))
        generation = Generation(self, ask, listener, progress)
        try:
            running = self._threads.submit(generation.run)
        except RuntimeError:
            self.progress.end_answer(progress)
            raise SessionClosed("the model is closed") from None
        self._running.add(generation)
        running.add_done_callback(lambda _: self._running.discard(generation))
        if self._ending:
            generation.cancel()
        return generation

    def end_requests(self) -> None:
        """Ends all running and all later requests with an error; returns at once."""
        self._ending = True
        for generation in list(self._running):
            generation.cancel()

    def close(self) -> None:
        """Ends all requests and closes the kept sessions; returns when the threads have ended."""
        self.end_requests()
        self._threads.shutdown()
        self.kept.clear()


class Generation:
    """One running request, with its progress."""

    def __init__(
        self, generations: Generations, ask: GenerationRequest, listener: Listener, progress: AnswerProgress
    ) -> None:
        self._own = generations
        self._ask = ask
        self._listener = listener
        self.progress = progress
        self._lock = threading.Lock()
        self._cache: RemoteCache | None = None
        self._cancelled = False
        self._begun = False

    def cancel(self) -> None:
        """Ends the request and closes its session on the peers, even during a step; callable from any thread."""
        with self._lock:
            self._cancelled = True
            if self._cache is not None:
                self._cache.close()

    def run(self) -> None:
        kept = self._own.kept
        try:
            if self._ask.reading is not None:
                self._listener(self._read_texts(self._ask.reading))
                return
            # Equal tokens do not mean equal images, so a prompt with images gets a new session, which is not kept.
            needs_all = self._ask.score_prompt or not self._ask.max_tokens or bool(self._ask.pixels)
            taken = None if needs_all else kept.take_session(self._ask.owner, self._ask.tokens)
            if taken is not None and taken[0].remote.lied:
                taken[0].close()
                taken = None
            rooms = [self._ask.max_tokens]
            if not self._ask.reserve_max_tokens:
                rooms = sorted({min(most, self._ask.max_tokens) for most in (RESERVED_ANSWER, LEAST_ANSWER)})[::-1]
            attempts = [(taken, rooms[0]), *((None, room) for room in rooms)]
            while True:
                session, room = attempts.pop(0)
                try:
                    ended = self._run_in(session, room)
                    break
                except PeerBusy as error:
                    # Kept sessions may occupy the missing memory. Or the kept session that this request uses is bound
                    # to a route without free memory.
                    freed = not isinstance(error, ContextTooLong) and kept.clear()
                    if not freed and session is None and attempts and attempts[0] == (None, room):
                        attempts.pop(0)
                    if self._begun or not attempts:
                        raise
            self._listener(ended)
        except BaseException as error:
            self._listener(error)
        finally:
            self._own.progress.end_answer(self.progress)
            end_threads()  # another thread may run the next request

    def _run_in(self, taken: tuple[RemoteCache, int] | None, room: int) -> Ended:
        """Runs the request in a kept session or in a new session.

        taken: the kept session, and how many first tokens it has in common with the prompt; None: use a new session.
        room: tokens of each answer for which the peers reserve memory at the start.
        """
        ask = self._ask
        cache, shared = taken or (self._own.model.new_cache(ask.owner), 0)
        held: list[int] | None = None
        look = self._use_cache(cache)
        try:
            prompt = torch.tensor([ask.tokens])
            length, most = prompt.shape[1], len(ask.prompt) + ask.max_tokens
            # At least the last token must be computed: its logits choose the first token of the answer.
            cached = min(shared, length - 1, self._own.model.fitting(cache, length))
            self.progress.cached = cached
            cache.remote.crop(cached - cache.remote.columns)
            cache.remote.reserve(min(length + room, most), ask.choices, bounded=length + room < most)
            if ask.score_prompt:
                self._score(prompt, cache)
            answer_tokens = 0
            if ask.max_tokens:
                answer_tokens, tokens = self._generate_answer(prompt, cache, look)
                cached = cached or (cache.session.reused if cache.session is not None else 0)
                if ask.choices == 1 and not ask.pixels:
                    held = tokens[: cache.remote.columns]
            else:
                self._begun = True
                for choice in range(ask.choices):
                    self._listener(TextDelta(choice, "", (), "length"))
            return Ended(len(ask.prompt), cached, answer_tokens, ask.prompt)
        finally:
            look()
            self._release_cache(cache, held)

    def _use_cache(self, cache: RemoteCache) -> Callable[[], None]:
        """Begins to use a cache, until `_release_cache`; returns a function that records its session's new
        measurements."""
        before = _passed_positions(cache)
        self.progress.follow(
            lambda: routes_of(self._own.model.swarm, cache.session), lambda: _passed_positions(cache) - before
        )
        with self._lock:
            self._cache = cache
            if self._cancelled:
                cache.close()
        return self._own.watch_session(cache)

    @torch.no_grad()
    def _read_texts(self, reading: ReadTask) -> Ended:
        """Reads texts of similar lengths in batches; halves a batch if the peers lack memory for the whole batch."""
        texts = torch.tensor(self._ask.prompt).split(list(reading.lengths))
        # A batch uses the rotary frequencies of its longest text. If these depend on length, texts are read alone.
        groups = group_by_length(reading.lengths, 0 if self._own.ropes_vary else READ_POSITIONS)
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
        """States `[positions, hidden]` of each text after the final norm, computed in a new session.

        keep: how many last positions; 0: all.
        """
        model = self._own.model
        ids = pad_sequence(texts, batch_first=True, padding_side="left").to(model.device)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True, padding_side="left")
        cache = model.new_cache()
        cache.remote.reserve_step = 1
        look = self._use_cache(cache)
        try:
            states = model.states_for_head(ids, mask.to(model.device), cache, keep)
            return [row[-(keep or len(text)) :] for row, text in zip(states, texts, strict=True)]
        finally:
            look()
            self._release_cache(cache, None)

    @torch.no_grad()
    def _score(self, prompt: torch.Tensor, cache: RemoteCache) -> None:
        """Passes the scores of the prompt's tokens to the listener; the first token has no score."""
        length, top = prompt.shape[1], self._ask.top_logprobs or 0
        scored = [ScoredToken(self._ask.prompt[0], None, ())]
        step = max(1, SCORED_LOGITS // self._own.vocabulary)
        for start in range(0, length, step):
            logits = self._run_forward(prompt[:, start : start + step], cache).logits[0]
            following = prompt[0, start + 1 : start + 1 + len(logits)]
            scored += score_tokens(logits[: len(following)], following, top)
        cache.remote.crop(-1)  # for the answer, which begins with the logits of the last token
        self._listener(ScoredPrompt(tuple(scored)))

    def _generate_answer(
        self, prompt: torch.Tensor, cache: RemoteCache, look: Callable[[], None]
    ) -> tuple[int, list[int]]:
        ask, own = self._ask, self._own
        if ask.choices > 1:
            if prompt.shape[1] - 1 > cache.remote.columns:
                with torch.no_grad():
                    self._run_forward(prompt[:, cache.remote.columns : -1], cache, logits_to_keep=1)
            cache.remote.batch_repeat_interleave(ask.choices)
            prompt = prompt.expand(ask.choices, -1)
        allowed = [AllowedTokens(ask.grammar) for _ in range(ask.choices)] if ask.grammar is not None else []
        ends = {*ask.stop_tokens, *(() if ask.ignores_ends else own.end_tokens)}
        chooser = TokenChooser(ask.sampling, ask.top_logprobs, len(ask.prompt), allowed, ends)
        before = ask.prompt if ask.continues_prompt else ()
        choices = [
            TokenCollector(index, own.decode, ask.max_tokens, ends, ask.stop_strings, before, ask.unstopped_parts)
            for index in range(ask.choices)
        ]
        seen = prompt.shape[1]
        for token in ask.given:
            own.progress.token(self.progress)
            self._begun = True
            self._listener(choices[0].push_token(token, None))
            if choices[0].finished:
                return choices[0].tokens, ask.tokens

        def stepped(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """Passes the text of newly chosen tokens to the listener; returns which answers have ended, `[batch]`."""
            nonlocal seen
            if self._cancelled:
                raise SessionClosed("the request was cancelled")
            look()
            for position in range(seen, input_ids.shape[1]):
                for row, choice in enumerate(choices):
                    if not choice.finished:
                        own.progress.token(self.progress)
                        self._begun = True
                        scored = chooser.scored.pop((row, position), None)
                        self._listener(choice.push_token(int(input_ids[row, position]), scored))
            seen = input_ids.shape[1]
            self._grow_reservation(cache.remote, choices)
            return torch.tensor([choice.finished for choice in choices], device=input_ids.device)

        drafts = ask.choices == 1 and own.model.can_draft(seen, ask.max_tokens)
        output = own.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            cache=cache,
            speculate=own.speculate if drafts else None,
            max_new_tokens=ask.max_tokens - len(ask.given),
            do_sample=False,
            logits_processor=[chooser],
            stopping_criteria=[stepped],
            # `TokenCollector` ends answers.
            eos_token_id=None,
            pad_token_id=0,
            **ask.pixels,
        )
        return sum(choice.tokens for choice in choices), output[0].tolist()

    def _grow_reservation(self, layer: RemoteLayer, choices: Sequence[TokenCollector]) -> None:
        """Reserves more memory before the reserved positions run out; if peers have no memory, shortens the answers."""
        tokens, prompt = max(choice.tokens for choice in choices), len(self._ask.prompt)
        most = max(choice.max_tokens for choice in choices)
        if layer.bound is None or layer.bound >= prompt + most or prompt + tokens + LEAST_ANSWER // 2 < layer.bound:
            return
        if not layer.grow(min(layer.bound + RESERVED_ANSWER, prompt + most)):
            for choice in choices:
                choice.max_tokens = layer.bound - prompt

    def _run_forward(self, ids: torch.Tensor, cache: RemoteCache, **options: Any) -> Any:
        mask = torch.ones(1, cache.remote.columns + ids.shape[1], dtype=torch.long)
        with self._own.model.pieces_of(len(self._ask.prompt)):
            return self._own.model(input_ids=ids, attention_mask=mask, cache=cache, use_cache=True, **options)

    def _release_cache(self, cache: RemoteCache, held: list[int] | None) -> None:
        """Keeps the session of a cache for the next turn of a chat if its tokens `held` are known, else closes it."""
        self.progress.follow(None)
        with self._lock:
            self._cache = None
            keeps = not self._cancelled
        if held and keeps:
            self._own.kept.keep_session(self._ask.owner, held, cache.remote.reserved, cache)
        else:
            cache.close()


def _passed_positions(cache: RemoteCache) -> int:
    return cache.session.passed + cache.session.prefix_hit if cache.session is not None else 0


def group_by_length(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Groups texts of similar lengths; returns numbers of texts, the longest of each group first.

    A group of several texts, padded to its longest, has at most `most` positions.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > most:
            groups.append([])
        groups[-1].append(number)
    return groups
