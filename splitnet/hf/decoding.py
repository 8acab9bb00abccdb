"""The loop that generates one text, with drafts or without, in the place of transformers' own.

A drafted token is right if it is what the model chooses, greedily or by sampling, at that place. So every token is
chosen as without drafts, from the same scores and with the same random numbers, and a seed gives the same text. For a
draft that is certain of its token this is the rejection sampling of Leviathan et al. (arXiv:2211.17192): it is accepted
with the probability that the model gives it, and otherwise another is drawn from what the model gives to the others.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import torch
from transformers import GenerationMixin

from scheduler.batching import MovingAverage
from scheduler.speculation import NO_DRAFTS, Guessed, Pace, Window, best_length, best_window
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import max_positions
from splitnet.drafts.draft_model import DraftModel
from splitnet.drafts.drafter import Drafter, Guess
from splitnet.drafts.heads import Combined, DraftHead
from splitnet.drafts.mtp import mtp_bytes, mtp_head
from splitnet.drafts.prompt_lookup import PromptLookup
from splitnet.errors import SplitnetError
from splitnet.hf.cache import RemoteCache
from splitnet.hf.remote_blocks import Exchange
from splitnet.quant.device import free_memory
from splitnet.swarm.plan import Prediction

log = logging.getLogger(__name__)

SHARE = 0.2  # weight of the latest step in the averages of what steps cost
MEMORY = 0.97  # weight of former tokens in the acceptance, after each further token
PRIOR_TOKENS = 4.0  # weight of the priors, in tokens
FADING = 0.995  # of what steps of more positions took more, with each plain step: it is tried again some time
PREDICTION_S = 1.0  # how long a prediction is used
CHOICE_S = 0.05  # how long a window that was chosen is used: over short links choosing takes 1 % of a step
LOOK_EVERY = 32  # tokens, after which one draft is made where drafts cost more time than they save
LOOK_SHARE = 0.002  # of a plain step: a guess that takes no longer is made at every token
AUTO, OFF, PROMPT_LOOKUP, MTP = NAMES = ("auto", "off", "prompt-lookup", "mtp")
EAGLE = "eagle="  # before the folder of a head
MTP_SHARE = 0.25  # of the free memory, that an MTP layer takes at most without being asked for

_PREPARES = "prepare_inputs_for_generation"
_OTHERS = ("_sample", "_update_model_kwargs_for_generation", "_prefill")
_HANDED_OVER = frozenset({"input_ids", "cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep"})
LONGEST = 1 << 20  # longer texts are not tried
MOST_TEXTS = 4  # at once that "auto" drafts for: drafts slowed eight streams down; fewer were not measured


class Experience:
    """What texts have shown of steps and of one drafter, with one model. Texts share it. Thread-safe.

    priors: by kind of guess: how often it is right at first.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self.drafted = 0  # tokens that were sent as drafts
        self.accepted = 0  # those of them that belong to a text now
        self.texts = 0  # that are being generated
        self.tokens = self.round_trips = 0  # of texts with this drafter, behind their prompts
        self.by_place: dict[int, list[int]] = {}  # in a window: how often a token there was compared, and right
        self._own = [_Share(prior) for prior in priors]
        self._following: dict[int, _Share] = {}  # by kind: of what is guessed behind such a guess, once that was seen
        # What a plain step takes beyond its prediction, and by positions what one of more takes beyond its own and
        # that: what slows plain steps down does not make others look fast.
        self._plain_ms = MovingAverage(SHARE)
        self._more_ms: dict[int, MovingAverage] = {}
        self._client_ms: dict[int, MovingAverage] = {}  # by positions: how long a step kept this process busy
        self._drafting_ms = (MovingAverage(SHARE), MovingAverage(SHARE))  # the first guess of a draft, a further one
        self._saved = MovingAverage(SHARE, 1.0)  # round trips, by each draft that was made
        self._lock = threading.RLock()

    def acceptance(self, kinds: Iterable[int]) -> float:
        """Probability that a guess of such kinds is what the model chooses, if those before it were."""
        shares = [self._own[kind] for kind in kinds]
        return sum(share.right for share in shares) / sum(share.tried for share in shares)

    def compared(self, kind: int, right: bool, before: int | None = None) -> None:
        """A guess behind right ones was compared with the choice of the model. before: the kind of that before it."""
        with self._lock:
            self._own[kind].add(right)
            if before is not None:
                self._following.setdefault(before, _Share(self._own[before].value)).add(right)

    def sent(self, count: int) -> None:
        """So many drafted tokens are under way."""
        with self._lock:
            self.drafted += count

    @contextmanager
    def text(self) -> Iterator[None]:
        """Within, a text is generated."""
        with self._lock:
            self.texts += 1
        try:
            yield
        finally:
            with self._lock:
                self.texts -= 1

    def came(self, tokens: int, *, drafted: bool) -> None:
        """So many further tokens of a text came with one round trip, before which a draft was made, sent or not."""
        with self._lock:
            self.tokens += tokens
            self.round_trips += 1
            if drafted:
                self._saved.add(tokens - 1)

    def verified(self, sent: Drafted, right: bool) -> None:
        """As `compared`, of a token that was sent."""
        with self._lock:
            self.accepted += right
            counts = self.by_place.setdefault(sent.place, [0, 0])
            counts[0] += 1
            counts[1] += right
            self.compared(sent.kind, right, sent.before)

    def took(
        self, positions: int, elapsed_ms: float, client_ms: float, prediction: Callable[[int], Prediction]
    ) -> None:
        """A step that was alone under way came back.

        elapsed_ms: from sending it until its tokens were chosen. client_ms: how long that kept this process busy.
        """
        with self._lock:
            self._client_ms.setdefault(positions, MovingAverage(SHARE)).add(client_ms)
            plain_ms = prediction(1).latency_ms
            if positions == 1 or elapsed_ms < plain_ms + self._plain_ms.value:
                self._plain_ms.add(elapsed_ms - plain_ms)
            if positions == 1:
                for more in self._more_ms.values():
                    more.value *= FADING
            elif self.knows_steps:
                more_ms = elapsed_ms - prediction(positions).latency_ms - self._plain_ms.value
                self._more_ms.setdefault(positions, MovingAverage(SHARE, 0.0)).add(more_ms)

    def timed(self, guesses: Iterator[Guess], *, catches_up: bool) -> Iterator[Guess]:
        """The guesses of a draft, whose time is noted. catches_up: before the first the drafter reads a prompt."""
        for place in itertools.count():
            began = time.perf_counter()
            guess = next(guesses, None)
            if guess is None:
                return
            if place or not catches_up:
                with self._lock:
                    self._drafting_ms[min(place, 1)].add((time.perf_counter() - began) * 1000)
            yield guess

    @property
    def knows_steps(self) -> bool:
        """Whether a plain step was seen, which windows are compared with."""
        return 1 in self._client_ms

    def window(self, kind: int, prediction: Callable[[int], Prediction]) -> Window:
        """The window that promises most behind such a guess."""
        return best_window(self._guessed(kind), self._pace(prediction))

    def best_length(self, guesses: Iterator[Guess], prediction: Callable[[int], Prediction]) -> int:
        """How many of these guesses to send as one window."""
        return best_length((self._guessed(kind) for _, kind in guesses), self._pace(prediction))

    def drafts_pay(self, prediction: Callable[[int], Prediction]) -> bool:
        """Whether a draft takes less time than drafts have saved, also those that promised too little to be sent."""
        worth_ms = max(LOOK_SHARE, self._saved.value) * self._pace(prediction).latency_ms(1)
        return self._drafting_ms[0].value <= worth_ms

    def _guessed(self, kind: int) -> Guessed:
        return Guessed(self._own[kind].value, self._following.get(kind, self._own[kind]).value)

    def _pace(self, prediction: Callable[[int], Prediction]) -> Pace:
        def more_ms(positions: int) -> float:
            return _nearest(self._more_ms, positions) if positions > 1 else 0.0

        @cache
        def latency_ms(positions: int) -> float:
            plain_ms = max(prediction(1).latency_ms + self._plain_ms.value, 0.1)
            return max(prediction(positions).latency_ms + self._plain_ms.value + more_ms(positions), plain_ms)

        @cache
        def slowest_hop_ms(positions: int) -> float:
            # The time of more positions beyond the prediction is spent somewhere, at worst at the slowest hop.
            stage = prediction(positions).slowest_hop_ms + max(0.0, more_ms(positions))
            return max(stage, _nearest(self._client_ms, positions))

        # A hop that is busy with texts of this client all the time does more positions of one at the expense of others.
        busy = min(1.0, self.texts * slowest_hop_ms(1) / latency_ms(1))
        others = busy * max(0, self.texts - 1)
        return Pace(
            lambda positions: latency_ms(positions) + others * max(0.0, slowest_hop_ms(positions) - slowest_hop_ms(1)),
            lambda positions: (1 + others) * slowest_hop_ms(positions),
            *((1 + others) * each.value for each in self._drafting_ms),
        )


