"""Plans routes for a client's sessions from records and measurements."""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

from scheduler.candidates import LIMIT, CandidateIndex
from scheduler.cost import Encoding, hop_joules, move_ms, route_ms
from scheduler.facts import CLIENT, Hop, Network, Peer, missing_blocks, most_positions
from scheduler.route import NoRoute, best_route
from splitnet.directory.record import PeerRecord, facts_of, places_of
from splitnet.errors import CoverageError, OtherWeights, PeerBusy, SplitnetError, TooLongForPeers
from splitnet.swarm.measure import Latest, Measurements
from splitnet.wire.kv_forms import KV_BITS

EXACT_PEERS = LIMIT  # largest number of peers for an exact search; with more, it uses only the likeliest
KEPT_CROWDS = 2  # of the latest and of the previous records, with which another thread may still plan
StartPeer = Callable[[int, int], str]  # returns the command that starts a peer for the blocks `[start, end)`

# Advice if no peer holds blocks in the session's format.
ALIKE_AGAIN = (
    "start a peer with the former format (--weights, --dtype, --kv), or allow other formats and tokens (--any-weights)"
)


@dataclass(frozen=True, slots=True)
class PlannedHop:
    """A peer of a route, which runs the blocks `[start, end)`."""

    record: PeerRecord
    start: int
    end: int

    @property
    def name(self) -> str:
        return self.record.key.text


def with_kept_hops(route: Sequence[PlannedHop], present: Sequence[PlannedHop]) -> list[PlannedHop]:
    """The route, with the objects of `present` for hops of both routes.

    A record changes with every refresh; a peer with the same blocks as before is the same hop.
    """
    known = {(hop.name, hop.record.address, hop.start, hop.end): hop for hop in present}
    return [known.get((hop.name, hop.record.address, hop.start, hop.end), hop) for hop in route]


# The peers before and after a part of a route; None: the client.
PartNeighbours = tuple[PeerRecord | None, PeerRecord | None]
CLIENT_ENDS: PartNeighbours = (None, None)


def repaired_route(
    kept: Sequence[PlannedHop],
    excluded: Collection[str],
    blocks: tuple[int, int],
    plan: Callable[..., list[PlannedHop]],
) -> list[PlannedHop]:
    """A route with the kept hops of a former one: other peers are planned only for the blocks between them.

    plan: as `Swarm.plan_route`. Raises CoverageError, PeerBusy: as `plan`, if there is also no route without the
    kept hops.
    """
    try:
        used = set(excluded) | {hop.name for hop in kept}
        route: list[PlannedHop] = []
        position, end = blocks
        for following in (*kept, None):
            until = following.start if following else end
            if position < until:
                neighbours = (route[-1].record if route else None, following.record if following else None)
                fill = plan(blocks=(position, until), neighbours=neighbours, exclude=used)
                used |= {hop.name for hop in fill}
                route += fill
            if following:
                route.append(following)
                position = following.end
        return route
    except (CoverageError, PeerBusy):
        if not kept:
            raise
        # A kept hop may be able to run more blocks. It then computes its cache again: one cache per session.
        return with_kept_hops(plan(blocks=blocks, exclude=excluded, holders={hop.name for hop in kept}), kept)


class HeldBlocks(NamedTuple):
    """Blocks `[start, end)` with weights in the format `weights`, see `PeerRecord.dtype`."""

    start: int
    end: int
    weights: str


