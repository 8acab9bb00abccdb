"""A client's connection to the peers of one model: who is there, how far away, and through whom to go."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, KeysView, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from scheduler.cost import CODING_MS, encodings_of
from scheduler.facts import CLIENT, Link
from scheduler.liveness import BAN_S, LOST_S, UNBAN_S
from scheduler.route_search import Found, searched_route
from splitnet.directory.ask import PeerDirectory
from splitnet.directory.joining import join, peer_directory_of
from splitnet.directory.record import PeerRecord
from splitnet.errors import CoverageError, PeerBusy
from splitnet.security.identity import AuthorizedKeys, Identity, PublicKey
from splitnet.security.swarm_key import OPEN, SwarmKey
from splitnet.swarm.events import EventLog
from splitnet.swarm.links import Links
from splitnet.swarm.measure import Measurements, Measurer
from splitnet.swarm.peer_cache import Bans, PeerCache
from splitnet.swarm.plan import CLIENT_ENDS, Ends, Needs, PlannedHop, Planner, peer_command
from splitnet.transport.pool import BRIEF_S
from splitnet.transport.prober import Answer
from splitnet.wire.codecs import codec_by_name
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.fields import STRICT_VERSIONS

SHOWN_ADDRESSES = 2
"""With which a command that people copy joins a swarm."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a client must know of the model to use its swarm."""

    fingerprint: str
    name: str
    num_blocks: int
    hidden_size: int
    max_positions: int | None
    source: str = ""
    """Hub id, folder or file on this machine; empty: none is known."""

    @classmethod
    def of(cls, checkpoint: Any) -> ModelFacts:
        """The facts of a `Checkpoint`, which has attributes of these names."""
        return cls(**{each.name: getattr(checkpoint, each.name) for each in fields(cls)})


