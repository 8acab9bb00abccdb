"""Which peers are there now: a record outlives a peer that was killed, so whoever shows peers asks them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum

from splitnet.client.event_log import Kind
from splitnet.client.overview import blocks_text, short_key
from splitnet.client.swarm import Swarm
from splitnet.net.endpoints import Endpoint, LinkState
from splitnet.net.prober import Answer
from splitnet.net.records import PeerRecord

SILENT_S = 3.0
"""A peer that has been asked for so long, and has not answered, is not there."""

ASKED_PEERS = 128
"""Every peer that is asked takes a socket. Of more peers the others are believed."""

PAUSE_S = 10.0
"""After such a pause nothing is told of what has changed since: it may have been any time ago."""


class State(Enum):
    """What is known of a peer."""

    HERE = "here"
    UNKNOWN = "unknown"
    """It was not asked, or has had no time to answer."""
    GONE = "gone"
    REFUSES = "refuses"
    """It does not accept this client's key."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A peer as it was seen last."""

    record: PeerRecord
    state: State
    since: float
    """When it came into this state, in seconds of the clock."""
    answer: Answer | None
    """The last; None: it has never answered."""


@dataclass(slots=True)
class _Asked:
    future: Future[Answer] | None = None
    first_unanswered_at: float = 0.0
    asked_at: float = 0.0
    answer: Answer | None = None


class Presence:
    """Asks peers for signs of life, and notes in the swarm's event log who comes and goes. For one thread at a time.

    Args:
        swarm: of the peers.
        clock: seconds.
    """

    def __init__(self, swarm: Swarm, clock: Callable[[], float] = time.monotonic) -> None:
        self._swarm = swarm
        self._clock = clock
        self._asked: dict[Endpoint, _Asked] = {}
        self._seen: dict[str, Seen] = {}
        self._looked_at = float("-inf")

    def look(self, records: Sequence[PeerRecord], working: Collection[str] = ()) -> list[Seen]:
        """What is known now of the peers of these records; asks them again, and does not wait for answers.

        Args:
            working: keys of peers on routes of answers that are under way. Their sessions watch them and replace them,
                so none of them is gone because it answers late.
        """
        now = self._clock()
        if now - self._looked_at > PAUSE_S:
            self._asked, self._seen = {}, {}
        told = bool(self._seen)
        self._looked_at = now
        # Keys are random: so who is asked does not depend on blocks, and is the same the next time.
        asked = sorted(records, key=lambda record: record.key.text)[:ASKED_PEERS]
        endpoints = {record.key.text: record.endpoint for record in asked}
        self._asked = {endpoint: self._asked.get(endpoint) or _Asked() for endpoint in endpoints.values()}
        before, self._seen = self._seen, {}
        for record in records:
            key = record.key.text
            endpoint = endpoints.get(key)
            state, answer = State.UNKNOWN, None
            if endpoint is not None:
                state, answer = self._ask(endpoint, now, works=key in working)
            known = before.get(key)
            since = known.since if known is not None and known.state is state else now
            self._seen[key] = Seen(record, state, since, answer)
        if told:
            self._note_changes(before)
        return list(self._seen.values())

    def _ask(self, endpoint: Endpoint, now: float, *, works: bool) -> tuple[State, Answer | None]:
        """What is known of a peer; asks it again if it has answered, or has been silent."""
        asked = self._asked[endpoint]
        if asked.future is not None and asked.future.done():
            asked.answer, asked.future = asked.future.result(), None
        link = self._swarm.links.state(endpoint)
        if link is LinkState.REFUSED:
            return State.REFUSES, asked.answer
        is_due = now - asked.asked_at >= SILENT_S
        if link is LinkState.DOWN:
            if is_due:  # a link that nobody asks over is closed, and then finds out nothing more
                self._swarm.ping(endpoint)
                asked.asked_at = now
            asked.future = None
            return State.GONE, asked.answer
        if asked.future is None or works:
            asked.first_unanswered_at = now
        silent = now - asked.first_unanswered_at >= SILENT_S
        if asked.future is None or is_due:
            asked.future, asked.asked_at = self._swarm.ping(endpoint), now
        if silent:
            return State.GONE, asked.answer
        return State.UNKNOWN if asked.answer is None else State.HERE, asked.answer

    def _note_changes(self, before: dict[str, Seen]) -> None:
        for key, seen in self._seen.items():
            was, record = before.get(key), seen.record
            serving = _name(record)
            blocks = f"blocks {blocks_text(record.start, record.end)}"
            if was is None:
                self._note("joined", f"{serving} has joined and serves {blocks}")
                continue
            if (was.record.start, was.record.end) != (record.start, record.end):
                self._note("moved", f"{serving} now serves {blocks}")
            if seen.state is State.GONE and was.state is not State.GONE:
                self._note("gone", f"{serving} does not answer any more: {blocks} have lost a peer")
            elif was.state is State.GONE and seen.state is State.HERE:
                self._note("back", f"{serving} answers again and serves {blocks}")
        for key, was in before.items():
            if key not in self._seen and was.state is not State.GONE:
                self._note("left", f"{_name(was.record)} has left")

    def _note(self, kind: Kind, text: str) -> None:
        self._swarm.events.note(kind, text)


def _name(record: PeerRecord) -> str:
    return f"{short_key(record.key.text)} at {record.address.removeprefix('tcp://')}"