@dataclass(frozen=True, slots=True)
class Needs:
    """The requirements of a session on its route.

    kv_positions: positions that must be free on every hop. encodings: codecs that a link may use. blocks: the blocks
    `[start, end)` to cover. positions: positions of a usual step. in_flight: steps under way at the same time; 1:
    minimize latency. energy_slowdown: minimize energy among routes that take at most this multiple of the fastest
    route's time; None: minimize time. prompt: positions before the first token. held: required formats of weights;
    other blocks may have any format. context: positions that the session will hold, with the prompt. stored: positions
    of the prompt that peers need not compute, by name. kv_at_least: a key of `KV_BITS`, the coarsest allowed format of
    keys and values. avoid: names of peers that may not be used.
    """

    kv_positions: int
    encodings: tuple[Encoding, ...]
    blocks: tuple[int, int]
    positions: int = 1
    in_flight: int = 1
    energy_slowdown: float | None = None
    prompt: int = 0
    held: tuple[HeldBlocks, ...] = ()
    context: int = 0
    stored: Mapping[str, int] = field(default_factory=dict[str, int])
    kv_at_least: str = "int4"
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted times of a step. latency_ms: time until the outputs arrive. slowest_hop_ms: time for which the
    slowest hop or link is busy."""

    latency_ms: float
    slowest_hop_ms: float


@dataclass(eq=False)
class Planner:
    """Plans routes over the blocks of one model.

    model_name, start_peer: for errors. look: returns the latest records of all peers.
    """

    measurements: Measurements
    model_name: str
    look: Callable[[], Sequence[PeerRecord]] = tuple[PeerRecord, ...]
    start_peer: StartPeer | None = None

    def __post_init__(self) -> None:
        self._start_peer = self.start_peer or partial(peer_command, self.model_name, ())
        self._random = random.Random()
        self.crowd = Latest(_crowd_of, KEPT_CROWDS)  # the index of many records, and the records by name

    def plan_route(
        self,
        records: Sequence[PeerRecord],
        needs: Needs,
        blocks: tuple[int, int],
        *,
        neighbours: PartNeighbours = CLIENT_ENDS,
        exclude: Collection[str] = (),
        holders: Collection[str] = (),
        restricted: bool = False,
    ) -> list[PlannedHop]:
        """The best route through the peers of `records` over the blocks `[start, end)`.

        The index of many records is kept for the next plan with the same records.

        Args:
            exclude: names of peers that must not be used.
            holders: names of peers that hold the session, which needs no more memory there.
            restricted: other peers exist, but may not be used; for the error.

        Raises:
            CoverageError: no usable peer serves some blocks, which the message names.
            OtherWeights: no peer holds some blocks in the required format.
            PeerBusy: no peer of some blocks has free memory for the session.
            TooLongForPeers: no peer of some blocks has enough memory for the session, even without other sessions.
        """
        source, target = _names(neighbours)
        everyone, alike = records, _held_alike(records, needs.held, blocks)
        exclude = {*exclude, *(name for name, (start, end) in alike.items() if start == end)}
        coarser = [record for record in records if KV_BITS.get(record.kv, (0, 0)) < KV_BITS[needs.kv_at_least]]
        exclude |= {record.key.text for record in coarser}
        if len(records) > EXACT_PEERS:
            peers, by_name = self.likely_peers(records, needs, blocks, EXACT_PEERS, exclude, neighbours, holders)
            records = [by_name[peer.id] for peer in peers]
        else:
            by_name = {record.key.text: record for record in records if record.key.text not in exclude}
            records = list(by_name.values())
            peers = [_with_room(peer, needs, holders) for peer in self.measurements.peers(records)]
        if needs.stored:
            peers = [replace(peer, stored_prefix=needs.stored.get(peer.id, 0)) for peer in peers]
        if alike:
            peers = [replace(peer, start=alike[peer.id][0], end=alike[peer.id][1]) for peer in peers]
        names = {record.key.text for record in records}
        beyond = [end for end in neighbours if end is not None and end.key.text not in names]
        network = self.measurements.network([*records, *beyond])
        try:
            route = best_route(
                peers,
                blocks,
                network,
                encodings=needs.encodings,
                kv_needed=needs.kv_positions,
                positions=needs.positions,
                prompt=needs.prompt,
                context=needs.context,
                in_flight=needs.in_flight,
                source=source,
                target=target,
                energy_slowdown=needs.energy_slowdown,
                rng=self._random,
            )
        except NoRoute as error:
            otherwise = _held_otherwise(error.missing, needs.held, everyone, self.model_name)
            if error.full and (too_long := _too_long(everyone, needs.kv_positions, blocks, self.model_name)):
                raise too_long from None
            otherwise = otherwise or _held_coarser(error.missing, needs.kv_at_least, coarser, self.model_name)
            raise otherwise or no_route_error(error, self.model_name, self._start_peer, restricted=restricted) from None
        return [PlannedHop(by_name[hop.peer], hop.start, hop.end) for hop in route.hops]

    def likely_peers(
        self,
        records: Sequence[PeerRecord],
        needs: Needs,
        blocks: tuple[int, int],
        limit: int,
        exclude: Collection[str],
        neighbours: PartNeighbours = CLIENT_ENDS,
        holders: Collection[str] = (),
        *,
        everywhere: bool = True,
    ) -> tuple[list[Peer], Mapping[str, PeerRecord]]:
        """The likeliest peers, with all holders, and all records by name; see `CandidateIndex.near`."""
        crowd, by_name = self.crowd(tuple(records))
        corrected = self.measurements.corrected_peers(by_name)
        present = [name for name in dict.fromkeys((*holders, *needs.stored)) if name in by_name and name not in exclude]
        for name in present:
            corrected[name] = _with_room(corrected.get(name) or facts_of(by_name[name]), needs, holders)
        places = self.measurements.network([end for end in neighbours if end is not None]).places
        likely = crowd.corrected(corrected.values()).near(
            [places[name] for name in _names(neighbours) if name in places],
            blocks,
            encodings=needs.encodings,
            kv_needed=needs.kv_positions,
            positions=needs.positions,
            prompt=needs.prompt,
            context=needs.context,
            exclude=exclude,
            limit=limit,
            everywhere=everywhere,
        )
        chosen = {peer.id for peer in likely}
        return [*likely, *(corrected[name] for name in present if name not in chosen)], by_name

    def predictions(self, needs: Needs, hops: Sequence[PlannedHop]) -> Callable[[int], Prediction]:
        """Predicted times of steps through `hops`, by their positions, from the present facts."""
        cost_ms = self._costs(needs, hops)

        @cache
        def prediction(positions: int) -> Prediction:
            latency_ms = cost_ms(positions, 1)
            return Prediction(latency_ms, cost_ms(positions, 2) - latency_ms)

        return prediction

    def cost_ms(self, needs: Needs, hops: Sequence[PlannedHop]) -> float:
        """Predicted ms of a usual step through `hops`, from the present facts."""
        return self._costs(needs, hops, needs.prompt)(needs.positions, needs.in_flight)

    def token_joules(self, hops: Sequence[PlannedHop]) -> list[float | None]:
        """Joules of a decoded token at each of `hops`, from the present facts; None: unknown."""
        named, peers, _ = self._facts(hops)
        return [hop_joules(peers[hop.peer], hop.end - hop.start) for hop in named]

    def _costs(self, needs: Needs, hops: Sequence[PlannedHop], prompt: int = 0) -> Callable[[int, int], float]:
        """Ms of steps through `hops`, by their positions and by the number of steps under way."""
        named, peers, network = self._facts(hops)
        given: dict[str, Any] = {"encodings": needs.encodings, "prompt": prompt, "context": needs.context}
        return lambda positions, in_flight: route_ms(
            named, peers, network, positions=positions, in_flight=in_flight, **given
        )

    def move_ms(self, needs: Needs, before: PlannedHop | None, hops: Sequence[PlannedHop], cached: int) -> float:
        """Ms until `hops` hold the KV cache of `cached` positions; `before` (None: the client) sends the positions."""
        named, peers, network = self._facts([before, *hops] if before else hops)
        moved, source = (named[1:], before.name) if before else (named, CLIENT)
        return move_ms(moved, peers, network, cached=cached, encodings=needs.encodings, source=source)

    def _facts(self, hops: Sequence[PlannedHop]) -> tuple[list[Hop], dict[str, Peer], Network]:
        """Hops with their present facts; hops without a present record keep their former record."""
        try:
            now = self.look()
        except SplitnetError:  # the hops may live nevertheless
            now = []
        planned = {hop.name: hop.record for hop in hops}
        known = list((planned | {record.key.text: record for record in now if record.key.text in planned}).values())
        named = [Hop(hop.name, hop.start, hop.end) for hop in hops]
        return named, {peer.id: peer for peer in self.measurements.peers(known)}, self.measurements.network(known)


def _crowd_of(records: tuple[PeerRecord, ...]) -> tuple[CandidateIndex, Mapping[str, PeerRecord]]:
    """The index of the records' peers, and the records by name."""
    crowd = CandidateIndex([facts_of(record) for record in records], Network(places=places_of(records)))
    return crowd, {record.key.text: record for record in records}


