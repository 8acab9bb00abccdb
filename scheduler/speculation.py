"""How much to speculate: the length of a window of drafted tokens, and how many windows are in flight.

Verification of drafts: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192,
section 3. Several windows in flight keep all hops of a chain busy: each is drafted as if all earlier windows were
accepted, and a rejected window discards all later ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

# Possible numbers of drafted tokens in a window. Together with the token before the drafts, a window has at most 16
# positions, so it still is a decode step.
LENGTHS: Final = (1, 2, 3, 4, 6, 8, 11, 15)
IN_FLIGHT: Final = (1, 2, 3, 4, 6, 8)

MOST_ACCEPTED: Final = 0.98  # highest acceptance to assume: at some time, a text differs from the drafts
WORTHWHILE: Final = 1.05  # speculation must promise this speedup, because its cost is certain


@dataclass(frozen=True, slots=True)
class DraftGuess:
    """The estimates for a drafted token. acceptance: the probability that the token is right if all earlier drafts are
    right. following: the same probability for the next drafted token."""

    acceptance: float
    following: float


@dataclass(frozen=True, slots=True)
class Window:
    length: int  # number of drafted tokens; 0: no drafts
    in_flight: int  # number of windows in flight at the same time


NO_DRAFTS: Final = Window(0, 1)


@dataclass(frozen=True, slots=True)
class Pace:
    """Costs of a step in ms, by the number of its positions."""

    latency_ms: Callable[[int], float]  # time from sending the step until its outputs arrive
    # Time for which the slowest hop, link or end is busy and delays the next step.
    slowest_hop_ms: Callable[[int], float]
    first_draft_ms: float = 0.0  # time to draft a token after the text
    draft_ms: float = 0.0  # time to draft a token after another drafted token

    def drafting_ms(self, length: int) -> float:
        """Ms to draft this many tokens, at least one."""
        return self.first_draft_ms + (length - 1) * self.draft_ms


def best_window(first: DraftGuess, pace: Pace) -> Window:
    """The window with the most expected tokens per second. first: the estimates for the first token of the window; its
    `following` is used for all later tokens.

    More windows in flight must promise `WORTHWHILE` times as many tokens as fewer windows: windows after a wrong guess
    are wasted, at the expense of other sessions.
    """
    best, most = NO_DRAFTS, 1 / pace.latency_ms(1)
    for in_flight in IN_FLIGHT:
        windows = [Window(length, in_flight) for length in LENGTHS]
        speeds = [tokens_per_ms(window, first, pace) for window in windows]
        if max(speeds) > most * WORTHWHILE:
            best, most = windows[speeds.index(max(speeds))], max(speeds)
    return best


def best_length(guesses: Iterator[DraftGuess], pace: Pace) -> int:
    """How many of these guesses to send as one window, possibly none: the number with the most expected tokens per
    second.

    The first guess exists already, so even a step without drafts includes the time to draft it. Drafting costs time, so
    a further guess is drawn only while it promises to pay. EAGLE-2 (Li et al., arXiv:2406.16858, section 4) also
    chooses by confidence.
    """
    best, most = 0, WORTHWHILE / (pace.latency_ms(1) + pace.first_draft_ms)
    # Expected tokens of a window with all drawn guesses, and the probability that all guesses are right.
    tokens, right = 1.0, 1.0
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


def tokens_per_ms(window: Window, first: DraftGuess, pace: Pace) -> float:
    """Expected tokens per ms with these windows; see `best_window`."""
    length, in_flight = window.length, window.in_flight
    right, following = (min(share, MOST_ACCEPTED) for share in (first.acceptance, first.following))
    drafting_ms = pace.drafting_ms(length)
    first_ms = pace.latency_ms(length + 1) + drafting_ms
    whole = following**length  # probability that a window after accepted windows is accepted
    if in_flight == 1:
        return (1 + right * (1 - whole) / (1 - following)) / first_ms
    # Drafts are accepted up to the first wrong draft; the token that the model chose replaces this draft. The first
    # window takes `first_ms`. Each later window arrives `apart_ms` after the window before it; after every `in_flight`
    # windows the client waits for the rest of a round trip, because it sends a window when one arrives.
    apart_ms = max(pace.slowest_hop_ms(length), drafting_ms)
    rest_ms = pace.latency_ms(length) + drafting_ms - in_flight * apart_ms
    further_ms = apart_ms * whole / (1 - whole) + max(0.0, rest_ms) * whole**in_flight / (1 - whole**in_flight)
    # If the chain is full, the window after a rejection waits for a pass of discarded windows.
    in_the_way_ms = pace.slowest_hop_ms(length) if rest_ms <= 0 else 0.0
    return (1 + right / (1 - following)) / (first_ms + right * further_ms + in_the_way_ms)
