"""Records of the directory as facts for the planner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from scheduler.coordinates import DIMENSIONS, Coordinate
from scheduler.network import CLIENT, Link, Network, Place
from scheduler.swarm import Peer, Speed
from splitnet.net.records import KEY_PREFIX_BYTES, PeerRecord


def facts_of(record: PeerRecord, position_bytes: float = 0.0) -> Peer:
    """What the planner needs to know of a peer.

    position_bytes: that a position takes on links, where `Peer.sending_ms` is asked for.
    """
    return Peer(
        id=record.key.text,
        start=record.start,
        end=record.end,
        speed=Speed(record.block_ms),
        queue_ms=record.queue_ms,
        batch=record.batch,
        kv_free=record.kv_free_positions,
        watts=record.watts,
        sending_ms=position_bytes / record.bytes_per_ms if record.bytes_per_ms else 0.0,
    )


def expected_facts_of(record: PeerRecord, position_bytes: float = 0.0) -> Peer:
    """The same once the peer is where it moves to."""
    facts = facts_of(record, position_bytes)
    return replace(facts, start=record.moving_to[0], end=record.moving_to[1]) if record.moving_to else facts


def place_of(record: PeerRecord) -> Place:
    """Where a peer says that it stands."""
    coordinate = Coordinate(record.coordinate[:DIMENSIONS], record.coordinate[DIMENSIONS], record.coordinate_error)
    return Place(coordinate, record.bytes_per_ms)


def places_of(records: Iterable[PeerRecord]) -> dict[str, Place]:
    """Where peers stand, of those that know it."""
    return {record.key.text: place_of(record) for record in records if record.coordinate_error < 1.0}


def network_of(
    records: Iterable[PeerRecord], links: Mapping[tuple[str, str], Link], places: Mapping[str, Place]
) -> Network:
    """The links between peers as their records tell.

    What a peer has measured to another counts for the way back too, unless the other has measured that itself.

    Args:
        records: of all peers.
        links: measured by whoever plans; they count more than what is told.
        places: of others than the peers, such as the client.
    """
    records = list(records)
    to = {receiver: link.latency_ms for (sender, receiver), link in links.items() if sender == CLIENT}
    names = {record.key.raw[:KEY_PREFIX_BYTES]: record.key.text for record in records}
    there: dict[tuple[str, str], Link] = {}
    back: dict[tuple[str, str], Link] = {}
    for record in records:
        for seen in record.links:
            other = names.get(seen.peer)
            if other is not None and other != record.key.text:
                # The way from here to the one and on to the other is no shorter than the way from here to the other.
                ends = (to.get(record.key.text), to.get(other))
                least_ms = abs(ends[0] - ends[1]) if ends[0] is not None and ends[1] is not None else 0.0
                link = Link(max(seen.rtt_ms / 2, least_ms), seen.bytes_per_ms)
                there[record.key.text, other] = back[other, record.key.text] = link
    return Network({**back, **there, **links}, places={**places_of(records), **places})
