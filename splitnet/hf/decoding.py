"""The loop that generates one text, with drafts or without, in the place of transformers' own.

A drafted token is right if it is what the model chooses, greedily or by sampling, at that place. So every token is
chosen as without drafts, from the same scores and with the same random numbers, and a seed gives the same text. For a
draft that is certain of its token this is the rejection sampling of Leviathan et al. (arXiv:2211.17192): it is accepted
with the probability that the model gives it, and otherwise another is drawn from what the model gives to the others.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import GenerationMixin

from scheduler.batching import MovingAverage
from scheduler.speculation import NO_DRAFTS, Pace, Window, best_window
from splitnet.checkpoint.families import max_positions
from splitnet.errors import SplitnetError
from splitnet.hf.cache import RemoteCache
from splitnet.hf.drafts import Draft, Drafter, DraftModel, PromptLookup
from splitnet.hf.remote_blocks import Exchange
from splitnet.swarm.plan import Prediction

SHARE = 0.2  # weight of the latest step in the averages of what steps cost
MEMORY = 0.97  # weight of former tokens in the acceptance, after each further token
PRIOR_TOKENS = 4.0  # weight of the priors, in tokens
PREDICTION_S = 1.0  # how long a prediction is used
LOOK_EVERY = 32  # tokens, after which one draft is made where drafts cost time and promised nothing
PROMPT_LOOKUP = "prompt-lookup"
NOTHING = Draft([])

_PREPARES = "prepare_inputs_for_generation"
_OTHERS = ("_sample", "_update_model_kwargs_for_generation", "_prefill")
_HANDED_OVER = frozenset({"input_ids", "cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep"})
LONGEST = 1 << 20  # longer texts are not tried


class Experience:
    """What texts have shown of steps and of one kind of drafter, with one model. Texts share it. Thread-safe.

    priors: by kind of draft: how often its tokens are accepted at first.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self.drafted = 0  # tokens that were sent as drafts
        self.accepted = 0  # those of them that belong to a text now
        self._accepted = [prior * PRIOR_TOKENS for prior in priors]
        self._tried = [PRIOR_TOKENS for _ in priors]
        self._beyond_ms: dict[int, MovingAverage] = {}  # by positions: what a step took beyond its prediction
        self._client_ms: dict[int, MovingAverage] = {}  # by positions: how long a step kept this process busy
        self._predictions: dict[int, Prediction] = {}
        self._predicted_at = 0.0
        self._lock = threading.RLock()

    def acceptance(self, kind: int) -> float:
        """Probability that a drafted token is what the model chooses, if those before it were."""
        return self._accepted[kind] / self._tried[kind]

    def compared(self, kind: int, right: bool) -> None:
        """A drafted token behind right ones was compared with the choice of the model."""
        with self._lock:
            self._accepted[kind] = MEMORY * self._accepted[kind] + right
            self._tried[kind] = MEMORY * self._tried[kind] + 1

    def sent(self, count: int) -> None:
        """So many drafted tokens are under way."""
        with self._lock:
            self.drafted += count

    def verified(self, kind: int, right: bool) -> None:
        """As `compared`, of a token that was sent."""
        with self._lock:
            self.accepted += right
            self.compared(kind, right)

    def took(
        self, positions: int, elapsed_ms: float, client_ms: float, prediction: Callable[[int], Prediction]
    ) -> None:
        """A step that was alone under way came back.

        elapsed_ms: from sending it until its tokens were chosen. client_ms: how long that kept this process busy.
        """
        with self._lock:
            beyond_ms = elapsed_ms - self._predicted_step(positions, prediction).latency_ms
            for averages, value in ((self._beyond_ms, beyond_ms), (self._client_ms, client_ms)):
                averages.setdefault(positions, MovingAverage(SHARE)).add(value)

    def window(self, kind: int, draft_ms: float, prediction: Callable[[int], Prediction]) -> Window:
        """The window that promises most, for drafts of this kind; none before a plain step was seen."""
        if 1 not in self._beyond_ms:
            return NO_DRAFTS

        def latency_ms(positions: int) -> float:
            predicted_ms = self._predicted_step(positions, prediction).latency_ms
            return max(predicted_ms + _nearest(self._beyond_ms, positions), 0.1)

        def slowest_hop_ms(positions: int) -> float:
            # The time of more positions beyond the prediction is spent somewhere, at worst at the slowest hop.
            growth = max(0.0, _nearest(self._beyond_ms, positions) - self._beyond_ms[1].value)
            stage = self._predicted_step(positions, prediction).slowest_hop_ms + growth
            return max(stage, _nearest(self._client_ms, positions))

        with self._lock:
            return best_window(self.acceptance(kind), Pace(latency_ms, slowest_hop_ms, draft_ms))

    def _predicted_step(self, positions: int, prediction: Callable[[int], Prediction]) -> Prediction:
        now = time.monotonic()
        if now - self._predicted_at > PREDICTION_S:
            self._predictions, self._predicted_at = {}, now
        if positions not in self._predictions:
            self._predictions[positions] = prediction(positions)
        return self._predictions[positions]


def _nearest(averages: dict[int, MovingAverage], positions: int) -> float:
    return averages[min(averages, key=lambda known: abs(known - positions))].value


