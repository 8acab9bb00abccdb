"""The blocks that a peer serves: its choice when it joins, and its moves when other peers are lost."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

import torch

from peers.peer_links import NextHops
from peers.peer_options import SpanWish
from scheduler.facts import PASS_SIZES, Coordinate, Peer, Speed, missing_blocks
from scheduler.liveness import ANSWER_S, HOLDER_LOST_S, HOLDER_SILENT_S
from scheduler.peer_moves import PeerMove, Willingness, best_move
from scheduler.placement import BLOCKS_SHARE, block_ms, choose_span, work_ms
from splitnet.blocks.span import block_bytes, free_memory
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import can_cut, last_cut
from splitnet.directory.record import PeerRecord, expected_facts_of, facts_of, place_of
from splitnet.errors import OutOfMemory, SplitnetError
from splitnet.security.identity import Identity, PublicKey
from splitnet.swarm.trial import PeerLinks
from splitnet.transport.prober import PROBE_BYTES
from splitnet.wire.codecs import codec_by_name
from splitnet.wire.endpoints import Endpoint, LinkState

log = logging.getLogger(__name__)

LINK_CODEC = "int8"  # codec of activations that is assumed for slow links

TRIED_AT_ONCE = 32  # peers that are pinged in one round
WITNESSES = 5  # number of nearest answering peers from whose coordinates the distances of all other peers are estimated
PROBED = 4  # answering peers that receive 64 KiB, which measures the uplink of this machine
READ_BYTES = 32 * 2**20  # size of the memory, in bytes, that is read to estimate the speed of the device
READS = 3  # timed reads of memory; the fastest counts
FEW = 3  # if at most this many peers serve a block, other peers watch them: all may be lost at the same time
MAX_WATCHED = 16  # maximum number of peers that one peer pings regularly

LOOK_S = 15.0  # longest interval between two looks at the records of all other peers
QUICK_LOOK_S = 2.0  # shortest interval
# Interval per peer of the swarm: small swarms are cheap to look up, and then replace lost blocks sooner.
LOOK_PER_PEER_S = 0.3
URGENT_LOOK_S = 1.0  # shortest interval while some blocks have no server
URGENT_LOOK_PER_PEER_S = 0.05  # interval per peer meanwhile: the peer that moves waits for new records of others
CHECK_S = 0.5  # interval between two checks of the watched peers
Blocks = tuple[int, int]


def fitting_blocks(
    checkpoint: Checkpoint, wish: SpanWish, device: str, dtype: str | None, weights: str | None = None
) -> int:
    """The number of blocks that fit into the memory; 0 if `wish` names blocks. Arguments as in `Span.load`.

    Raises OutOfMemory: no block fits; WeightsError: the weight format is impossible.
    """
    if wish.blocks is not None:
        return 0
    size = block_bytes(checkpoint, dtype, weights, device)
    memory = wish.memory if wish.memory is not None else int(free_memory(device) * BLOCKS_SHARE)
    fitting = min(checkpoint.num_blocks, memory // size)
    if fitting < 1:
        raise OutOfMemory(
            f"one block of {checkpoint.name} takes {size / 2**20:.0f} MiB, {memory / 2**20:.0f} MiB are given: "
            "use --memory with more, or smaller --weights"
        )
    return fitting


def expected_block_ms(checkpoint: Checkpoint, device: str, dtype: str | None, weights: str | None = None) -> float:
    """Ms of a token in a block, estimated from the speed of memory before blocks are loaded; for comparisons only."""
    values = torch.zeros(READ_BYTES // 4, dtype=torch.float32, device=device)
    took_s = math.inf
    for _ in range(READS):
        began = time.perf_counter()
        float(values.sum())
        took_s = min(took_s, time.perf_counter() - began)
    return block_bytes(checkpoint, dtype, weights, device) * took_s * 1000 / READ_BYTES


@dataclass(frozen=True)
class PresentPeers:
    """Peers that answer. away_ms: latency to each, by key text. bytes_per_ms: uplink of this machine; 0: unknown."""

    records: Sequence[PeerRecord] = ()
    away_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    bytes_per_ms: float = 0.0


NOBODY = PresentPeers()


def answering(records: Sequence[PeerRecord], identity: Identity) -> PresentPeers:
    """The peers that answer; of many peers a sample. A record may name a peer that does not exist.

    The first round pings keys with a proof of work, the second one peers that are near by network coordinates.
    """
    # Without the record of an earlier run of this peer.
    records = [record for record in records if record.key != identity.public]
    if not records:
        return NOBODY
    others = sorted(random.sample(records, len(records)), key=lambda record: not record.is_proven)
    found: list[tuple[float, PeerRecord]] = []
    with PeerLinks(identity) as links:
        for _ in range(2):
            tried, others = others[:TRIED_AT_ONCE], others[TRIED_AT_ONCE:]
            answers = links.try_out({record.endpoint for record in tried})
            found += [(rtt_ms, record) for record in tried if (rtt_ms := answers[record.endpoint].rtt_ms) is not None]
            if not others:
                break
            if found:
                nearest = sorted(found, key=lambda pair: pair[0])[:WITNESSES]
                places = [place_of(record).coordinate for _, record in nearest]
                others.sort(key=lambda record: _far_ms(place_of(record).coordinate, places))
        probed = links.prober.measure_links(record.endpoint for _, record in found[:PROBED])
    slowest = PROBE_BYTES / (1000 * ANSWER_S) if found else 0.0  # no probe arrived in time
    return PresentPeers(
        [record for _, record in found],
        {record.key.text: rtt_ms / 2 for rtt_ms, record in found},
        max((link.bytes_per_ms for link in probed.values()), default=slowest),
    )


def _far_ms(place: Coordinate, witnesses: Sequence[Coordinate]) -> tuple[bool, float]:
    """Sort key: the median round trip in ms from a coordinate to the witnesses; an unknown coordinate comes last."""
    return place.error >= 1.0, median_low(place.rtt_ms(each) for each in witnesses)


def choose_blocks(
    checkpoint: Checkpoint, wish: SpanWish, fitting: int, present: PresentPeers, own_ms: float | None = None
) -> tuple[int, int]:
    """The blocks `[start, end)` to serve next to the `present` peers: the blocks of `wish`, or at most `fitting`.

    own_ms: time of a token in one block of the new peer; None: unknown.

    Raises SplitnetError: the model does not have the blocks of `wish`.
    """
    count = checkpoint.num_blocks
    if wish.blocks is None:
        size = position_bytes(checkpoint)
        peers = [expected_facts_of(record, size) for record in present.records]
        if own_ms is not None and peers:
            own_ms = work_ms(expected_speed(own_ms, peers))
            own_ms = float(block_ms(own_ms, fitting, size / present.bytes_per_ms if present.bytes_per_ms else 0.0))
        start, end = choose_span(peers, count, fitting, own_ms, present.away_ms)
        last = last_cut(checkpoint.config)
        if can_cut(checkpoint.config, start) and can_cut(checkpoint.config, end):
            return start, end
        if fitting >= count - last or not last:
            return min(last, max(0, count - fitting)), count
        return max(0, last - fitting), last
    start, end = wish.blocks
    if not 0 <= start < end <= count:
        raise SplitnetError(f"{checkpoint.name} has blocks 0..{count - 1}: use --blocks START:END within 0:{count}")
    return start, end


def expected_speed(own_ms: float, peers: Sequence[Peer]) -> Speed:
    """The speed of a peer with `own_ms` for a token: larger passes scale as at the peer with the most similar speed."""
    if not peers:
        return Speed.of(own_ms, own_ms / PASS_SIZES[1])
    alike = min(
        (peer.speed for peer in peers),
        key=lambda speed: abs(math.log(_positive(speed.block_ms_at(1)) / _positive(own_ms))),
    )
    return Speed(tuple(ms * own_ms / _positive(alike.block_ms_at(1)) for ms in alike.block_ms))


def position_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a position on slow links, for the choice of blocks."""
    return codec_by_name(LINK_CODEC).bytes_per_position(checkpoint.hidden_size)


