"""The decoding loop over a simulated chain of hops: drafts never change the text, and the speed is as predicted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scheduler.speculation import IN_FLIGHT, LENGTHS, NO_DRAFTS, DraftGuess, Window, best_window, tokens_per_ms
from splitnet.drafts.draft_stats import DraftStats
from splitnet.drafts.drafter import Guess
from splitnet.drafts.speculator import Drafts
from splitnet.hf import decoding
from splitnet.hf.decoding import MOST_TEXTS, Decoding
from splitnet.swarm.plan import Prediction
from tests.unit.hf.chains import VOCABULARY, Chain, Clock, continued, feature, text_of

KINDS = 3
PROMPTS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4)


class Scripted:
    """Drafts by a script: for each token whether it is right, its kind, and whether the draft ends before it.

    Checks that each token comes with the features of the position before it, that drafts continue behind all tokens in
    flight, and that it observes the text token by token.
    """

    priors = (0.5,) * KINDS
    taps = (1,)

    def __init__(self, chain: Chain, true: Sequence[int], script: Sequence[tuple[bool, int, bool]]) -> None:
        self.text: list[int] = []
        self._chain = chain
        self._true = true
        self._script = itertools.cycle(script)

    def begin_text(self, tokens: Sequence[int], features: torch.Tensor | None = None) -> None:
        assert features is not None and len(features) == len(tokens) - 1
        assert features[:, 0].tolist() == [feature(tokens[: end + 1]) for end in range(len(features))]
        self.text = [*tokens]

    def observe_token(self, token: int, features: torch.Tensor | None = None) -> None:
        assert features is not None and features.tolist() == [feature(self.text)]
        self.text.append(token)
        assert self.text == self._true[: len(self.text)]

    def draft_tokens(self, pending: Sequence[int]) -> Iterator[Guess]:
        assert [*pending] == self._chain.held[len(self.text) : self._chain.layer.columns - self._chain.before]
        for place in itertools.count(len(self.text) + len(pending)):
            right, kind, ends = next(self._script)
            if ends:
                return
            true = self._true[place] if place < len(self._true) else 0
            yield Guess(true if right else (true + 1) % VOCABULARY, kind)


class Forced(DraftStats):
    """Uses the windows of a list, whether they pay or not; None: the window that `DraftStats` chooses."""

    def __init__(self, windows: Sequence[Window | None]) -> None:
        super().__init__(Scripted.priors)
        self._windows = itertools.cycle(windows)
        self._now: Window | None = None

    @property
    def knows_steps(self) -> bool:
        return True

    def window(self, kind: int, prediction: Callable[[int], Prediction]) -> Window:
        self._now = next(self._windows)
        return self._now or super().window(kind, prediction)

    def best_length(self, guesses: Iterator[Guess], prediction: Callable[[int], Prediction]) -> int:
        if self._now is None:
            return super().best_length(guesses, prediction)
        return len([*itertools.islice(guesses, self._now.length)])


class Watched(Chain):
    """Checks that at most `most` tokens are sent."""

    most = 0

    def send_tokens(self, input_ids: torch.Tensor, cache: Any) -> Any:
        sent = super().send_tokens(input_ids, cache)
        assert len(self.held) <= self.most
        return sent


windows = st.one_of(
    st.none(), st.just(NO_DRAFTS), st.builds(Window, st.sampled_from(LENGTHS), st.sampled_from(IN_FLIGHT))
)
scripts = st.lists(st.tuples(st.booleans(), st.integers(0, KINDS - 1), st.booleans()), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(decoding, "time", clock)
    return clock


@given(
    PROMPTS,
    st.integers(1, 25),
    st.integers(0, 3),
    st.lists(windows, min_size=1, max_size=6),
    scripts,
    st.one_of(st.none(), st.integers(0, 24)),
    st.one_of(st.none(), st.integers(0, 25)),
)
def test_drafts_never_change_the_text(
    prompt: list[int],
    new: int,
    before: int,
    windows: list[Window | None],
    script: list[tuple[bool, int, bool]],
    stop: int | None,
    room: int | None,
) -> None:
    """before: columns already in the cache. stop: place of the new token whose value ends the text. room: positions of
    the model's context behind the prompt."""
    true = continued(prompt, new + 1)
    stops = VOCABULARY if stop is None else true[len(prompt) + min(stop, new)]
    ends = next((end for end in range(len(prompt) + 1, len(true)) if true[end - 1] == stops), len(prompt) + new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "CHOICE_S", -1.0)
        patch.setattr(decoding, "time", clock := Clock())
        chain = Watched(prompt, before=before, clock=clock)
        text = text_of(prompt, len(prompt) + new, stop=[stops])
        limit = None if room is None else before + max(len(prompt) + room, ends - 1)
        chain.most = len(prompt) + new - 1 if limit is None else min(len(prompt) + new - 1, limit - before)
        drafter, stats = Scripted(chain, true, script), Forced(windows)
        decoded = Decoding(chain, chain.cache, text, Drafts(drafter, stats), limit).run(chain.prompted)
    assert decoded[0].tolist() == true[:ends] == drafter.text
    assert not chain.under_way  # Every exchange was received or abandoned.
    assert chain.layer.columns == before + ends - 1 and chain.held[: ends - 1] == true[: ends - 1]
    assert stats.tokens == ends - len(prompt) - 1 and stats.round_trips <= stats.tokens
    assert stats.accepted == sum(right for _, right in stats.by_place.values()) <= stats.drafted


