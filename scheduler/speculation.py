"""How far to speculate: the length of a window of drafted tokens, and how many windows to have under way.

Verification of drafts: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192,
section 3. Several windows under way keep all hops of a chain busy: each is drafted as if the ones before it were
accepted, and one that is not takes all behind it with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

LENGTHS: Final = (1, 2, 3, 4, 6, 8, 11, 15)  # drafted tokens; with the one before them at most 16 positions: decode
IN_FLIGHT: Final = (1, 2, 3, 4, 6, 8)

MOST_ACCEPTED: Final = 0.98  # no text goes on as drafted for ever
WORTHWHILE: Final = 1.05  # speculation must promise to be so many times as fast: what it costs is certain


@dataclass(frozen=True, slots=True)
class Guessed:
    """A drafted token: the probability that it is right if those before it are, and the same of one behind it."""

    acceptance: float
    following: float


@dataclass(frozen=True, slots=True)
class Window:
    length: int  # of drafted tokens, 0 for none
    in_flight: int  # windows under way at the same time


NO_DRAFTS: Final = Window(0, 1)


@dataclass(frozen=True, slots=True)
class Pace:
    """What a step costs, by the number of its positions, in ms."""

    latency_ms: Callable[[int], float]  # from sending it until its outputs are there
    slowest_hop_ms: Callable[[int], float]  # for which the slowest hop, link or end is busy: a step behind it waits
    first_draft_ms: float = 0.0  # to draft a token behind the text
    draft_ms: float = 0.0  # to draft a token behind another one

    def drafting_ms(self, length: int) -> float:
        """To draft so many tokens, one or more."""
        return self.first_draft_ms + (length - 1) * self.draft_ms


def best_window(acceptance: float, pace: Pace) -> Window:
    """The window that promises most tokens per second.

    acceptance: probability that a drafted token is what the model chooses, if those before it were, in [0, 1].
    """
    plain = 1 / pace.latency_ms(1)
    best, most = NO_DRAFTS, plain * WORTHWHILE
    for length in LENGTHS:
        for in_flight in IN_FLIGHT:
            speed = tokens_per_ms(Window(length, in_flight), acceptance, pace)
            if speed > most:
                best, most = Window(length, in_flight), speed
    return best


def best_length(guesses: Iterator[Guessed], pace: Pace) -> int:
    """How many of these guesses to send as one window: as many as promise most tokens per second, maybe none.

    Guesses are taken as long as one more promises to pay, as drafting costs time. EAGLE-2 (Li et al., arXiv:2406.16858,
    section 4) chooses by confidence, too.
    """
    best, most = 0, WORTHWHILE / pace.latency_ms(1)
    tokens, right = 1.0, 1.0  # expected tokens of a window of all that were taken, and probability that all are right
    for length, guess in enumerate(itertools.islice(guesses, LENGTHS[-1]), 1):
        right *= min(guess.acceptance, MOST_ACCEPTED)
        tokens += right
        speed = tokens / (pace.latency_ms(length + 1) + pace.drafting_ms(length))
        if speed > most:
            best, most = length, speed
        longer = tokens + right * min(guess.following, MOST_ACCEPTED)
        if longer / (pace.latency_ms(length + 2) + pace.drafting_ms(length + 1)) <= speed:
            break
    return best


def tokens_per_ms(window: Window, acceptance: float, pace: Pace) -> float:
    """Expected tokens per ms with these windows."""
    length, accepted = window.length, min(acceptance, MOST_ACCEPTED)
    drafting_ms = pace.drafting_ms(length)
    first_ms = pace.latency_ms(length + 1) + drafting_ms
    whole = accepted**length  # probability that all drafts of a window are accepted
    if window.in_flight == 1:
        return (1 - whole * accepted) / (1 - accepted) / first_ms
    # Drafts are accepted until one is not: that many tokens and the one that was chosen instead, in the time of the
    # first window and of those behind it that were accepted. What was sent after the rejected one is in the way.
    following_ms = max(pace.slowest_hop_ms(length), drafting_ms, pace.latency_ms(length) / window.in_flight)
    in_the_way_ms = pace.slowest_hop_ms(length) / 2
    return 1 / (1 - accepted) / (first_ms + following_ms * whole / (1 - whole) + in_the_way_ms)
