"""A client's connection to the peers of one model: records, links, routes, and reports for people."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, KeysView, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

from scheduler.cost import CODING_MS, encodings_of, hop_joules
from scheduler.facts import CLIENT, Link, Peer, Speed, missing_blocks
from scheduler.liveness import BAN_S, LOST_S, UNBAN_S
from scheduler.route_search import PlannedRoute, searched_route
from splitnet.directory.ask import PeerDirectory
from splitnet.directory.joining import join, part_of
from splitnet.directory.record import PeerRecord, facts_of
from splitnet.errors import CoverageError, PeerBusy
from splitnet.security.identity import AuthorizedKeys, Identity, PublicKey
from splitnet.security.swarm_key import OPEN, SwarmKey
from splitnet.swarm.client_links import Links
from splitnet.swarm.measure import Measurements, Measurer
from splitnet.swarm.peer_cache import Bans, PeerCache
from splitnet.swarm.plan import (
    CLIENT_ENDS,
    Needs,
    PartNeighbours,
    PlannedHop,
    Planner,
    StartPeer,
    blocks_text,
    peer_command,
)
from splitnet.swarm.prefix_index import PrefixIndex
from splitnet.transport.addresses import peer_address
from splitnet.transport.pool import BRIEF_S
from splitnet.transport.prober import PingReply
from splitnet.wire.codecs import codec_by_name
from splitnet.wire.endpoints import Endpoint, LinkState

SHOWN_ADDRESSES = 2  # largest number of addresses in a command that people copy to join a swarm
SHORT_KEY = 9  # characters of a key that suffice for people to distinguish peers
KEPT_EVENTS = 256

Kind = Literal[
    "lost",
    "leaving",
    "repaired",
    "rerouted",
    "failed",
    "refused",
    "weights",
    "lied",
    "joined",
    "gone",
    "back",
    "left",
    "moved",
]
"""Of routes: a hop was lost, or is leaving; the route was repaired, or replaced by a better one; a repair failed; a
peer refused a session; weights have another format; an audit has found a lie. Of peers: they joined, stopped answering,
answer again, left, serve other blocks.
"""


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a peer or a route.

    number: from 1, rising by 1. at: Unix time in seconds. text: one sentence, which may quote peers.
    """

    number: int
    at: float
    kind: Kind
    text: str


class EventLog:
    """The last `KEPT_EVENTS` events. Thread-safe. clock: Unix time in seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._last = 0
        self._lock = threading.Lock()

    def note(self, kind: Kind, text: str) -> None:
        """Appends an event with the present time."""
        with self._lock:
            self._last += 1
            self._events.append(Event(self._last, self._clock(), kind, text))

    def since(self, number: int) -> list[Event]:
        """The kept events after the event with this number; 0: all."""
        with self._lock:
            return [event for event in self._events if event.number > number]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts of a model that a client needs to use the model's swarm."""

    fingerprint: str
    name: str
    num_blocks: int
    hidden_size: int
    max_positions: int | None
    source: str = ""  # hub id, folder or file on this machine; empty: unknown

    @classmethod
    def of(cls, checkpoint: Any) -> ModelFacts:
        """The facts of a `Checkpoint`, which has attributes of these names."""
        return cls(**{each.name: getattr(checkpoint, each.name) for each in fields(cls)})