def _held_alike(
    records: Sequence[PeerRecord], held: Sequence[HeldBlocks], blocks: tuple[int, int]
) -> dict[str, tuple[int, int]]:
    """The longest range of blocks that each peer holds in the required format, by name; empty: any format will do."""
    alike: dict[str, tuple[int, int]] = {}
    for record in records if held else ():
        start, end = (min(max(edge, blocks[0]), blocks[1]) for edge in (record.start, record.end))
        others = sorted((one.start, one.end) for one in held if one.weights != record.dtype)
        edges = [start, *(min(max(edge, start), end) for other in others for edge in other), end]
        alike[record.key.text] = max(zip(edges[::2], edges[1::2], strict=True), key=lambda each: each[1] - each[0])
    return alike


def _held_otherwise(
    missing: Sequence[tuple[int, int]], held: Sequence[HeldBlocks], records: Sequence[PeerRecord], model_name: str
) -> OtherWeights | None:
    """The error if peers serve the missing blocks in another format; None: the cause is another one."""
    for start, end in missing:
        wanted = {one.weights for one in held if one.start < end and one.end > start}
        there = {record.dtype for record in records if record.start < end and record.end > start} - wanted
        if wanted and there:
            return OtherWeights(
                f"blocks {blocks_text(start, end)} of {model_name} are held as {' or '.join(sorted(there))} by all "
                f"peers that serve them, and were held as {' and '.join(sorted(wanted))} in this session: {ALIKE_AGAIN}"
            )
    return None