class Model(Protocol):
    """A causal LM whose calls can be cut in two, see `splitnet.hf.causal_lm.RemoteCausalLM`."""

    def step(self, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor: ...

    def send(self, input_ids: torch.Tensor, cache: RemoteCache) -> Exchange: ...

    def receive(self, exchange: Exchange, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Drafts:
    """Where drafts come from, and what decides how many of them are sent."""

    drafter: Drafter
    experience: Experience


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
    """Makes drafts for the texts of a model, with the experience of its former texts."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._experiences: dict[Any, Experience] = {}

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens that were drafted so far, and how many of them were accepted."""
        experiences = list(self._experiences.values())
        return sum(one.drafted for one in experiences), sum(one.accepted for one in experiences)

    def drafts_by(self, speculate: Any) -> Drafts:
        """Drafts for one text by "prompt-lookup" or a causal LM with the same tokens. Raises SplitnetError: neither."""
        if speculate == PROMPT_LOOKUP:
            drafter, source = PromptLookup(), PROMPT_LOOKUP
        elif isinstance(speculate, str):
            raise SplitnetError(f"cannot speculate by {speculate!r}: give {PROMPT_LOOKUP!r}, or a draft model")
        else:
            drafter, source = DraftModel(speculate, self._vocabulary), id(speculate)
        return Drafts(drafter, self._experiences.setdefault(source, Experience(drafter.priors)))


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
        self._drafted: deque[tuple[int, int]] = deque()  # tokens behind the text that were sent, and kinds of drafts
        self._imagined = NOTHING  # what was not sent, only to see whether it is right
        self._unseen_drafts = 0
        if drafts is not None:
            drafts.drafter.begin(text.tokens)

    def run(self, logits: torch.Tensor) -> torch.Tensor:
        """Goes on until the text is finished, from the logits `[vocabulary]` after the prompt.

        Returns `[1, seq]`, the prompt and all further tokens. Raises SplitnetError: as a call of the model.
        """
        self._take(logits)
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
        window = self._window()
        if not self._under_way:
            self._send(self._draft(window.length), whole=window.in_flight == 1)
        while len(self._under_way) < window.in_flight and (draft := self._draft(window.length)).tokens:
            self._send(draft)
        sent = self._under_way.popleft()
        began, waited_ms = time.perf_counter(), self._layer.waited_ms
        if sent.exchange is None:
            logits = self._model.step(sent.ids, self._cache)
        else:
            logits = self._model.receive(sent.exchange, sent.ids, self._cache)
        for index in range(len(logits)):
            token = self._take(logits[index])
            if self._text.finished or not self._goes_on_with(token):
                self._forget_drafts()
                break
        if sent.alone and self._drafts is not None:
            now = time.perf_counter()
            client_ms = sent.sending_ms + (now - began) * 1000 - (self._layer.waited_ms - waited_ms)
            self._drafts.experience.took(sent.ids.shape[1], (now - sent.began) * 1000, client_ms, self._prediction)

    def _window(self) -> Window:
        """The best window now; where that is to draft nothing, notes a draft to see whether it would be right."""
        if self._drafts is None:
            return NO_DRAFTS
        self._imagined = NOTHING
        draft_ms = self._drafts.drafter.draft_ms
        guess = NOTHING if draft_ms > 0 else self._draft(1)
        if not draft_ms and not guess.tokens:
            return NO_DRAFTS
        window = self._drafts.experience.window(guess.kind, draft_ms, self._prediction)
        if not window.length and not self._under_way:
            self._unseen_drafts += 1
            if draft_ms > 0 and self._unseen_drafts % LOOK_EVERY == 0:
                guess = self._draft(1)
            self._imagined = guess
        return window

    def _draft(self, count: int) -> Draft:
        """At most `count` further tokens, fewer near the end of the text: the model itself adds one at least."""
        most = self._most
        room = count if most is None else min(count, most - len(self._text.tokens) - 1 - len(self._drafted))
        if room < 1 or self._drafts is None:
            return NOTHING
        return self._drafts.drafter.draft([token for token, _ in self._drafted], room)

    def _send(self, draft: Draft, *, whole: bool = False) -> None:
        """Sends drafts behind what is under way, or else behind the last token of the text."""
        alone = not self._under_way
        ids = self._text.ids(len(self._text.tokens) - alone)
        if draft.tokens:
            ids = torch.cat((ids, ids.new_tensor([draft.tokens])), dim=1)
            self._drafted.extend((token, draft.kind) for token in draft.tokens)
        began = time.perf_counter()
        exchange = None if whole else self._model.send(ids, self._cache)
        sending_ms = (time.perf_counter() - began) * 1000
        if draft.tokens and self._drafts is not None:
            self._drafts.experience.sent(len(draft.tokens))
        self._under_way.append(_Sent(exchange, ids, began, sending_ms, alone))

    def _take(self, logits: torch.Tensor) -> int:
        token = self._text.choose(logits)
        if self._drafts is not None:
            self._drafts.drafter.observe(token)
            if self._imagined.tokens:
                self._drafts.experience.compared(self._imagined.kind, self._imagined.tokens[0] == token)
                self._imagined = NOTHING
        return token

    def _goes_on_with(self, token: int) -> bool:
        """Whether what was sent behind the text begins with this token, which belongs to the text now."""
        if not self._drafted or self._drafts is None:
            return False
        drafted, kind = self._drafted.popleft()
        self._drafts.experience.verified(kind, drafted == token)
        return drafted == token

    def _forget_drafts(self) -> None:
        """What was sent behind the text counts no more; the cache holds what it shares with the text."""
        for sent in self._under_way:
            if sent.exchange is not None:
                sent.exchange.abandon()
        self._under_way.clear()
        self._drafted.clear()
        self._layer.crop(min(0, self._offset + len(self._text.tokens) - 1 - self._layer.columns))

    def _prediction(self, positions: int) -> Prediction:
        session = self._cache.session
        assert session is not None
        return session.prediction(positions)


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