class Swarm(AbstractContextManager["Swarm"]):
    """All peers of one model, for a client. Thread-safe. Must be closed.

    Args:
        initial_peers: addresses as printed by peers of the swarm, multiaddrs or `tcp://HOST:PORT?key=...`.
        identity: the client's key; None: a new key for the life of this object.
        trusted: keys of the peers that may be used; None: any.
        join_args: the arguments with which commands join the swarm; None: made from `initial_peers`.

    Raises:
        DirectoryError: none of `initial_peers` answers.
    """

    def __init__(
        self,
        facts: ModelFacts,
        initial_peers: Sequence[str],
        *,
        identity: Identity | None = None,
        swarm_key: SwarmKey | None = None,
        trusted: AuthorizedKeys | None = None,
        join_args: Sequence[str] | None = None,
    ) -> None:
        self.facts = facts
        self.trusted = trusted
        if join_args is None:
            join_args = [part for address in initial_peers[:SHOWN_ADDRESSES] for part in ("--join", address)]
            join_args += ["--swarm-key", "FILE"] if swarm_key else []
        self.join_args = tuple(join_args)
        self.identity = identity or Identity.generate()
        self.measurements = Measurements()
        self.events = EventLog()
        self._at_close: list[Callable[[], None]] = []
        self.was_covered = False  # all blocks were served at some time
        self.bans = Bans()
        self.prefix_index = PrefixIndex()
        self.planner = Planner(self.measurements, facts.name, self.peers, self.start_peer)
        self.links = Links(self.identity, keep_unused_s=BRIEF_S)
        try:
            self.directory = join(initial_peers, lambda: self.links, swarm=swarm_key or OPEN)
        except BaseException:
            self.links.close()
            raise
        self._peers = part_of(self.directory, PeerDirectory) or PeerDirectory([], self.links, swarm=swarm_key or OPEN)
        self._known = PeerCache(
            self.directory, facts.fingerprint, facts.name, self.links, trusted, self._peers, self.likely_peers
        )
        self.measurer = Measurer(self._known, self.measurements, self.links, self.likely_peers)

    def start_peer(self, start: int, end: int) -> str:
        """The command that starts a peer of this swarm for the blocks `[start, end)`."""
        return peer_command(self.facts.source or self.facts.name, self.join_args, start, end)

    def at_close(self, end: Callable[[], None]) -> None:
        """Calls `end` when the swarm is closed, after its sessions."""
        self._at_close.append(end)

    def close(self) -> None:
        """Closes all sessions and leaves the swarm."""
        self.measurer.stop_measuring()
        self.links.close()
        for end in self._at_close:
            end()
        self.directory.close()
        self._peers.close()
        self.measurer.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def peers(self, *, fresh: bool = False, whole: bool = False) -> list[PeerRecord]:
        """Peers that serve this model and speak this protocol; for arguments and errors, see `PeerCache.refresh`."""
        return self._known.refresh(fresh=fresh, whole=whole)

    def plan_route(
        self,
        needs: Needs,
        *,
        blocks: tuple[int, int] | None = None,
        neighbours: PartNeighbours = CLIENT_ENDS,
        exclude: Collection[str] = (),
        holders: Collection[str] = (),
        fresh: bool = False,
        whole: bool = False,
    ) -> list[PlannedHop]:
        """The best route for a session.

        Args:
            blocks: `[start, end)` to plan; None: all blocks that the session needs.
            neighbours, exclude, holders: see `Planner.plan_route`.
            fresh: ask for the peers again, even if the last answer is recent.
            whole: read the whole directory before planning; otherwise only if there is no route.

        Raises CoverageError, PeerBusy: as `Planner.plan_route`.
        """
        part, exclude = blocks or needs.blocks, {*exclude, *needs.avoid}
        since_s = self.measurements.now_s - LOST_S
        self.measurer.used()
        try:
            records, unusable = self._peers_to_plan_with(exclude, fresh=fresh, whole=whole)
            found = searched_route(
                _SwarmSearcher(self, records, needs, part, neighbours, holders, unusable),
                self.measurements.answers,
                excluded=unusable,
                given_up=self.bans.keys(),
                alive={*holders, *(end.key.text for end in neighbours if end is not None)},
                since_s=since_s,
            )
            self.was_covered |= part == needs.blocks
            return found
        except (CoverageError, PeerBusy):
            if whole:
                raise
            return self.plan_route(
                needs, blocks=blocks, neighbours=neighbours, exclude=exclude, holders=holders, whole=True
            )

    def ban(self, key: str, *, leaves: bool = False, seconds: float = BAN_S) -> None:
        """Plans without a peer for a while. leaves: the peer has announced that it leaves, so its
        answers prove nothing."""
        self.bans.ban_peer(key, self._known.find_record(PublicKey.parse(key)) if leaves else None, seconds=seconds)

    def unban_living(self) -> None:
        """Unbans peers that answer: these peers were slow or unreachable, or have moved and serve other blocks.

        Also tries peers again whose links have failed.
        """
        records = self.peers(fresh=True)
        tried = {record.endpoint for record in self.bans.may_be_unbanned(records)}
        lost = {record.endpoint for record in records if self.links.link_state(record.endpoint) is LinkState.DOWN}
        for endpoint in tried & self.links.prober.measure_links(tried | lost, UNBAN_S).keys():
            self.bans.lift(endpoint.key.text)

    def link(self, sender: PeerRecord | None, receiver: PeerRecord | None) -> Link:
        """The measured, predicted or assumed link between two peers, or between the client (None) and a peer."""
        records = [record for record in (sender, receiver) if record is not None]
        names = [record.key.text if record is not None else CLIENT for record in (sender, receiver)]
        return self.measurements.network(records).link(*names)

    def ping(self, endpoint: Endpoint, session: bytes = b"") -> Future[PingReply]:
        """Pings a peer; the future stays undone without an answer.

        session: id of a session to ask about.
        """
        return self.links.prober.ping(endpoint, session=session)

    def likely_peers(
        self, records: Sequence[PeerRecord], among: Sequence[PeerRecord], count: int, everywhere: bool = False
    ) -> Sequence[PeerRecord]:
        """The `count` peers of `among` that are most likely on routes. everywhere: at least one per block."""
        hidden = self.facts.hidden_size
        encodings = encodings_of({name: codec_by_name(name).bytes_per_position(hidden) for name in CODING_MS})
        needs = Needs(1, encodings, (0, self.facts.num_blocks))
        others = {record.key.text for record in records}.difference(_names(among))
        peers, by_name = self.planner.likely_peers(records, needs, needs.blocks, count, others, everywhere=everywhere)
        return [by_name[peer.id] for peer in peers]

    def _peers_to_plan_with(
        self, exclude: Collection[str], *, fresh: bool, whole: bool
    ) -> tuple[list[PeerRecord], set[str]]:
        """The peers, and the names of peers that routes must avoid."""
        present = self.peers(fresh=fresh, whole=whole)
        self.measurer.measure_first(present, self.bans.keys() | set(exclude))
        return present, self.bans.unusable(present, self.links, exclude)


