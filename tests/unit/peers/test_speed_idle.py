"""The device is measured while a peer is idle, beside nothing else that uses its blocks."""

from __future__ import annotations

import threading
import time
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from peers import engine, running_peer
from peers.counters import Counters
from peers.peer_links import NextHops
from peers.peer_options import PeerOptions
from peers.queue import WorkQueue
from peers.running_peer import SpanServer
from peers.sessions import PassWork, QueueState, SessionTable
from peers.speed import ObservedSpeed
from scheduler.facts import CONTEXTS, ContextCost
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.wire.messages import FetchKV
from tests.unit.random_models import random_checkpoint

WAIT_S = 30.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Its rotary embedding keeps frequencies that change with the length of what passes."""
    rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    folder = tmp_path_factory.mktemp("models") / "dynamic"
    return Checkpoint.open(random_checkpoint("llama", folder, rope_parameters=rope, max_position_embeddings=16))


def server_of(checkpoint: Checkpoint, span: Span) -> SpanServer:
    outbox = Mock()
    return SpanServer(
        checkpoint,
        span,
        ObservedSpeed((1.0,) * 5),
        outbox,
        NextHops(outbox),
        PeerOptions(kv_memory=1 << 20, training_memory=0),
        Counters(),
        sign=bytes,
    )


def test_an_idle_span_is_measured_by_the_thread_that_uses_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_peer, "FIRST_REMEASURE_S", -1.0)
    span = Span.load(checkpoint, 0, 1)
    peer = server_of(checkpoint, span)
    forward, threads, measured = span.forward, set[str](), threading.Event()

    def seen(hidden: torch.Tensor, parts: Any) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        if len(hidden) == 256:
            measured.set()
        return forward(hidden, parts)

    monkeypatch.setattr(span, "forward", seen)
    peer.engine.start()
    try:
        peer.remeasure_if_idle()
        assert measured.wait(WAIT_S)
    finally:
        peer.close()
    assert threads == {"splitnet-engine"}


@pytest.mark.parametrize(("interrupted", "room"), [(False, True), (True, True), (False, False)])
def test_what_reading_takes_is_measured_again_if_nobody_waits_and_there_is_memory(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, interrupted: bool, room: bool
) -> None:
    peer = server_of(checkpoint, Span.load(checkpoint, 0, 1))
    before = peer.speed.past = ContextCost(((1.0, 2.0),))
    monkeypatch.setattr(SessionTable, "free_positions", property(lambda self: CONTEXTS[0] - (not room)))
    monkeypatch.setattr(engine, "measure_speed", lambda *_: ObservedSpeed((1.0,) * 5))
    # Work comes as soon as the first length is to be timed.
    monkeypatch.setattr(WorkQueue, "has_work", property(lambda self: interrupted))
    peer.engine._measure()
    peer.close()
    assert (peer.speed.past is before) == (interrupted or not room)
    assert len(peer.speed.past.ms) == 1


def test_memory_that_a_pass_has_left_is_given_back_before_the_device_is_idle_for_long(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, trimmed = list[str](), threading.Event()
    monkeypatch.setattr(
        running_peer, "trim_memory", lambda: (threads.append(threading.current_thread().name), trimmed.set())
    )
    peer = server_of(checkpoint, Span.load(checkpoint, 0, 1))
    peer.engine.start()
    try:
        monkeypatch.setattr(running_peer, "TRIM_S", -1.0)
        peer.remeasure_if_idle()
        assert not trimmed.wait(0.1), "no pass has run"
        closed = Mock(owner=bytes(32), queue_state=QueueState(), closed=True)
        peer.service.queue.put_pass(PassWork(closed, Mock(spec=FetchKV), Mock(), time.monotonic()))
        until = time.monotonic() + WAIT_S
        while not trimmed.wait(0.02):
            assert time.monotonic() < until
            peer.remeasure_if_idle()
    finally:
        peer.close()
    assert set(threads) == {"splitnet-engine"}


def test_one_sequence_at_a_time_passes_where_frequencies_depend_on_it(checkpoint: Checkpoint) -> None:
    span = Span.load(checkpoint, 0, 2)
    [rope] = [module for module in span._backbone.modules() if hasattr(module, "rope_type")]
    alone: list[bool] = []
    rope.register_forward_pre_hook(lambda *_: alone.append(span._ropes._lock.locked()))
    for some in (span, span.view(0, 1)):
        some.forward(torch.randn(8, span.hidden_size), [RowChunk(some.new_row(), 0, 8)])
        assert some._ropes is span._ropes
    assert alone
    assert all(alone)
    assert not span._ropes._lock.locked()
