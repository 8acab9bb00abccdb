"""Which blocks a peer takes when it joins."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

import torch

from scheduler.coordinates import Coordinate
from scheduler.placement import BLOCKS_SHARE, block_ms, choose_span, work_ms
from splitnet.errors import OutOfMemory, SplitnetError
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.span import block_bytes, free_memory
from splitnet.net.codecs import codec_by_name
from splitnet.net.facts import expected_facts_of, place_of
from splitnet.net.identity import Identity
from splitnet.net.peer_links import PeerLinks
from splitnet.net.prober import PING_TIMEOUT_S, PROBE_BYTES
from splitnet.net.records import PeerRecord

LINK_CODEC = "int8"

TRIED_AT_ONCE = 32
WITNESSES = 5
"""Of those that answer first, the nearest: by what most of them say of their places, who else is near is judged."""
PROBED = 4
"""Of those that answer: so many are sent 64 KiB, to know what this machine can send."""

READ_BYTES = 32 * 2**20
READS = 3
"""Of memory, the fastest of which tells how fast the device reads."""


@dataclass(frozen=True)
class SpanWish:
    """What the user asked for: exact blocks, or memory in bytes for them, or neither."""

    blocks: tuple[int, int] | None = None
    memory: int | None = None


ANY_SPAN = SpanWish()


def fitting_blocks(
    checkpoint: Checkpoint, wish: SpanWish, *, device: str, dtype: str | None, weights: str | None = None
) -> int:
    """How many blocks the peer has memory for; 0 if it was told which blocks to serve, and so must stay with them.

    Args:
        device, dtype, weights: as `Span.load` takes them.

    Raises:
        OutOfMemory: not even one block fits.
        WeightsError: weights cannot be held so.
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


def expected_block_ms(checkpoint: Checkpoint, *, device: str, dtype: str | None, weights: str | None = None) -> float:
    """Ms of a token at a block, as the device reads memory: a guess before anything is loaded, good for comparisons."""
    values = torch.zeros(READ_BYTES // 4, dtype=torch.float32, device=device)
    took_s = math.inf
    for _ in range(READS):
        began = time.perf_counter()
        float(values.sum())
        took_s = min(took_s, time.perf_counter() - began)
    return block_bytes(checkpoint, dtype, weights, device) * took_s * 1000 / READ_BYTES


@dataclass(frozen=True)
class Present:
    """Peers that are there. away_ms: one way to each, by name; bytes_per_ms: that can be sent to them; 0: not known."""

    records: Sequence[PeerRecord] = ()
    away_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    bytes_per_ms: float = 0.0


NOBODY = Present()


def answering(records: Sequence[PeerRecord], identity: Identity) -> Present:
    """Those of the peers that answer, of many a sample: anybody can announce peers that do not exist.

    First such whose keys have cost work; then those that stand near, by what the nearest that have answered say.
    """
    records = [record for record in records if record.key != identity.public]  # of an earlier life of this peer
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
        probed = links.prober.measure(record.endpoint for _, record in found[:PROBED])
    slowest = PROBE_BYTES / (1000 * PING_TIMEOUT_S) if found else 0.0  # none has arrived in time
    return Present(
        [record for _, record in found],
        {record.key.text: rtt_ms / 2 for rtt_ms, record in found},
        max((link.bytes_per_ms for link in probed.values()), default=slowest),
    )


def _far_ms(place: Coordinate, witnesses: Sequence[Coordinate]) -> tuple[bool, float]:
    """How far a place is from most of the others; whose place is not known comes last."""
    return place.error >= 1.0, median_low(place.rtt_ms(each) for each in witnesses)


def choose_blocks(
    checkpoint: Checkpoint, wish: SpanWish, fitting: int, present: Present, own_ms: float | None = None
) -> tuple[int, int]:
    """The blocks `[start, end)` to serve beside the peers that are `present`; at most `fitting` if they are chosen.

    own_ms: of a token at a block of the new peer; None: not known.

    Raises:
        SplitnetError: the blocks asked for do not exist in the model.
    """
    count = checkpoint.num_blocks
    if wish.blocks is None:
        size = position_bytes(checkpoint)
        peers = [expected_facts_of(record, size) for record in present.records]
        if own_ms is not None and peers:
            # Arithmetic takes what it takes at the peer that is most like this one.
            nearness = [abs(math.log(_positive(peer.speed.at(1)) / _positive(own_ms))) for peer in peers]
            alike = peers[nearness.index(min(nearness))].speed
            own_ms *= work_ms(alike) / _positive(alike.at(1))
            own_ms = float(block_ms(own_ms, fitting, size / present.bytes_per_ms if present.bytes_per_ms else 0.0))
        return choose_span(peers, count, fitting, own_ms, present.away_ms)
    start, end = wish.blocks
    if not 0 <= start < end <= count:
        raise SplitnetError(f"{checkpoint.name} has blocks 0..{count - 1}: use --blocks START:END within 0:{count}")
    return start, end


def position_bytes(checkpoint: Checkpoint) -> int:
    """What a position takes on slow links, which are those that count where peers choose their blocks."""
    return codec_by_name(LINK_CODEC).bytes_per_position(checkpoint.hidden_size)


def _positive(ms: float) -> float:
    return max(ms, 1e-6)
