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


def best_window(first: Guessed, pace: Pace) -> Window:
    """The window that promises most tokens per second. first: its first token; all behind it are as what follows it.

    More windows under way must promise `WORTHWHILE` times as much as fewer: what is behind a wrong guess is computed
    for nothing, at the expense of others.
    """
    best, most = NO_DRAFTS, 1 / pace.latency_ms(1)
    for in_flight in IN_FLIGHT:
        windows = [Window(length, in_flight) for length in LENGTHS]
        speeds = [tokens_per_ms(window, first, pace) for window in windows]
        if max(speeds) > most * WORTHWHILE:
            best, most = windows[speeds.index(max(speeds))], max(speeds)
    return best


def best_length(guesses: Iterator[Guessed], pace: Pace) -> int:
    """How many of these guesses to send as one window: as many as promise most tokens per second, maybe none.

    The first one was made in any case: a step without drafts takes that time, too. Further guesses are taken as long as
    one more promises to pay, as drafting costs time. EAGLE-2 (Li et al., arXiv:2406.16858, section 4) chooses by
    confidence, too.
    """
    best, most = 0, WORTHWHILE / (pace.latency_ms(1) + pace.first_draft_ms)
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


def tokens_per_ms(window: Window, first: Guessed, pace: Pace) -> float:
    """Expected tokens per ms with these windows; see `best_window`."""
    length, in_flight = window.length, window.in_flight
    right, following = (min(share, MOST_ACCEPTED) for share in (first.acceptance, first.following))
    drafting_ms = pace.drafting_ms(length)
    first_ms = pace.latency_ms(length + 1) + drafting_ms
    whole = following**length  # probability that a window behind accepted ones is accepted
    if in_flight == 1:
        return (1 + right * (1 - whole) / (1 - following)) / first_ms
    # Drafts are accepted until one is not: that many tokens and the one that was chosen instead. The first window takes
    # `first_ms`. Each one behind it that must be awaited comes `apart_ms` later; every `in_flight` of them the client
    # waits for the rest of a round trip, as it sends a window when one comes.
    apart_ms = max(pace.slowest_hop_ms(length), drafting_ms)
    rest_ms = pace.latency_ms(length) + drafting_ms - in_flight * apart_ms
    further_ms = apart_ms * whole / (1 - whole) + max(0.0, rest_ms) * whole**in_flight / (1 - whole**in_flight)
    # In a full chain the window after a rejection meets a pass of those that count no more.
    in_the_way_ms = pace.slowest_hop_ms(length) if rest_ms <= 0 else 0.0
    return (1 + right / (1 - following)) / (first_ms + right * further_ms + in_the_way_ms)
