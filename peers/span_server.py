"""One span and all that serves it: sessions with their memory, the queue, the service and the engine."""

from __future__ import annotations

import time
from functools import partial

from peers.admission import KeyPolicy, MemoryAccount, ServedBlocks, SessionTable
from peers.counters import Counters
from peers.engine import Engine
from peers.links import NextHops, Outbox
from peers.queue import WorkQueue
from peers.service import SessionService
from peers.sessions import AHEAD, TENSOR_BYTES
from peers.speed import ObservedSpeed
from scheduler.load import Load
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import OutOfMemory
from splitnet.wire.codecs import DEFAULT_INT8, codec_by_name

FIRST_REMEASURE_S = 20.0

LEAST_STEP_MEMORY = 128 * 2**20
"""Bytes for steps that wait for the device; half of the KV memory if that is more. One key gets half of them."""


class SpanServer:
    """Serves one span; a peer that moves makes another one.

    Args:
        checkpoint: the model.
        span: its blocks.
        speed: of the device.
        outbox: where messages go.
        next_hops: the links to other peers.
        kv_memory: bytes for KV caches; None: a quarter of the free memory.
        training_memory: bytes to keep for clients that train; None: an eighth of the free memory.
        idle_s: seconds until an idle session is dropped.
        counters: what the peer counts.
        policy: what keys are granted; None: all, alike.

    Raises:
        OutOfMemory: `kv_memory` is less than the states of one sequence take.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: Span,
        speed: ObservedSpeed,
        outbox: Outbox,
        next_hops: NextHops,
        *,
        kv_memory: int | None,
        training_memory: int | None,
        idle_s: float,
        counters: Counters,
        policy: KeyPolicy | None = None,
    ) -> None:
        if kv_memory is not None and kv_memory <= span.state_bytes != 0:
            raise OutOfMemory(
                f"the states of a sequence in blocks {span.start}:{span.end} take {span.state_bytes / 2**20:.1f} MiB, "
                f"{kv_memory / 2**20:.1f} MiB are given for KV caches: use --kv-memory with more, or fewer blocks"
            )
        self.span = span
        self.speed = speed
        self.load = Load()
        policy = policy or KeyPolicy()
        if kv_memory is None:
            kv_memory = span.free_memory() // 4
        keeps_logs = span.end < checkpoint.num_blocks
        usual = codec_by_name(DEFAULT_INT8).bytes_per_position(checkpoint.hidden_size)
        self.sessions = SessionTable(
            kv_memory,
            idle_s=idle_s,
            position_bytes=span.kv_bytes_per_position,
            row_bytes=span.state_bytes + 2 * TENSOR_BYTES * (span.end - span.start),
            usual_log_bytes=usual if keeps_logs else 0,
            ahead=AHEAD,
            num_blocks=checkpoint.num_blocks,
            keys=policy.keys,
        )
        self.queue = WorkQueue(
            partial(self.speed.pass_s, blocks=span.end - span.start),
            policy.weight,
            MemoryAccount(
                max(LEAST_STEP_MEMORY, kv_memory // 2), "no memory for waiting steps of", "send fewer at a time"
            ),
            outbox.unsent,
        )
        served = ServedBlocks(
            model=checkpoint.fingerprint,
            start=span.start,
            end=span.end,
            num_blocks=checkpoint.num_blocks,
            hidden_size=checkpoint.hidden_size,
            max_positions=checkpoint.max_positions,
            weights=span.weights.text,
        )
        if training_memory is None:
            training_memory = span.free_memory() // 8
        self.service = SessionService(
            served,
            self.sessions,
            self.queue,
            outbox,
            next_hops,
            training_memory=training_memory,
            counters=counters,
            policy=policy,
            load=self.load,
        )
        self.engine = Engine(span, self.service, self.queue, self.speed, self.load, counters)
        self._measured_at = time.monotonic()
        self._measure_after_s = FIRST_REMEASURE_S

    def remeasure_if_idle(self) -> None:
        """Times the device again if it was idle since: at the start other processes may have kept the machine busy.

        The longer it stays idle, the more rarely.
        """
        now = time.monotonic()
        last = max(self._measured_at, self.load.last_at)
        if now - last > self._measure_after_s and not self.queue.has_work:
            self.engine.measure_when_idle()
            self._measured_at = now
            self._measure_after_s *= 2

    def drain(self, timeout_s: float) -> None:
        """Takes no new sessions, and tells the clients of the running ones to replace this peer.

        Returns when no session is in use any more, or after `timeout_s` seconds. Clients of idle sessions notice when
        they go on.
        """
        self.service.leave()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.service.in_use(time.monotonic()):
            self.sessions.wait_for_end(0.2)

    def close(self) -> None:
        """Stops computing, after the pass that is running, and ends all sessions."""
        self.engine.close()
        self.service.forget_all()