class Known:
    """Each guess is right with the same probability; drafting takes no time."""

    priors = (0.5,)
    taps = ()

    def __init__(self, true: Sequence[int], share: float) -> None:
        self._true, self._share, self._length = true, share, 0

    def begin_text(self, tokens: Sequence[int], features: torch.Tensor | None = None) -> None:
        self._length = len(tokens)

    def observe_token(self, token: int, features: torch.Tensor | None = None) -> None:
        self._length += 1

    def draft_tokens(self, pending: Sequence[int]) -> Iterator[Guess]:
        for place in itertools.count(self._length + len(pending)):
            true = self._true[place] if place < len(self._true) else 0
            right = random.Random(f"{self._true[0]} {place}").random() < self._share
            yield Guess(true if right else (true + 1) % VOCABULARY, 0)


TOKENS = 250
TRUE = [continued([first, 1, 2, 3], TOKENS) for first in range(6)]


def speeds(
    share: float, delay_ms: float, pass_ms: Callable[[int], float], told_ms: Callable[[int], float] | None = None
) -> tuple[float, float, float]:
    """Tokens/ms without drafts, with drafts of acceptance `share`, and as predicted."""
    stats, clock = DraftStats(Known.priors), Clock()
    taken_s = {"none": 0.0, "drafts": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "time", clock)
        chain = Chain([0], delay_ms=delay_ms, pass_ms=pass_ms, told_ms=told_ms)
        for arm, true in itertools.product(taken_s, TRUE):
            prompt = true[:4]
            chain = Chain(prompt, delay_ms=delay_ms, pass_ms=pass_ms, told_ms=told_ms, clock=clock)
            drafts = Drafts(Known(true, share), stats) if arm == "drafts" else None
            began = clock.now
            Decoding(chain, chain.cache, text_of(prompt, len(true)), drafts).run(chain.prompted)
            taken_s[arm] += clock.now - began
        pace = stats._pace(chain.predictions())
    tried, right = (sum(values) for values in zip((0, 0), *stats.by_place.values(), strict=True))
    seen = DraftGuess(right / tried, right / tried)
    window = best_window(seen, pace)
    foretold = tokens_per_ms(window, seen, pace) if window.length else 1 / pace.latency_ms(1)
    count = len(TRUE) * (TOKENS - 1) / 1000
    return count / taken_s["none"], count / taken_s["drafts"], foretold


def slow(positions: int) -> float:
    """Ms per pass of a third of a small model in float weights."""
    return 25.0 + 2.0 * (positions - 1)


def quick(positions: int) -> float:
    """Ms per pass of the same blocks in 4-bit weights."""
    return 3.0 + 1.0 * (positions - 1)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.8, 0.9])
@pytest.mark.default_cases(share=(0.8,), delay_ms=(60.0,))
@pytest.mark.parametrize("delay_ms", [20.0, 60.0])
@pytest.mark.parametrize("pass_ms", [slow, quick])
def test_drafts_of_known_acceptance_are_as_fast_as_predicted(
    share: float, delay_ms: float, pass_ms: Callable[[int], float]
) -> None:
    plain, measured, foretold = speeds(share, delay_ms, pass_ms)
    # With 0.9, a text takes only 20 round trips, and its last windows are cut.
    assert measured == pytest.approx(foretold, rel=0.05 if share < 0.9 else 0.08)
    if share == 0.8 and delay_ms == 60:
        assert measured > 3 * plain


@pytest.mark.default_cases(delay_ms=(0.1,), share=(0.0,), pass_ms=(quick,))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("delay_ms", [0.1, 20.0])
@pytest.mark.parametrize("pass_ms", [slow, quick])
@pytest.mark.parametrize("hiccups", [False, True])
def test_drafts_that_are_mostly_wrong_are_not_slower_than_none(
    share: float, delay_ms: float, pass_ms: Callable[[int], float], hiccups: bool
) -> None:
    """hiccups: the times of passes scatter, and predictions know only their median."""
    chance = random.Random(1)

    def scattered(positions: int) -> float:
        return pass_ms(positions) * chance.lognormvariate(0, 0.3)

    plain, measured, _ = speeds(share, delay_ms, scattered if hiccups else pass_ms, pass_ms)
    assert measured > 0.98 * plain


@pytest.mark.parametrize("required", [True, False])
def test_with_many_concurrent_texts_only_required_drafts_are_sent(required: bool) -> None:
    true, stats, clock = TRUE[0], DraftStats(Known.priors), Clock()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as texts:
        patch.setattr(decoding, "time", clock)
        for others in (MOST_TEXTS - 1, MOST_TEXTS):
            while stats.texts < others:
                texts.enter_context(stats.text())
            before = stats.drafted
            chain = Chain(true[:4], delay_ms=60.0, pass_ms=quick, clock=clock)
            drafts = Drafts(Known(true, 1.0), stats, required)
            decoded = Decoding(chain, chain.cache, text_of(true[:4], len(true)), drafts).run(chain.prompted)
            assert decoded[0].tolist() == true
            assert (stats.drafted > before) is (required or others < MOST_TEXTS)
