"""Records of the directory as facts for the planner."""

from __future__ import annotations

from scheduler.swarm import Peer
from splitnet.net.records import PeerRecord


def facts_of(record: PeerRecord) -> Peer:
    """What the planner needs to know of a peer."""
    return Peer(
        id=record.key.text,
        start=record.start,
        end=record.end,
        decode_ms=record.decode_ms_per_block,
        prefill_ms=record.prefill_ms_per_block_token,
        queue_ms=record.queue_ms,
        kv_free=record.kv_free_positions,
    )