@dataclass(frozen=True)
class _SwarmSearcher:
    """Plans and measures for the search of a route, see `Searcher`, with one snapshot of the records."""

    swarm: Swarm
    records: Sequence[PeerRecord]
    needs: Needs
    part: tuple[int, int]
    neighbours: PartNeighbours
    holders: Collection[str]
    unusable: AbstractSet[str]

    @property
    def now_s(self) -> float:
        return self.swarm.measurements.now_s

    @cached_property
    def by_name(self) -> dict[str, PeerRecord]:
        return {record.key.text: record for record in self.records}

    @property
    def peer_names(self) -> KeysView[str]:
        return self.by_name.keys()

    def plan_route(self, left_out: frozenset[str]) -> PlannedRoute[list[PlannedHop]] | None:
        neighbours, holders, exclude = self.neighbours, self.holders, left_out | self.unusable
        which: dict[str, Any] = {
            "neighbours": neighbours,
            "exclude": exclude,
            "holders": holders,
            "restricted": bool(exclude),
        }
        try:
            route = self.swarm.planner.plan_route(self.records, self.needs, self.part, **which)
        except (CoverageError, PeerBusy):
            if left_out:
                return None
            raise
        own = [hop.record for hop, end in zip((route[0], route[-1]), neighbours, strict=True) if end is None]
        # Unreachable peers may need time until a way to them is found.
        newcomers = [hop.name for hop in route if hop.name not in holders and not hop.record.endpoint.hidden]
        return PlannedRoute(route, _names(self.swarm.measurements.unprobed(own)), newcomers)

    def measure_peers(self, ends: Sequence[str], others: Sequence[str]) -> set[str] | None:
        own = self._of(ends)
        if not self.swarm.measurer.measure_peers(own, self._of(others)):
            return None
        return {*ends}.difference(_names(self.swarm.measurements.unprobed(own)))

    def beside_silent(self, silent: set[str], answered: set[str]) -> set[str]:
        crowd, _ = self.swarm.planner.crowd(tuple(self.records))
        return crowd.beside_silent(silent, answered)

    def choose_peers(self, among: AbstractSet[str], count: int, *, likely: bool) -> list[str]:
        if likely:
            return _names(self.swarm.likely_peers(self.records, self._of(among), count))
        # Peers with a proof of work for their keys come first.
        drawn = random.sample(sorted(among), len(among))
        return sorted(drawn, key=lambda name: not self.by_name[name].is_proven)[:count]

    def _of(self, names: Iterable[str]) -> list[PeerRecord]:
        return [self.by_name[name] for name in names]