class Swarm:
    """All peers of one model, seen from a client. Thread-safe; close it when done.

    Args:
        facts: the model.
        initial_peers: addresses that any peer of the swarm prints, multiaddrs or `tcp://HOST:PORT?key=...`.
        identity: the client's key; None makes one that lives as long as this object.
        swarm_key: of a closed swarm.
        trusted: keys of the peers that may be used; None: any.
        way: the arguments with which commands join the swarm; None: with these addresses.

    Attributes:
        way: see above.
        measurements: what is known of peers and links.
        links: the client's own.
        measurer: keeps `measurements` fresh.
        planner: predicts what routes take.
        bans: peers that are not planned with for now.
        trusted: see above.
        events: what has happened to peers and routes lately.
        was_covered: all blocks were served at some time.

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
        way: Sequence[str] | None = None,
    ) -> None:
        self.facts = facts
        self.trusted = trusted
        if way is None:
            way = [part for address in initial_peers[:SHOWN_ADDRESSES] for part in ("--join", address)]
            way += ["--swarm-key", "FILE"] if swarm_key else []
        self.way = tuple(way)
        self.identity = identity or Identity.generate()
        self.measurements = Measurements()
        self.events = EventLog()
        self.was_covered = False
        self.bans = Bans()
        self.planner = Planner(self.measurements, facts.name, self.peers, self.start_peer)
        self.links = Links(self.identity, keep_unused_s=BRIEF_S)
        try:
            self._directory = join(initial_peers, lambda: self.links, swarm=swarm_key or OPEN)
        except BaseException:
            self.links.close()
            raise
        self._peers = peer_directory_of(self._directory) or PeerDirectory([], self.links, swarm=swarm_key or OPEN)
        self._known = PeerCache(
            self._directory, facts.fingerprint, facts.name, self.links, trusted, self._peers, self.likely
        )
        self.measurer = Measurer(self._known, self.measurements, self.links, self.likely)

    def start_peer(self, start: int, end: int) -> str:
        """The command that starts a peer of this swarm for the blocks `[start, end)`."""
        return peer_command(self.facts.source or self.facts.name, self.way, start, end)

    def close(self) -> None:
        """Closes all sessions and leaves."""
        self.measurer.stop()
        self.links.close()
        self._directory.close()
        self._peers.close()
        self.measurer.close()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def peers(self, *, fresh: bool = False, whole: bool = False) -> list[PeerRecord]:
        """Peers that serve this model and speak this protocol, see `PeerCache.look`.

        Raises:
            DirectoryError: the directory does not answer, and no peer is known.
            WrongSwarm: the swarm serves other weights only.
            ProtocolVersionError: all peers speak another protocol.
        """
        return self._known.look(fresh=fresh, whole=whole)

    def plan(
        self,
        needs: Needs,
        *,
        blocks: tuple[int, int] | None = None,
        ends: Ends = CLIENT_ENDS,
        exclude: Collection[str] = (),
        holders: Collection[str] = (),
        fresh: bool = False,
        whole: bool = False,
    ) -> list[PlannedHop]:
        """The best route for a session.

        Args:
            needs: of the session.
            blocks: the part `[start, end)` of the model to plan; None: all that the session needs.
            ends: the peers before and after that part; None: the client.
            exclude: keys (as text) of peers that must not be used.
            holders: keys of peers that hold the session already.
            fresh: ask who is there even if that was done a moment ago.
            whole: read all of the directory for it; else that is done if there is no route.

        Raises:
            CoverageError: blocks are served by nobody that could be used; names them.
            PeerBusy: they are served, but no peer has memory for the session.
        """
        part = blocks or needs.blocks
        since_s = self.measurements.now_s - LOST_S
        self.measurer.used()
        try:
            records, unusable = self._look(exclude, fresh=fresh, whole=whole)
            found = searched_route(
                _Searcher(self, records, needs, part, ends, holders, unusable),
                self.measurements.answers,
                excluded=unusable,
                given_up=self.bans.keys(),
                alive={*holders, *(end.key.text for end in ends if end is not None)},
                since_s=since_s,
            )
            self.was_covered |= part == needs.blocks
            return found
        except (CoverageError, PeerBusy):
            if whole:
                raise
            return self.plan(needs, blocks=blocks, ends=ends, exclude=exclude, holders=holders, whole=True)

    def ban(self, key: str, *, leaves: bool = False, seconds: float = BAN_S) -> None:
        """Plans without a peer for a while; `leaves`: it said that it goes away, so that it answers means nothing."""
        self.bans.add(key, self._known.find(PublicKey.parse(key)) if leaves else None, seconds=seconds)

    def unban_living(self) -> None:
        """Lifts the bans of peers that answer now: they were slow or cut off, or have moved and serve other blocks.

        Peers that could not be connected to are tried again as well.
        """
        records = self.peers(fresh=True)
        tried = {record.endpoint for record in self.bans.may_be_unbanned(records)}
        lost = {record.endpoint for record in records if self.links.state(record.endpoint) is LinkState.DOWN}
        for endpoint in tried & self.links.prober.measure(tried | lost, UNBAN_S).keys():
            self.bans.lift(endpoint.key.text)

    def link(self, sender: PeerRecord | None, receiver: PeerRecord | None) -> Link:
        """The link between two peers, or the client (None) and a peer: as measured, predicted, or assumed."""
        records = [record for record in (sender, receiver) if record is not None]
        names = [record.key.text if record is not None else CLIENT for record in (sender, receiver)]
        return self.measurements.network(records).link(*names)

    def ping(self, endpoint: Endpoint, session: bytes = b"") -> Future[Answer]:
        """Asks a peer for a sign of life; the future stays undone if none comes.

        Args:
            endpoint: the peer.
            session: id of a session to ask about. A peer without a record, or of a version that does not know this
                question, is asked without: `Answer.holds` is None then.
        """
        record = self._known.find(endpoint.key)
        asked = session if record is not None and record.version not in STRICT_VERSIONS else b""
        return self.links.prober.ping(endpoint, session=asked)

    def likely(
        self, records: Sequence[PeerRecord], among: Sequence[PeerRecord], count: int, everywhere: bool = False
    ) -> Sequence[PeerRecord]:
        """See `Planner.likely`."""
        hidden = self.facts.hidden_size
        encodings = encodings_of({name: codec_by_name(name).bytes_per_position(hidden) for name in CODING_MS})
        needs = Needs(1, encodings, (0, self.facts.num_blocks))
        return self.planner.likely(records, among, needs, count, everywhere=everywhere)

    def _look(self, exclude: Collection[str], *, fresh: bool, whole: bool) -> tuple[list[PeerRecord], set[str]]:
        """The peers, and the names of those that a route must not go through."""
        present = self.peers(fresh=fresh, whole=whole)
        self.measurer.measure_first(present, self.bans.keys() | set(exclude))
        return present, self.bans.unusable(present, self.links, exclude)


class _Searcher:
    """Plans and measures for the search of a route, see `Searcher`: all of one look at the records."""

    def __init__(
        self,
        swarm: Swarm,
        records: Sequence[PeerRecord],
        needs: Needs,
        part: tuple[int, int],
        ends: Ends,
        holders: Collection[str],
        unusable: AbstractSet[str],
    ) -> None:
        self._swarm = swarm
        self._records = records
        self._needs = needs
        self._part = part
        self._ends = ends
        self._holders = holders
        self._unusable = unusable

    @property
    def now_s(self) -> float:
        return self._swarm.measurements.now_s

    @cached_property
    def _by_name(self) -> dict[str, PeerRecord]:
        return {record.key.text: record for record in self._records}

    @property
    def names(self) -> KeysView[str]:
        return self._by_name.keys()

    def plan(self, left_out: frozenset[str]) -> Found[list[PlannedHop]] | None:
        ends, holders, exclude = self._ends, self._holders, left_out | self._unusable
        try:
            route = self._swarm.planner.plan(
                self._records,
                self._needs,
                self._part,
                ends=ends,
                exclude=exclude,
                holders=holders,
                restricted=bool(exclude),
            )
        except (CoverageError, PeerBusy):
            if left_out:
                return None
            raise
        own = [hop.record for hop, end in zip((route[0], route[-1]), ends, strict=True) if end is None]
        # To peers that are hidden a way may have to be found first.
        newcomers = [hop.name for hop in route if hop.name not in holders and not hop.endpoint.hidden]
        return Found(route, _names(self._swarm.measurements.unprobed(own)), newcomers)

    def measure(self, ends: Sequence[str], others: Sequence[str]) -> set[str] | None:
        own = self._of(ends)
        if not self._swarm.measurer.measure(own, self._of(others)):
            return None
        return {*ends}.difference(_names(self._swarm.measurements.unprobed(own)))

    def beside_silent(self, silent: set[str], answered: set[str]) -> set[str]:
        return self._swarm.planner.beside_silent(self._records, silent, answered)

    def chosen(self, among: AbstractSet[str], count: int, *, likely: bool) -> list[str]:
        if likely:
            return _names(self._swarm.likely(self._records, self._of(among), count))
        # Peers whose keys have cost work come first.
        drawn = random.sample(sorted(among), len(among))
        return sorted(drawn, key=lambda name: not self._by_name[name].is_proven)[:count]

    def _of(self, names: Iterable[str]) -> list[PeerRecord]:
        return [self._by_name[name] for name in names]


def _names(records: Iterable[PeerRecord]) -> list[str]:
    return [record.key.text for record in records]