def _positive(ms: float) -> float:
    return max(ms, 1e-6)


class Mover:
    """Decides the moves of one peer. `scheduler.peer_moves` has the rules, which keep peers from leaving together.

    position_bytes: bytes of a position on links; 0: the bandwidth of peers does not count. fits: whether a span can
    begin or end at a boundary.
    """

    def __init__(
        self, num_blocks: int, position_bytes: float = 0.0, fits: Callable[[int], bool] = lambda boundary: True
    ) -> None:
        self.lacking = False  # whether, at the last decision, some blocks had no server and no peer was moving to them
        self._num_blocks = num_blocks
        self._fits = fits
        self._position_bytes = position_bytes
        self._announced: PeerMove | None = None  # waits for newer records of all peers that may leave the same blocks
        self._issued: dict[str, float] = {}  # times of these peers' older records, by key text

    @property
    def intended(self) -> tuple[int, int] | None:
        """The span of an announced move."""
        return (self._announced.start, self._announced.end) if self._announced else None

    def decide(self, own: PeerRecord, others: Sequence[PeerRecord], now: float) -> tuple[int, int] | None:
        """The span `[start, end)` to move to now, or None. others: all other records. now: Unix time."""
        expected = [expected_facts_of(record) for record in others if record.serves or record.moving_to]
        self.lacking = bool(missing_blocks([facts_of(own), *expected], self._num_blocks))
        move = self._named(own, others, now)
        if move is None or not (self._fits(move.start) and self._fits(move.end)):
            self._announced = None
            return None
        if move.confirm:
            if self._announced != move:
                self._announced, self._issued = move, {record.key.text: record.issued_at for record in others}
            beside = [record for record in others if record.start < own.end and own.start < record.end]
            may_leave = [record for record in beside if record.serves and record.max_blocks > 0]
            if any(record.issued_at <= self._issued.get(record.key.text, 0.0) for record in may_leave):
                return None
        self._announced = None
        return move.start, move.end

    def guarded(self, own: PeerRecord, others: Sequence[PeerRecord], now: float) -> list[PeerRecord]:
        """The peers whose loss this peer would replace by a move: servers of a block that few peers serve."""
        guarded: dict[PublicKey, PeerRecord] = {}
        if own.max_blocks:
            for holders in self._few_holders(own, others):
                lost = {record.key for record in holders}
                if self._named(own, [record for record in others if record.key not in lost], now) is not None:
                    guarded |= {record.key: record for record in holders}
        return list(guarded.values())

    def _few_holders(self, own: PeerRecord, others: Sequence[PeerRecord]) -> list[list[PeerRecord]]:
        """The servers of each block that one to `FEW` other peers serve; each group of servers once."""
        groups: dict[frozenset[PublicKey], list[PeerRecord]] = {}
        serving = [record for record in others if record.serves]
        edges = sorted({edge for record in serving for edge in (record.start, record.end)} | {own.start, own.end})
        for block in edges:  # all blocks between two edges have the same servers
            holders = [record for record in serving if record.start <= block < record.end]
            if 0 < len(holders) <= FEW and not own.start <= block < own.end:
                groups[frozenset(record.key for record in holders)] = holders
        return list(groups.values())

    def _named(self, own: PeerRecord, others: Sequence[PeerRecord], now: float) -> PeerMove | None:
        """The best move of the swarm, if it is a move of this peer."""
        if not own.max_blocks:
            return None
        present = [own, *(record for record in others if record.serves or record.moving_to)]
        move = best_move(
            [facts_of(record, self._position_bytes) for record in present],
            self._num_blocks,
            max_blocks={record.key.text: record.max_blocks for record in present if record.max_blocks},
            willingness=Willingness(
                sessions={record.key.text: record.sessions for record in present},
                settled_s={record.key.text: now - record.placed_at for record in present},
            ),
            moving={record.key.text: record.moving_to for record in others if record.moving_to},
        )
        return move if move is not None and move.peer == own.key.text else None