def _names(records: Iterable[PeerRecord]) -> list[str]:
    return [record.key.text for record in records]


@dataclass(frozen=True)
class Overview:
    """The peers of a model, in the order of their blocks.

    missing: ranges of blocks `[start, end)` that neither peers nor the client serve.
    """

    facts: ModelFacts
    records: tuple[PeerRecord, ...]
    missing: tuple[tuple[int, int], ...]
    start_peer: StartPeer

    @classmethod
    def of(cls, swarm: Swarm, records: Iterable[PeerRecord], local: Iterable[tuple[int, int]] = ()) -> Overview:
        """The overview for a client that runs the blocks `local` itself."""
        ordered = tuple(sorted(records, key=lambda record: (record.start, record.end, record.key.text)))
        serving = [facts_of(record) for record in ordered if record.serves]
        serving += [Peer(CLIENT, start, end, Speed.of(0.0, 0.0)) for start, end in local]
        missing = missing_blocks(serving, swarm.facts.num_blocks)
        return cls(swarm.facts, ordered, tuple(missing), swarm.start_peer)

    def advice(self) -> list[str]:
        """Advice, one sentence for each range of missing blocks."""
        what = "blocks {} are served by nobody: start a peer with `{}`"
        return [what.format(blocks_text(*hole), self.start_peer(*hole)) for hole in self.missing]

    def as_json(self) -> dict[str, Any]:
        """All fields of the records."""
        return {
            "model": self.facts.name,
            "fingerprint": self.facts.fingerprint,
            "num_blocks": self.facts.num_blocks,
            "missing": [list(hole) for hole in self.missing],
            "peers": [_record_as_json(record) for record in self.records],
        }


def short_key(key: str) -> str:
    """The beginning of a key, for people."""
    return key[:SHORT_KEY]


def reached(record: PeerRecord) -> str:
    """The way to a peer, for people: direct, or the number of relays."""
    count = len(record.relays)
    return "direct" if not count else f"{count} helper{'s' * (count > 1)}"


def token_ms(record: PeerRecord) -> float:
    """Ms of a decode step of one token in all blocks of a peer."""
    return record.block_ms[0] * (record.end - record.start)


def token_joules(record: PeerRecord) -> float | None:
    """Joules of a decoded token in all blocks of a peer; None: unknown."""
    return hop_joules(facts_of(record), record.end - record.start)


def _record_as_json(record: PeerRecord) -> dict[str, Any]:
    values = asdict(record)
    values["key"] = record.key.text
    values["watts"] = record.watts or None
    values["joules_per_token"] = token_joules(record)
    values["join"] = peer_address(record.endpoint)
    values["relays"] = [{"address": relay.address, "key": PublicKey(relay.key).text} for relay in record.relays]
    values["links"] = [
        {"peer": link.peer.hex(), "rtt_ms": link.rtt_ms, "bytes_per_ms": link.bytes_per_ms} for link in record.links
    ]
    return values