def _too_long(
    records: Sequence[PeerRecord], positions: int, blocks: tuple[int, int], model_name: str
) -> TooLongForPeers | None:
    """The error if all peers of some blocks lack memory for these positions, even without other sessions."""
    peers = [facts_of(record) for record in records]
    short = missing_blocks([peer for peer in peers if not 0 < peer.kv_capacity < positions], blocks[1], blocks[0])
    if not short:
        return None
    most = min(most_positions(peers, each, attrgetter("kv_capacity")) for each in short)
    return TooLongForPeers(
        f"a session of {positions} positions (prompt and answer) fits into no peer of blocks {_ranges(short)} of "
        f"{model_name}, which hold {most} positions at most: ask for fewer tokens, or start a peer with more memory "
        "(--kv-memory) or fewer bits for keys and values (--kv)"
    )


def _held_coarser(
    missing: Sequence[tuple[int, int]], wanted: str, coarser: Sequence[PeerRecord], model_name: str
) -> CoverageError | None:
    """The error if peers serve the missing blocks with coarser keys and values; None: the cause is another one."""
    for start, end in missing:
        if held := {record.kv for record in coarser if record.start < end and record.end > start}:
            least = min(held, key=lambda kv: KV_BITS.get(kv, (0, 0)))
            return CoverageError(
                f"blocks {blocks_text(start, end)} of {model_name} are served with KV caches held as "
                f"{' or '.join(sorted(held))} only: start a peer with --kv {wanted}, or ask for --kv-at-least {least}"
            )
    return None


def _with_room(peer: Peer, needs: Needs, holders: Collection[str]) -> Peer:
    return replace(peer, kv_free=max(peer.kv_free, needs.kv_positions)) if peer.id in holders else peer


def _names(neighbours: PartNeighbours) -> tuple[str, str]:
    before, after = neighbours
    return before.key.text if before else CLIENT, after.key.text if after else CLIENT


def peer_command(model: str, join_args: Sequence[str], start: int, end: int) -> str:
    """The command that starts a peer for the blocks `[start, end)`; join_args: the arguments that join the
    swarm."""
    return shlex.join(["splitnet", "peer", model, "--blocks", f"{start}:{end}", *join_args])


def no_route_error(
    error: NoRoute, model_name: str, start_peer: StartPeer, *, restricted: bool = False
) -> CoverageError | PeerBusy:
    """The error of a session without a route. restricted: other peers exist, but may not be used."""
    if not error.missing:
        return PeerBusy(
            f"the peers of blocks {_ranges(error.full)} of {model_name} have no free KV memory for this session: "
            "try again later, generate less, or start another peer for them"
        )
    start, end = error.missing[0]
    who = "by no peer that can be used" if restricted else "by nobody"
    return CoverageError(
        f"blocks {_ranges(error.missing)} of {model_name} are served {who}: start a peer with "
        f"`{start_peer(start, end)}`"
    )


def blocks_text(start: int, end: int) -> str:
    """The blocks `[start, end)`, for people."""
    return f"{start}..{end - 1}" if end - start > 1 else f"{start}"


def _ranges(blocks: Sequence[tuple[int, int]]) -> str:
    return ", ".join(blocks_text(*each) for each in blocks)
