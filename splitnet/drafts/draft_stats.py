"""Statistics of decode steps and of drafts, from which the number of drafts in a window is chosen."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from scheduler.batching import MovingAverage
from scheduler.speculation import DraftGuess, Pace, Window, best_length, best_window
from splitnet.drafts.drafter import Guess
from splitnet.swarm.plan import Prediction

SHARE = 0.2  # weight of the latest step in the averages of step costs
MEMORY = 0.97  # decay of the weight of earlier tokens in the acceptance, per token
PRIOR_TOKENS = 4.0  # weight of the priors, in tokens
FADING = 0.995
"""Decay, per plain step, of the extra cost that was measured for longer steps, so that longer steps are tried again."""
LOOK_SHARE = 0.002  # a guess is made at every token if it takes at most this share of a plain step


class Counts(NamedTuple):
    """drafted: tokens that were sent as drafts. accepted: drafted tokens that the model chose. tokens: generated tokens
    of texts with a drafter. round_trips: passes through the blocks that gave these tokens."""

    drafted: int
    accepted: int
    tokens: int
    round_trips: int


class Drafted(NamedTuple):
    """A drafted token that was sent after the text. place: index in its window. before: kind of the previous draft."""

    token: int
    kind: int
    place: int
    before: int | None


class DraftStats:
    """Statistics of the steps of one model and of the drafts of one drafter, over all texts. Thread-safe.

    priors: initial acceptance rate of each kind of guess.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self.drafted = 0  # tokens that were sent as drafts
        self.accepted = 0  # drafted tokens that the model chose
        self.texts = 0  # texts that are being generated
        # Generated tokens of texts with this drafter, and passes through the blocks that gave these tokens.
        self.tokens = self.round_trips = 0
        self.by_place: dict[int, list[int]] = {}  # by index in a window: drafts that were compared, and accepted
        self._own = [_RightShare(prior) for prior in priors]
        self._following: dict[int, _RightShare] = {}  # by kind: guesses after a guess of this kind, once observed
        # Time of a plain step beyond its prediction; and, by positions, time of a longer step beyond its own prediction
        # and beyond the excess of a plain step. So a cause that slows plain steps does not make longer ones look fast.
        self._plain_ms = MovingAverage(SHARE)
        self._more_ms: dict[int, MovingAverage] = {}
        self._client_ms: dict[int, MovingAverage] = {}  # by positions: time that a step kept this process busy
        self._drafting_ms = (MovingAverage(SHARE), MovingAverage(SHARE))  # of a draft's first guess, of a further guess
        self._saved = MovingAverage(SHARE, 1.0)  # mean round trips that a draft saves
        self._lock = threading.RLock()

    def acceptance(self, kinds: Iterable[int]) -> float:
        """Probability that the model chooses a guess of these kinds, given that the model has chosen all guesses
        before."""
        shares = [self._own[kind] for kind in kinds]
        return sum(share.right for share in shares) / sum(share.tried for share in shares)

    def compared(self, kind: int, right: bool, before: int | None = None) -> None:
        """Records whether the model chose a guess that follows accepted guesses. before: kind of the guess before."""
        with self._lock:
            self._own[kind].add(right)
            if before is not None:
                self._following.setdefault(before, _RightShare(self._own[before].value)).add(right)

    def sent(self, count: int) -> None:
        """Records drafted tokens that were sent."""
        with self._lock:
            self.drafted += count

    @contextmanager
    def text(self) -> Iterator[None]:
        """Counts a text while it is generated."""
        with self._lock:
            self.texts += 1
        try:
            yield
        finally:
            with self._lock:
                self.texts -= 1

    def received(self, tokens: int, *, drafted: bool) -> None:
        """Records the new tokens of one round trip. drafted: a draft was made before the round trip, sent or not."""
        with self._lock:
            self.tokens += tokens
            self.round_trips += 1
            if drafted:
                self._saved.add(tokens - 1)

    def verified(self, sent: Drafted, right: bool) -> None:
        """As `compared`, for a token that was sent."""
        with self._lock:
            self.accepted += right
            counts = self.by_place.setdefault(sent.place, [0, 0])
            counts[0] += 1
            counts[1] += right
            self.compared(sent.kind, right, sent.before)

    def observe_latency(
        self, positions: int, elapsed_ms: float, client_ms: float, prediction: Callable[[int], Prediction]
    ) -> None:
        """Records the times of a step during which nothing else was under way.

        elapsed_ms: from sending the step until its tokens were chosen. client_ms: time that this process was busy.
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
        """Measures the time of each guess. catches_up: the drafter reads a prompt before the first guess."""
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
        """Whether a plain step was measured, with which windows are compared."""
        return 1 in self._client_ms

    def window(self, kind: int, prediction: Callable[[int], Prediction]) -> Window:
        """The best window that begins with a guess of this kind."""
        return best_window(self._guessed(kind), self._pace(prediction))

    def best_length(self, guesses: Iterator[Guess], prediction: Callable[[int], Prediction]) -> int:
        """Number of these guesses to send as one window."""
        return best_length((self._guessed(kind) for _, kind in guesses), self._pace(prediction))

    def drafts_pay(self, prediction: Callable[[int], Prediction]) -> bool:
        """Whether a draft takes less time than drafts have saved; drafts that were not sent count as well."""
        worth_ms = max(LOOK_SHARE, self._saved.value) * self._pace(prediction).latency_ms(1)
        return self._drafting_ms[0].value <= worth_ms

    def _guessed(self, kind: int) -> DraftGuess:
        return DraftGuess(self._own[kind].value, self._following.get(kind, self._own[kind]).value)

    def _pace(self, prediction: Callable[[int], Prediction]) -> Pace:
        def more_ms(positions: int) -> float:
            return _nearest(self._more_ms, positions) if positions > 1 else 0.0

        @cache
        def latency_ms(positions: int) -> float:
            plain_ms = max(prediction(1).latency_ms + self._plain_ms.value, 0.1)
            return max(prediction(positions).latency_ms + self._plain_ms.value + more_ms(positions), plain_ms)

        @cache
        def slowest_hop_ms(positions: int) -> float:
            # The excess time of a longer step may be spent at any hop, at worst at the slowest one.
            stage = prediction(positions).slowest_hop_ms + max(0.0, more_ms(positions))
            return max(stage, _nearest(self._client_ms, positions))

        # On a hop that texts of this client keep busy, longer steps of one text delay the other texts.
        busy = min(1.0, self.texts * slowest_hop_ms(1) / latency_ms(1))
        others = busy * max(0, self.texts - 1)
        return Pace(
            lambda positions: latency_ms(positions) + others * max(0.0, slowest_hop_ms(positions) - slowest_hop_ms(1)),
            lambda positions: (1 + others) * slowest_hop_ms(positions),
            *((1 + others) * each.value for each in self._drafting_ms),
        )


class _RightShare:
    """Acceptance rate of guesses; later guesses weigh more."""

    def __init__(self, prior: float) -> None:
        self.right, self.tried = prior * PRIOR_TOKENS, PRIOR_TOKENS

    @property
    def value(self) -> float:
        return self.right / self.tried

    def add(self, right: bool) -> None:
        self.right, self.tried = MEMORY * self.right + right, MEMORY * self.tried + 1


def _nearest(averages: dict[int, MovingAverage], positions: int) -> float:
    known = [*averages]  # a copy: another thread may add keys
    return averages[min(known, key=lambda one: abs(one - positions))].value if known else 0.0