class HolderWatch:
    """Keeps links to some peers, pings them, and records their answers. Thread-safe."""

    def __init__(self, links: NextHops, state: Callable[[Endpoint], LinkState]) -> None:
        self._links = links
        self._state = state
        self._heard_at: dict[Endpoint, float | None] = {}  # time of the last answer; None: no answer yet
        self._lock = threading.Lock()

    def watch_holders(self, records: Iterable[PeerRecord]) -> None:
        """Watches the first `MAX_WATCHED` of these peers, and no other peers."""
        wanted = list(dict.fromkeys(record.endpoint for record in records))[:MAX_WATCHED]
        with self._lock:
            for endpoint in [endpoint for endpoint in self._heard_at if endpoint not in wanted]:
                del self._heard_at[endpoint]
                self._links.release(endpoint)
            for endpoint in wanted:
                if endpoint not in self._heard_at and self._links.acquire(endpoint):
                    self._heard_at[endpoint] = None

    def message_received(self, endpoint: Endpoint, now: float) -> None:
        with self._lock:
            if endpoint in self._heard_at:
                self._heard_at[endpoint] = now

    def gone(self, now: float) -> frozenset[PublicKey]:
        """The watched peers that have answered and then become silent."""
        with self._lock:
            return frozenset(
                endpoint.key
                for endpoint, at in self._heard_at.items()
                if at is not None
                and now - at > (HOLDER_SILENT_S if self._state(endpoint) is LinkState.UP else HOLDER_LOST_S)
            )