class _Share:
    """How often guesses are right, of which later ones count more."""

    def __init__(self, prior: float) -> None:
        self.right, self.tried = prior * PRIOR_TOKENS, PRIOR_TOKENS

    @property
    def value(self) -> float:
        return self.right / self.tried

    def add(self, right: bool) -> None:
        self.right, self.tried = MEMORY * self.right + right, MEMORY * self.tried + 1


def _nearest(averages: dict[int, MovingAverage], positions: int) -> float:
    known = [*averages]  # another thread may add some
    return averages[min(known, key=lambda one: abs(one - positions))].value if known else 0.0


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
class Drafts:
    """Where drafts come from, and what decides how many of them are sent."""

    drafter: Drafter
    experience: Experience
    required: bool = True  # a text that cannot have drafts is refused


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


class Speculator:
    """Makes drafts for the texts of a model, with the experience of its former texts.

    model: a causal LM whose blocks are remote; checkpoint: that it was loaded from.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._heads: dict[str, DraftHead | None] = {}
        self._experiences: dict[Any, Experience] = {}
        self._lock = threading.Lock()

    @property
    def counts(self) -> Counts:
        """What was drafted so far, by all drafters."""
        each = [(one.drafted, one.accepted, one.tokens, one.round_trips) for one in [*self._experiences.values()]]
        return Counts(*map(sum, zip(*each, strict=True))) if each else Counts(0, 0, 0, 0)

    def drafts_by(self, speculate: Any) -> Drafts:
        """Drafts for one text, see `RemoteCausalLM.generate`. Raises SplitnetError: nothing makes drafts so."""
        if not isinstance(speculate, str):
            vocabulary = self._model.config.get_text_config().vocab_size
            return Drafts(DraftModel(speculate, vocabulary), self._experience(id(speculate), DraftModel.priors))
        head, required = self._head(speculate), speculate != AUTO
        if head is None:
            return Drafts(PromptLookup(), self._experience(speculate, PromptLookup.priors), required)
        experience = self._experience(speculate, Combined.priors)
        return Drafts(Combined(head, experience.acceptance), experience, required)

    def _experience(self, source: Any, priors: Sequence[float]) -> Experience:
        """What texts with drafts from this source have shown."""
        return self._experiences.setdefault(source, Experience(priors))

    def _head(self, speculate: str) -> DraftHead | None:
        """None: drafts are copies of the text. Raises SplitnetError: there is no such head."""
        with self._lock:
            if speculate not in self._heads:
                self._heads[speculate] = self._load_head(speculate)
            return self._heads[speculate]

    def _load_head(self, speculate: str) -> DraftHead | None:
        if speculate == PROMPT_LOOKUP:
            return None
        if speculate == AUTO:
            return self._mtp_if_cheap()
        if speculate == MTP:
            head = mtp_head(self._checkpoint, self._model.ends)
            if head is None:
                raise SplitnetError(
                    f"{self._checkpoint.name} has no layer for multi-token prediction: speculate by {AUTO!r}, "
                    f"{PROMPT_LOOKUP!r} or a draft model"
                )
            return head
        if speculate.startswith(EAGLE):
            from splitnet.drafts.eagle import EagleHead

            return EagleHead.open(speculate.removeprefix(EAGLE), self._model.ends)
        raise SplitnetError(
            f"cannot speculate by {speculate!r}: give one of {', '.join(NAMES)}, {EAGLE}DIR, or a draft model"
        )

    def _mtp_if_cheap(self) -> DraftHead | None:
        """The checkpoint's MTP layer, if it is on this machine, can be used, and takes little of the free memory."""
        if (head := self._heads.get(MTP)) is not None:
            return head
        names, free = self._checkpoint.next_token_names, free_memory(self._model.device)
        try:
            here = bool(names) and self._checkpoint.store.are_here(names)
            if here and mtp_bytes(self._checkpoint, self._model.dtype) <= MTP_SHARE * free:
                head = self._heads[MTP] = mtp_head(self._checkpoint, self._model.ends)
                return head
        except SplitnetError as error:
            log.info("drafts are copies of the text: %s", error)
        return None


