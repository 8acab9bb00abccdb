"""A span with all that serves it: while a peer stays where it is, it has one of these."""

from __future__ import annotations

import time
from functools import partial

from peers.admission import SessionTable
from peers.counters import Counters
from peers.engine import Engine
from peers.key_policy import KeyPolicy
from peers.memory_account import TENSOR_BYTES, MemoryAccount
from peers.next_hops import NextHops
from peers.outbox import Outbox
from peers.row_memory import AHEAD
from peers.served_blocks import ServedBlocks
from peers.session_service import SessionService
from peers.speed import ObservedSpeed, measure_speed
from peers.work_queue import WorkQueue
from scheduler.load import Load
from splitnet.errors import OutOfMemory
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.openmp import end_threads
from splitnet.model.span import Span
from splitnet.net.codecs import DEFAULT_INT8, codec_by_name

FIRST_REMEASURE_S = 20.0

LEAST_STEP_MEMORY = 128 * 2**20
"""Bytes for steps that wait for the device; half of the KV memory if that is more. One key gets half of them."""


class SpanServer:
    """Sessions, queue and engine of one span.

    Args:
        checkpoint: the model.
        span: its blocks.
        outbox: where messages go.
        next_hops: the links to other peers.
        kv_memory: bytes for KV caches; None: a quarter of the free memory.
        training_memory: bytes to keep for clients that train; None: an eighth of the free memory.
        idle_s: seconds until an idle session is dropped.
        counters: what the peer counts.
        policy: what keys are granted; None: all, alike.
        speed: of the device, as far as it is known; None: it is measured now.

    Raises:
        OutOfMemory: `kv_memory` is less than the states of one sequence take.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: Span,
        outbox: Outbox,
        next_hops: NextHops,
        *,
        kv_memory: int | None,
        training_memory: int | None,
        idle_s: float,
        counters: Counters,
        policy: KeyPolicy | None = None,
        speed: ObservedSpeed | None = None,
    ) -> None:
        if kv_memory is not None and kv_memory <= span.state_bytes != 0:
            raise OutOfMemory(
                f"the states of a sequence in blocks {span.start}:{span.end} take {span.state_bytes / 2**20:.1f} MiB, "
                f"{kv_memory / 2**20:.1f} MiB are given for KV caches: use --kv-memory with more, or fewer blocks"
            )
        self.span = span
        if speed is None:
            with counters.energy.computing():
                speed = measure_speed(span)
        assert speed is not None
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
            weight=policy.weight,
            most=lambda key: policy.options_of(key).kv,
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
        self._engine = Engine(span, self.service, self.queue, self.speed, self.load, counters)
        self._measured_at = time.monotonic()
        self._measure_after_s = FIRST_REMEASURE_S

    def start(self) -> None:
        """Begins to compute. From now on `run_here` is called after messages were received.

        Call it from the thread that has loaded the blocks, which computes no more.
        """
        end_threads()
        self.queue.defers = True
        self._engine.start()

    def run_here(self) -> None:
        """See `Engine.run_here`."""
        self._engine.run_here()

    def remeasure_if_idle(self) -> None:
        """Times the device again if nobody has used it since: at the start others may have kept the machine busy.

        The longer that stays so, the more rarely.
        """
        now = time.monotonic()
        last = max(self._measured_at, self.load.last_at)
        if now - last > self._measure_after_s and not self.queue.has_work:
            self._engine.measure_when_idle()
            self._measured_at = now
            self._measure_after_s *= 2

    def drain(self, timeout_s: float) -> None:
        """Takes no new sessions, and hands the running ones over: their clients replace this peer, as it is told them.

        Returns when no session is in use any more, or after `timeout_s` seconds. The clients of idle ones find out when
        they go on.
        """
        self.service.leave()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.service.in_use(time.monotonic()):
            self.sessions.wait_for_end(0.2)

    def close(self) -> None:
        """Stops computing, after the pass that is running, and ends all sessions."""
        self._engine.close()
        self.service.forget_all()
