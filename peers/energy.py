"""What the device draws while it computes: how readings around its work become watts. No I/O of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from scheduler.swarm import MAX_WATTS

log = logging.getLogger(__name__)

HALF_LIFE_S = 20.0
"""Of computing: what was drawn before counts half."""

SENSOR_S = 0.5
"""A sensor is read no more often: over I2C that takes a millisecond."""

MOST_WATTS = 2000.0
"""Of one counter. One that leaps by more was set back, and did not wrap."""


@dataclass(frozen=True)
class Source:
    """Tells the energy of (a part of) the device, or its power.

    Attributes:
        name: for people; sources with the same names are the same.
        read: joules so far of a counter, watts now of a sensor. Raises OSError or ValueError if that cannot be read.
        wraps_at: joules at which a counter begins again at 0, 0 if that is not known; None: it is a sensor.
    """

    name: str
    read: Callable[[], float] = field(compare=False)
    wraps_at: float | None = None


@dataclass(frozen=True)
class Sources:
    """All that add up to the device; none if it is not known what it draws.

    problem: what keeps it from being known, and what helps.
    """

    parts: tuple[Source, ...] = ()
    problem: str = ""

    @property
    def names(self) -> str:
        """For people."""
        return ", ".join(part.name for part in self.parts)


class EnergyMeter:
    """Adds up what is read around the work of the device. A reading that fails counts for nothing, and invents nothing.

    One thread at a time computes; another may look for sources.

    Args:
        find: the sources that can be read now.
        watts: what the device draws while it computes, if the user says so; then nothing is read.
        clock: seconds.

    Attributes:
        joules: of all work so far, as far as it is known.
    """

    def __init__(
        self,
        find: Callable[[], Sources] = Sources,
        watts: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.joules = 0.0
        self._find = find
        self._given = watts
        self._clock = clock
        self._sources = Sources()
        self._recent_joules = self._recent_s = 0.0
        self._sensed_watts, self._sensed_at = 0.0, float("-inf")
        self.look()

    @property
    def watts(self) -> float:
        """Drawn while the device computes; 0: not known."""
        if self._given is not None:
            return self._given
        joules, seconds = self._recent_joules, self._recent_s
        return min(joules / seconds, MAX_WATTS) if seconds else 0.0

    @property
    def origin(self) -> str:
        """Where that is known from, or why it is not; "" if nothing here tells it."""
        if self._given is not None:
            return f"{self._given:g} W while it computes, as --watts says"
        return self._sources.names or self._sources.problem

    def look(self) -> None:
        """Finds out which sources can be read now: they come and go with drivers and rights."""
        if self._given is not None:
            return
        try:
            found = self._find()
        except OSError:  # something vanishes while it is looked at
            found = Sources()
        if found != self._sources:
            self._use(found)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around work of the device."""
        sources = self._sources
        if self._given is None and not sources.parts:
            yield
            return
        began, before = self._clock(), self._counted(sources)
        try:
            yield
        finally:
            self._take_in(sources, before, self._clock() - began)

    def _take_in(self, sources: Sources, before: list[float] | None, seconds: float) -> None:
        if self._given is not None:
            self.joules += self._given * seconds
            return
        after = self._counted(sources)
        if before is None or after is None or sources is not self._sources or seconds <= 0:
            return
        counters = [part for part in sources.parts if part.wraps_at is not None]
        joules = 0.0
        for counter, earlier, later in zip(counters, before, after, strict=True):
            step = later - earlier if later >= earlier else later - earlier + (counter.wraps_at or 0.0)
            if not 0 <= step <= MOST_WATTS * seconds + MOST_WATTS / 1000:
                return
            joules += step
        watts = self._sensed(sources)
        if watts is None:
            return
        joules += watts * seconds
        self.joules += joules
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        self._recent_joules = self._recent_joules * kept + joules
        self._recent_s = self._recent_s * kept + seconds

    def _counted(self, sources: Sources) -> list[float] | None:
        """Of each counter; None: not all can be read."""
        try:
            return [part.read() for part in sources.parts if part.wraps_at is not None]
        except (OSError, ValueError) as error:
            self._lose(sources, error)
            return None

    def _sensed(self, sources: Sources) -> float | None:
        """Watts of all sensors together, as read lately; None: not all can be read."""
        sensors = [part for part in sources.parts if part.wraps_at is None]
        now = self._clock()
        if sensors and now - self._sensed_at >= SENSOR_S:
            try:
                self._sensed_watts = max(0.0, sum(part.read() for part in sensors))
            except (OSError, ValueError) as error:
                self._lose(sources, error)
                return None
            self._sensed_at = now
        return self._sensed_watts if sensors else 0.0

    def _lose(self, sources: Sources, error: Exception) -> None:
        if sources is self._sources:
            log.info("what the device draws cannot be read any more: %s", error)
            self._use(Sources())

    def _use(self, sources: Sources) -> None:
        self._sources = sources
        self._recent_joules = self._recent_s = 0.0
        self._sensed_at = float("-inf")
