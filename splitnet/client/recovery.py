"""Replacing the hops of a session that died, so that its text goes on as if nothing had happened.

The peer before a lost hop has logged the encoded activations that it sent. The client plans other peers for just the
lost blocks, opens the route again in a new epoch (messages of the old one are dropped from then on), has the log sent
to the replacement, and sends again what is under way. The same bytes give the same KV cache. Where the neighbour died
too, the log of the nearest living sender stands in; the last of them is the client's own.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from enum import StrEnum

from splitnet.client.chain import Chain, Hop
from splitnet.client.overview import blocks_text, short_key
from splitnet.client.planner import Needs, PlannedHop, with_kept_hops
from splitnet.client.swarm import Swarm
from splitnet.errors import (
    CoverageError,
    PeerBusy,
    PeerFailed,
    PeerLeaving,
    PeerLost,
    SessionClosed,
    SessionLost,
    SplitnetError,
)
from splitnet.net.endpoints import Endpoint
from splitnet.net.messages import Step
from splitnet.net.sent_log import SentLog

log = logging.getLogger(__name__)

BAN_S = 30.0
"""How long a peer that died is not planned with."""

MIN_SILENCE_S = 0.25
MAX_SILENCE_S = 2.0
SILENT_STEPS = 5.0
"""Without any answer for so many times what a step usually takes, but within these bounds, the hops are asked whether
they live. With `ANSWER_S` that bounds the time until a peer that hangs, or is cut off, is found out.
"""

IDLE_CHECKS = 2
ANSWER_S = 1.0
"""A peer that does not answer a ping in this time counts as lost."""

MAX_ATTEMPTS = 8
REPLAY_TIMEOUT_S = 60.0
COVERAGE_POLL_S = 0.5


class Cause(StrEnum):
    """Why a route was repaired."""

    LOST = "lost"
    """A hop died, hangs or is cut off."""
    SESSION_LOST = "session_lost"
    """A hop answers, but does not hold the session any more."""
    LEAVING = "leaving"
    """A hop has said that it is about to end or to move."""
    BUSY = "busy"
    """A hop ran out of memory."""
    STALLED = "stalled"
    """All hops live, but what was under way got lost between them."""
    BETTER_ROUTE = "better_route"
    """Nothing was lost."""


_CAUSES: list[tuple[type[SplitnetError], Cause]] = [
    (PeerLeaving, Cause.LEAVING),
    (SessionLost, Cause.SESSION_LOST),
    (PeerBusy, Cause.BUSY),
]


@dataclass(frozen=True, slots=True)
class Recovered:
    """One repair of a route."""

    lost: tuple[str, ...]
    """Why hops were replaced."""
    opened_ms: float
    """Until other peers were planned and had opened the session."""
    total_ms: float
    """Until they had the cache, and what was under way was sent again."""
    cause: Cause
    """Of the first hop that was replaced."""


def silence_s(usual_ms: float) -> float:
    """How long to wait for an answer before asking; usual_ms: of such a step, 0 if that is not known."""
    usual_s = SILENT_STEPS * usual_ms / 1000
    return min(max(usual_s, MIN_SILENCE_S), MAX_SILENCE_S) if usual_ms else MAX_SILENCE_S


class Recovery:
    """Repairs a chain while the steps of one call are awaited.

    Args:
        swarm: where replacements come from.
        chain: the route.
        sent: what the client itself has sent; None if nothing yet.
        next_number: makes numbers for replays.
        timeout_s: how long to wait for coverage when nobody serves the lost blocks.
    """

    def __init__(
        self, swarm: Swarm, chain: Chain, sent: SentLog | None, next_number: Callable[[], int], timeout_s: float
    ) -> None:
        self._idle_checks = 0
        self.done: list[Recovered] = []
        self._swarm = swarm
        self._chain = chain
        self._sent = sent
        self._next_number = next_number
        self._timeout_s = timeout_s

    def find_silent_hops(self, needs: Needs) -> None:
        """Asks all hops whether they live, and replaces those that don't say so.

        Where all live and some compute, there is nothing to do but to wait. Where all live and none has anything to
        do, twice in a row, what was under way got lost between two of them: the route is opened anew, by which they
        find out whether they reach each other, and it is sent again.
        """
        silent, idle = self._ask_all()
        self._idle_checks = self._idle_checks + 1 if idle else 0
        if silent or self._idle_checks == IDLE_CHECKS:
            self._idle_checks = 0
            self._repair(silent, needs)

    def replace_hop(self, endpoint: Endpoint, error: SplitnetError, needs: Needs) -> None:
        """Replaces a hop that died or lost the session.

        Raises:
            SplitnetError: `error` itself, where another peer would answer the same.
        """
        if not isinstance(error, PeerLost | PeerBusy):
            raise error
        if any(hop.endpoint == endpoint for hop in self._chain.hops):  # and was not replaced already
            self._repair({endpoint: error}, needs)

    def replace_dropped_hops(self, needs: Needs) -> None:
        """Makes the route whole again, if an earlier repair failed."""
        dropped = self._chain.dropped_hops()
        if dropped:
            self._repair(
                {endpoint: SessionLost(f"the peer at {endpoint.address} was lost") for endpoint in dropped}, needs
            )

    def move(self, route: Sequence[PlannedHop], needs: Needs) -> None:
        """Leaves hops that work for better ones; what both routes share keeps its caches."""
        self._repair({}, needs, route)

    def _ask_all(self) -> tuple[dict[Endpoint, SplitnetError], bool]:
        """Asks all hops whether they live: those that do not say so, and whether all others have nothing to do."""
        pings = {hop.endpoint: self._swarm.ping(hop.endpoint) for hop in self._chain.hops}
        wait(pings.values(), timeout=ANSWER_S)
        silent: dict[Endpoint, SplitnetError] = {
            endpoint: PeerLost(f"the peer at {endpoint.address} does not answer")
            for endpoint, pong in pings.items()
            if not pong.done()
        }
        return silent, not silent and not any(pong.result().queue_ms for pong in pings.values())

    def _repair(
        self, lost: dict[Endpoint, SplitnetError], needs: Needs, better: Sequence[PlannedHop] | None = None
    ) -> None:
        events = self._swarm.events
        try:
            repaired = self._make_whole(lost, needs, better)
        except SplitnetError as error:
            if not isinstance(error, SessionClosed):
                events.note("failed", f"a route could not be repaired: {error}")
            raise
        self.done.append(repaired)
        route = " -> ".join(f"{short_key(hop.name)} {blocks_text(*hop.blocks)}" for hop in self._chain.hops)
        took = f"after {repaired.total_ms:.0f} ms: {route}"
        if better is None:
            events.note("repaired", f"a route is whole again {took}")
        else:
            events.note("rerouted", f"a session has moved to a better route {took}")

    def _make_whole(
        self, lost: dict[Endpoint, SplitnetError], needs: Needs, better: Sequence[PlannedHop] | None
    ) -> Recovered:
        chain = self._chain
        began = time.monotonic()
        cause = _cause_of(lost, better)
        healthy = [hop.planned for hop in chain.hops if hop.endpoint not in lost]
        causes: list[str] = []
        if better is not None:
            healthy = [hop for hop in healthy if hop in better]
            causes.append("there is a better route")
        for _ in range(MAX_ATTEMPTS):
            for endpoint, error in lost.items():
                if not isinstance(error, SessionLost):
                    self._swarm.ban(endpoint.key.text, BAN_S, leaves=isinstance(error, PeerLeaving))
                chain.drop(endpoint)
                causes.append(str(error))
                log.warning(
                    "%s: another peer takes its place",
                    error,
                    extra={"session": chain.session.hex(), "peer": endpoint.key.text, "address": endpoint.address},
                )
                self._swarm.events.note("lost", f"{error}: another peer takes its place")
            try:
                route = better or self._plan(healthy, needs, began + self._timeout_s)
            except CoverageError:
                # Why a peer that is there refused says more than that nobody else is.
                for error in lost.values():
                    if isinstance(error, PeerBusy):
                        raise error from None
                raise
            better = None
            healthy = [hop for hop in healthy if hop in route]
            failed = chain.open(route, needs.kv_positions)
            opened_s = time.monotonic() - began
            lost = {hop.endpoint: failed[hop.name] for hop in chain.hops if hop.name in failed}
            if not lost:
                if self._sent is not None and self._sent.nbytes:
                    # A hop that answers may have restarted, or dropped a session that was idle for too long.
                    forgetful = {hop.planned for hop in chain.hops if not hop.cached_positions}
                    healthy = [hop for hop in healthy if hop not in forgetful]
                lost = self._refill(healthy)
            if not lost:
                chain.send_all_again()
                total_s = time.monotonic() - began
                return Recovered(tuple(causes), opened_s * 1000, total_s * 1000, cause)
            healthy = [hop for hop in healthy if hop.endpoint not in lost]
        raise next(iter(lost.values()))

    def _plan(self, healthy: Sequence[PlannedHop], needs: Needs, deadline: float) -> list[PlannedHop]:
        """A route that keeps the `healthy` hops if it can; waits until `deadline` for coverage.

        Raises:
            SessionClosed: another thread has closed the session meanwhile.
        """
        while True:
            self._chain.refuse_if_closed()
            try:
                return self._fill_gaps(healthy, needs)
            except (CoverageError, PeerBusy) as error:
                # Perhaps a hop that stays could run more blocks. It holds one cache per session, so it begins anew.
                try:
                    route = self._swarm.plan(needs, holders={hop.name for hop in healthy})
                    return with_kept_hops(route, healthy)
                except (CoverageError, PeerBusy):
                    if time.monotonic() >= deadline:
                        raise error from None
            time.sleep(COVERAGE_POLL_S)
            self._swarm.pardon_living()

    def _fill_gaps(self, healthy: Sequence[PlannedHop], needs: Needs) -> list[PlannedHop]:
        used = {hop.name for hop in healthy}
        route: list[PlannedHop] = []
        position, end = self._chain.blocks
        for following in (*healthy, None):
            until = following.start if following else end
            if position < until:
                ends = (route[-1].record if route else None, following.record if following else None)
                fill = self._swarm.plan(needs, blocks=(position, until), ends=ends, exclude=used)
                used |= {hop.name for hop in fill}
                route += fill
            if following:
                route.append(following)
                position = following.end
        return route

    def _refill(self, healthy: Sequence[PlannedHop]) -> dict[Endpoint, SplitnetError]:
        """Replays logs into all hops that are not `healthy`, front to back; returns those that failed meanwhile."""
        hops = self._chain.hops
        index = 0
        while index < len(hops):
            first = index
            while index < len(hops) and hops[index].planned not in healthy:
                index += 1
            if index > first:
                numbers = self._replay_into(first, until=hops[index - 1].planned.end)
                lost = self._await_replays(numbers, hops[first:index])
                if lost:
                    return lost
            index += 1
        return {}

    def _replay_into(self, first: int, until: int) -> list[int]:
        """Begins the replay that refills hops from index `first` to the boundary `until`; the numbers to wait for."""
        before = self._chain.hops[first - 1] if first else None
        if before is None or (before.carried and before.carried_log is None):
            # The client begins; if its steps pass hops that are healthy, those compute them once more.
            return self._send_log(self._sent, 0, until)
        if before.carried:
            return self._send_log(before.carried_log, first, until)
        number = self._next_number()
        self._chain.ask_replay(first - 1, number, until)
        return [number]

    def _send_log(self, sent: SentLog | None, to: int, until: int) -> list[int]:
        chain = self._chain
        numbers: list[int] = []
        if sent is None:
            return numbers
        for parts, payload in sent.replay():
            numbers.append(self._next_number())
            step = Step(chain.session, chain.epoch, numbers[-1], parts, None, until, sent.codec, payload)
            chain.send_step(step, 0, to=to)
        return numbers

    def _await_replays(self, numbers: Sequence[int], into: Sequence[Hop]) -> dict[Endpoint, SplitnetError]:
        """Waits for the end of replays; returns hops that failed before it came, or did not get what was sent."""
        chain = self._chain
        deadline = time.monotonic() + REPLAY_TIMEOUT_S
        idle_checks = 0
        try:
            while not all(chain.awaited[number].done for number in numbers):
                if time.monotonic() >= deadline:
                    raise PeerFailed("a replay did not end in time: try again")
                try:
                    trouble = chain.receive(MAX_SILENCE_S)
                except queue.Empty:
                    silent, idle = self._ask_all()
                    idle_checks = idle_checks + 1 if idle else 0
                    if silent:
                        return silent
                    if idle_checks == IDLE_CHECKS:
                        return {hop.endpoint: SessionLost(f"a replay into {hop.name[:8]} was lost") for hop in into}
                    continue
                idle_checks = 0
                if trouble is not None:
                    endpoint, error = trouble
                    if not isinstance(error, PeerLost | PeerBusy):
                        raise error
                    return {endpoint: error}
            return {}
        finally:
            for number in numbers:
                chain.forget(number)


def _cause_of(lost: Mapping[Endpoint, SplitnetError], better: Sequence[PlannedHop] | None) -> Cause:
    if better is not None:
        return Cause.BETTER_ROUTE
    for error in lost.values():
        return next((cause for kind, cause in _CAUSES if isinstance(error, kind)), Cause.LOST)
    return Cause.STALLED
