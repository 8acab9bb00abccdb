"""Which piece is asked of whom: a state machine without clock, sockets and files.

It is told what happens, with the time in seconds, and answers with what to ask. Every source has as many bytes under
way as it brings in half a second: so a fast one never waits for questions, and a slow one holds up few pieces. What few
sources have is asked for first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from scheduler.liveness import SOURCE_SILENT_S

FIRST_BYTES: Final = 2 << 20
"""That are asked of a source that has brought nothing yet."""
MAX_BYTES: Final = 32 << 20
MAX_PIECES: Final = 48
"""Under way from one source."""
HORIZON_S: Final = 0.25
"""Twice that of what a source brings is under way from it; twice the least time that a piece took, if that is more."""
REST_S: Final = 10.0
"""A source that was silent is asked again after that."""
BUSY_S: Final = 1.0
"""So is one that says that it is busy, after that."""
MAX_STRIKES: Final = 3
"""Silences after which a source is left out."""
SLOW_S: Final = 5.0
"""A piece that is under way for so long, and long for who has nothing else to do, is asked of that one, too."""
_FORGET: Final = 0.9
"""What stays of earlier observations with each piece."""

Source = TypeVar("Source", bound=Hashable)


@dataclass
class _State:
    """Of one source."""

    held: set[bytes] = field(default_factory=set[bytes])
    """What it has, as far as it is needed."""
    queue: list[bytes] = field(default_factory=list[bytes])
    """What to ask of it, the next at the end; some of it may be asked of others meanwhile."""
    asked: dict[bytes, tuple[float, int]] = field(default_factory=dict[bytes, tuple[float, int]])
    """What is under way from it: since when, and bytes."""
    asked_bytes: int = 0
    heard_at: float = 0.0
    brought: float = 0.0
    took_s: float = 0.0
    """Bytes that it brought, and in which time; what is long ago counts little."""
    least_s: float = 0.0
    """The shortest time that a piece took; 0: none came."""
    rests_until: float = 0.0
    strikes: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second; 0: not known."""
        return self.brought / self.took_s if self.took_s > 0 else 0.0

    def has_room(self, now: float) -> bool:
        """Whether more may be asked of it."""
        most = min(MAX_BYTES, max(FIRST_BYTES, 2 * self.rate * max(HORIZON_S, self.least_s)))
        return self.rests_until <= now and self.asked_bytes < most and len(self.asked) < MAX_PIECES