class Counts(NamedTuple):
    """drafted: tokens that were sent as drafts. accepted: those of them that belong to a text now. tokens: all of texts
    with a drafter, and the round trips through the blocks in which they came."""

    drafted: int
    accepted: int
    tokens: int
    round_trips: int


class Drafted(NamedTuple):
    """A token that was sent behind the text. place: in its window, from 0. before: the kind of the one before it."""

    token: int
    kind: int
    place: int
    before: int | None


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
        with self._drafts.experience.text() if self._drafts is not None else nullcontext():
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
        self._drafts.experience.came(len(self._text.tokens) - before, drafted=self._looked)
        if sent.alone:
            now = time.perf_counter()
            client_ms = sent.sending_ms + (now - began) * 1000 - (self._layer.waited_ms - waited_ms)
            self._drafts.experience.took(sent.ids.shape[1], (now - sent.began) * 1000, client_ms, self._prediction)

    def _plan(self) -> tuple[Window, list[Guess]]:
        """The best window now, and its guesses; where that is to send none, notes one to see whether it is right."""
        drafts, self._looked = self._drafts, False
        if drafts is None or not drafts.experience.knows_steps:
            return NO_DRAFTS, []
        if not drafts.required and drafts.experience.texts > MOST_TEXTS:
            return NO_DRAFTS, []
        experience, self._imagined = drafts.experience, None
        if self._unseen and not experience.drafts_pay(self._prediction):
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
            self._chosen[first.kind] = experience.window(first.kind, self._prediction)
        window = self._chosen[first.kind]
        if window.in_flight > 1:
            self._unseen = 0
            return window, [first, *itertools.islice(guesses, window.length - 1)]
        if self._under_way:
            return NO_DRAFTS, []
        taken = [first]
        noted = (taken.append(guess) or guess for guess in guesses)
        del taken[experience.best_length(itertools.chain(taken[:1], noted), self._prediction) :]
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
        timed = self._drafts.experience.timed(guesses, catches_up=self._begins)
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
            self._drafts.experience.sent(len(guesses))
        self._under_way.append(_Sent(exchange, ids, began, sending_ms, alone))

    def _take(self, logits: torch.Tensor, features: torch.Tensor) -> int:
        token = self._text.choose(logits)
        if self._drafts is not None:
            self._drafts.drafter.observe(token, features)
            if self._imagined is not None:
                self._drafts.experience.compared(self._imagined.kind, self._imagined.token == token)
                self._imagined = None
        return token

    def _goes_on_with(self, token: int) -> bool:
        """Whether what was sent behind the text begins with this token, which belongs to the text now."""
        if not self._drafted or self._drafts is None:
            return False
        sent = self._drafted.popleft()
        self._drafts.experience.verified(sent, sent.token == token)
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
