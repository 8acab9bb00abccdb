"""Network coordinates: where a device stands, so that the delay between two that never met can be predicted.

Vivaldi with height vectors (Dabek, Cox, Kaashoek and Morris: "Vivaldi: A Decentralized Network Coordinate System",
SIGCOMM 2004, sections 3 and 5.4). A device moves a little with each round trip that it measures. What it must publish
stays a handful of numbers however many devices there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

import numpy as np

DIMENSIONS: Final = 3
TUNING: Final = 0.25
"""The constants c_e and c_c of the paper: how far one measurement moves the error and the place."""

PASSES: Final = 5
"""How often a device that comes goes through the round trips that it has measured; with one it stops short."""

MIN_HEIGHT_MS: Final = 0.01
MAX_ERROR: Final = 1.5

MOST_OFF_MS: Final = 1000.0
"""By no more a prediction counts as wrong: no two devices on Earth are farther from each other."""

CONTRADICTION: Final = 2.0
CONTRADICTION_MS: Final = 50.0
"""Of two devices that say that they are farther from each other than so many times the way by who has measured both,
and by so many ms more, one is not where it says: places are not that wrong."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A place in a space of round-trip times.

    vector: `DIMENSIONS` numbers in ms. height_ms: of the access link, which every way to the device passes.
    error: expected relative error of round trips predicted from here; 1 and more: nothing is known yet.
    """

    vector: tuple[float, ...] = (0.0,) * DIMENSIONS
    height_ms: float = MIN_HEIGHT_MS
    error: float = 1.0

    def rtt_ms(self, other: Coordinate) -> float:
        """The round trip predicted between two places."""
        return math.dist(self.vector, other.vector) + self.height_ms + other.height_ms

    def moved(self, other: Coordinate, rtt_ms: float, direction: tuple[float, ...]) -> Coordinate:
        """This place after a round trip of `rtt_ms` to `other` was measured.

        direction: where to go if both stand at the same point; any vector of `DIMENSIONS` numbers, best a random one.
        """
        rtt_ms = max(rtt_ms, 2 * MIN_HEIGHT_MS)
        predicted = self.rtt_ms(other)
        own, theirs = max(self.error, 1e-3), max(other.error, 1e-3)
        weight = own / (own + theirs)
        share = TUNING * weight
        error = min(MAX_ERROR, abs(predicted - rtt_ms) / rtt_ms * share + self.error * (1 - share))
        away = tuple(here - there for here, there in zip(self.vector, other.vector, strict=True))
        apart = math.hypot(*away)
        force = share * max(-MOST_OFF_MS, min(MOST_OFF_MS, rtt_ms - predicted))
        if apart < 1e-6:
            # Who stands at the same point can only be pushed away, in any direction.
            away, apart, push = direction, math.hypot(*direction) or 1.0, max(0.0, force)
        else:
            push = max(force, -apart)  # not past the other: beyond it, going on would lead away
        vector = tuple(here + push * value / apart for here, value in zip(self.vector, away, strict=True))
        # Heights add where vectors subtract, so both heights push the same way (section 5.4 of the paper).
        height = self.height_ms + force * (self.height_ms + other.height_ms) / max(predicted, 1e-6)
        return Coordinate(vector, max(height, MIN_HEIGHT_MS), error)


def place_among(measured: Sequence[tuple[Coordinate, float]], direction: tuple[float, ...]) -> Coordinate:
    """Where a device stands that has measured round trips in ms to others, each with the place of the other.

    It begins where the nearest stands, as from the middle of the space it may not come to a far corner of it, and goes
    through all of them several times. Its error is the median over them, and more if they are few. Others that do not
    know their own places do not count, unless all are such; nor do those whose places most of them contradict.

    direction: see `Coordinate.moved`.
    """
    if not measured:
        return Coordinate()
    measured = _believable([(other, rtt_ms) for other, rtt_ms in measured if other.error < 1.0] or measured)
    nearest, _ = min(measured, key=lambda pair: pair[1])
    place = Coordinate(nearest.vector)
    for _ in range(PASSES):
        for other, rtt_ms in measured:
            place = place.moved(other, rtt_ms, direction)
    off = median(abs(place.rtt_ms(other) - rtt_ms) / max(rtt_ms, MIN_HEIGHT_MS) for other, rtt_ms in measured)
    return replace(place, error=min(MAX_ERROR, off + 1 / len(measured)))


def _believable(measured: Sequence[tuple[Coordinate, float]]) -> Sequence[tuple[Coordinate, float]]:
    """Without those that say that they stand where most of the others cannot be as near as they are."""
    vectors = np.array([other.vector for other, _ in measured])
    heights = np.array([other.height_ms for other, _ in measured])
    rtt_ms = np.array([rtt_ms for _, rtt_ms in measured])
    squares = ((vectors[:, None, :] - vectors[None, :, :]) ** 2).sum(axis=2)
    said_ms = np.sqrt(squares) + np.add.outer(heights, heights)
    contradicted = (said_ms > CONTRADICTION * np.add.outer(rtt_ms, rtt_ms) + CONTRADICTION_MS).sum(axis=1)
    return [pair for pair, others in zip(measured, contradicted, strict=True) if 2 * others < len(measured)] or measured