class FetchPlan(Generic[Source]):
    """Args: pieces: digest -> bytes, in the order in which they are wanted.

    Attributes:
        left: pieces that are still needed, likewise.
        done_bytes: of those that have come.
    """

    def __init__(self, pieces: Mapping[bytes, int]) -> None:
        self.left = dict(pieces)
        self.done_bytes = 0
        self._sources: dict[Source, _State] = {}
        self._excluded: set[Source] = set()
        self._holders: Counter[bytes] = Counter()
        self._askers: dict[bytes, set[Source]] = {}
        """Of whom a piece is asked now."""
        self._queues_are_old = False

    @property
    def sources(self) -> Collection[Source]:
        """Those that are not left out."""
        return self._sources.keys()

    @property
    def is_done(self) -> bool:
        return not self.left

    def add(self, source: Source, held: Collection[bytes]) -> None:
        """A source that has these pieces; again, if it has others now. One that was left out stays out."""
        if source in self._excluded:
            return
        state = self._sources.setdefault(source, _State())
        self._holders.subtract(state.held)
        state.held = self.left.keys() & set(held)
        self._holders.update(state.held)
        self._queues_are_old = True

    def asks(self, now: float) -> list[tuple[Source, bytes]]:
        """What to ask now, of whom."""
        self._give_up_silent(now)
        if self._queues_are_old:
            self._queues_are_old = False
            order = list(self.left)
            order.reverse()
            order.sort(key=lambda name: -self._holders[name])
            for state in self._sources.values():
                state.queue = [name for name in order if name in state.held]
        asks: list[tuple[Source, bytes]] = []
        free = [source for source, state in self._sources.items() if state.has_room(now)]
        while free:  # in turns, so that the first does not get all there is
            for source in list(free):
                state = self._sources[source]
                name = self._next(state) or self._slow(source, state, now)
                if name is None:
                    free.remove(source)
                    continue
                if not state.asked:
                    state.heard_at = now
                state.asked[name] = now, self.left[name]
                state.asked_bytes += self.left[name]
                self._askers.setdefault(name, set()).add(source)
                asks.append((source, name))
                if not state.has_room(now):
                    free.remove(source)
        return asks

    def arrived(self, source: Source, name: bytes, now: float) -> bool:
        """A piece has come, and was verified; False: it is not needed any more."""
        state = self._sources.get(source)
        if state is not None and name in state.asked:
            since, size = state.asked[name]
            took = now - since
            state.least_s = min(state.least_s or took, took)
            state.brought = state.brought * _FORGET + size
            state.took_s = state.took_s * _FORGET + max(now - max(state.heard_at, since), 1e-6)
            state.heard_at, state.strikes = now, 0
        for other in list(self._askers.get(name, ())):
            self._release(other, name)  # what others send of it is waste, and is not waited for
        size = self.left.pop(name, 0)
        self.done_bytes += size
        return size > 0

    def refused(self, source: Source, name: bytes, now: float) -> None:
        """A source has not got a piece after all."""
        state = self._sources.get(source)
        if state is not None and name in state.asked:
            state.heard_at = now
            state.held.discard(name)
            self._holders[name] -= 1
            self._release(source, name)
            self._queues_are_old = True

    def busy(self, source: Source, name: bytes, now: float) -> None:
        """A source gives nothing now."""
        state = self._sources.get(source)
        if state is not None and name in state.asked:
            state.heard_at, state.rests_until = now, now + BUSY_S
            self._release(source, name)
            self._queues_are_old = True

    def lost(self, source: Source) -> None:
        """A source is gone; it may be added again."""
        state = self._sources.get(source)
        if state is not None:
            for name in list(state.asked):
                self._release(source, name)
            self._holders.subtract(state.held)
            del self._sources[source]
            self._queues_are_old = True

    def exclude(self, source: Source) -> None:
        """A source has given what is wrong: it is asked for nothing any more."""
        self.lost(source)
        self._excluded.add(source)

    def is_stuck(self, now: float) -> bool:
        """Nothing is under way, and nobody has any of what is left."""
        self._give_up_silent(now)
        if self.is_done or any(state.asked for state in self._sources.values()):
            return False
        return not any(name in self.left for state in self._sources.values() for name in state.held)

    def _give_up_silent(self, now: float) -> None:
        for source, state in list(self._sources.items()):
            if state.asked and now - state.heard_at > SOURCE_SILENT_S:
                for name in list(state.asked):
                    self._release(source, name)
                self._queues_are_old = True
                state.strikes += 1
                state.rests_until = now + REST_S
                if state.strikes >= MAX_STRIKES:
                    self.exclude(source)

    def _next(self, state: _State) -> bytes | None:
        """The next piece that nobody is asked for."""
        while state.queue:
            name = state.queue.pop()
            if name in self.left and name not in self._askers:
                return name
        return None

    def _slow(self, source: Source, state: _State, now: float) -> bytes | None:
        """A piece that another source is slow to bring, for one that has nothing else to do."""
        if state.asked or not state.rate:
            return None
        for name, askers in self._askers.items():
            if len(askers) == 1 and source not in askers and name in state.held:
                since, size = self._sources[next(iter(askers))].asked[name]
                if now - since > max(SLOW_S, 3 * size / state.rate):
                    return name
        return None

    def _release(self, source: Source, name: bytes) -> None:
        state = self._sources[source]
        state.asked_bytes -= state.asked.pop(name)[1]
        self._askers[name].discard(source)
        if not self._askers[name]:
            del self._askers[name]
