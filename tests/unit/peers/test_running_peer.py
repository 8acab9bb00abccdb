"""What serves a span is given memory for one sequence at least."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from peers.counters import Counters
from peers.peer_links import NextHops
from peers.peer_options import PeerOptions
from peers.running_peer import SpanServer
from peers.sessions import TENSOR_BYTES
from peers.speed import ObservedSpeed
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import OutOfMemory
from splitnet.wire.codecs import DEFAULT_INT8, codec_by_name
from tests.unit.random_models import HYBRIDS, random_checkpoint


def test_memory_for_less_than_the_states_of_one_sequence_is_refused(tmp_path: Path) -> None:
    checkpoint, outbox = Checkpoint.open(random_checkpoint("lfm2", tmp_path, **HYBRIDS["lfm2"])), Mock()
    span = Span.load(checkpoint, 0, 3)

    def serve(kv_memory: int) -> SpanServer:
        return SpanServer(
            checkpoint,
            span,
            ObservedSpeed((1.0,) * 5),
            outbox,
            NextHops(outbox),
            PeerOptions(kv_memory=kv_memory, training_memory=0),
            Counters(),
            sign=bytes,
        )

    with pytest.raises(OutOfMemory, match=r"blocks 0:3 .*--kv-memory"):
        serve(span.state_bytes)
    row_bytes = span.state_bytes + 3 * 2 * TENSOR_BYTES
    logged = codec_by_name(DEFAULT_INT8).bytes_per_position(span.hidden_size)
    assert serve(row_bytes + 2 * (span.kv_bytes_per_position + logged)).service.sessions.free_positions == 1