@dataclass(eq=False)
class Relocation:
    """Looks at the swarm regularly, and moves the peer to blocks that need it more. Thread-safe."""

    mover: Mover
    watch: HolderWatch  # knows lost peers before their records expire
    leaving: threading.Event  # set when the peer ends
    own: Callable[[], PeerRecord]
    others: Callable[[], Sequence[PeerRecord]]  # looks up all other records
    publish: Callable[[], None]  # announces this peer's record at once
    move: Callable[[Blocks, bool], None]  # makes the peer serve other blocks; True: at once, as blocks have no server
    leave: Callable[[PeerRecord, Sequence[PeerRecord]], bool | None] = lambda own, others: False
    """Changes to another model with more demand; returns True: the peer has changed, None: it will change soon."""

    def __post_init__(self) -> None:
        self._gone: frozenset[PublicKey] = frozenset()
        self._issued: dict[PublicKey, float] = {}  # times of the lost peers' records at their loss
        self._heard_of: set[tuple[PublicKey, Blocks]] = set()  # announced moves of other peers
        self._pause_s = QUICK_LOOK_S
        self.lock = threading.Lock()  # prevents moves
        self._thread = threading.Thread(target=self._look_often, name="splitnet-place", daemon=True)
        self.start = self._thread.start

    def join(self) -> None:
        """Waits for the end of the thread, after `leaving` was set."""
        if self._thread.ident is not None:
            self._thread.join()

    def reconsider(self) -> bool:
        """Moves to other blocks if the swarm needs this peer there more; returns whether it has moved."""
        with self.lock:
            if self.leaving.is_set():
                return False
            before, own, others = self.mover.intended, self.own(), self.others()
            now = time.time()
            present = self._present_peers(others)
            span = self.mover.decide(own, present, now)
            if span is not None:
                self.move(span, self.mover.lacking)
                return True
            leaves = self.mover.intended is None and self.leave(own, present)
            if leaves:
                return True
            lost = [record for record in others if record.key in self._gone]
            # In a small swarm every peer watches all others: the peer that would move may be lost as well.
            rest = others if len(others) <= MAX_WATCHED else ()
            self.watch.watch_holders([*lost, *self.mover.guarded(own, present, now), *rest])
            announced = {(record.key, record.moving_to) for record in others if record.moving_to and record.serves}
            # A peer with an announced move waits for newer records of other peers.
            if self.mover.intended != before or announced - self._heard_of:
                self.publish()
            least_s, per_peer_s = (
                (URGENT_LOOK_S, URGENT_LOOK_PER_PEER_S) if self.mover.lacking else (QUICK_LOOK_S, LOOK_PER_PEER_S)
            )
            self._pause_s = min(LOOK_S, max(least_s, per_peer_s * len(others))) if leaves is not None else QUICK_LOOK_S
            self._heard_of = announced
            return False

    def _present_peers(self, others: Sequence[PeerRecord]) -> list[PeerRecord]:
        """The records of peers that are not lost; a record that is newer than the loss proves its peer present."""
        self._gone = self.watch.gone(time.monotonic())
        self._issued = {
            record.key: self._issued.get(record.key, record.issued_at) for record in others if record.key in self._gone
        }
        return [record for record in others if record.issued_at > self._issued.get(record.key, 0.0)]

    def _look_often(self) -> None:
        look_at = time.monotonic() + QUICK_LOOK_S
        while not self.leaving.wait(CHECK_S):
            if time.monotonic() < look_at and self.watch.gone(time.monotonic()) == self._gone:
                continue
            try:
                self.reconsider()
            except SplitnetError as error:
                log.warning("could not look for better blocks to serve: %s", error)
            # Peers look at random times, so that the later of two peers sees the announcement of the other.
            look_at = time.monotonic() + self._pause_s * random.uniform(0.5, 1.5)
