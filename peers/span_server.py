"""The blocks that a peer serves now; it leaves them for others when it moves."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

from peers.admission import KeyPolicy, SessionTable
from peers.counters import Counters
from peers.engine import Engine
from peers.links import NextHops, Outbox
from peers.options import PeerOptions
from peers.queue import WorkQueue
from peers.service import SessionService
from peers.sessions import AHEAD, TENSOR_BYTES, MemoryAccount, ServedBlocks
from peers.speed import KnownSpeeds, ObservedSpeed, measure_speed
from scheduler.load import Load
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import OutOfMemory, SplitnetError
from splitnet.quant.device import end_threads
from splitnet.quant.memory import give_back_memory
from splitnet.wire.codecs import DEFAULT_INT8, codec_by_name

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


log = logging.getLogger(__name__)

MOVE_DRAIN_S = 15.0
"""How long a peer that moves waits for its sessions to be taken over."""


class CurrentSpan:
    """Serves one span at a time, under the same links and counters.

    Args:
        checkpoint: the model.
        span: the first one.
        options: how to serve.
        outbox: where messages go.
        next_hops: the links to other peers.
        counters: what the peer counts.
        leaving: set when the peer ends.
        policy: what keys are granted; None: all, alike.

    Attributes:
        service: what answers messages; while the peer moves that of the blocks that it has left.
        placed_at: since when these blocks are served, Unix time in seconds.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: Span,
        options: PeerOptions,
        outbox: Outbox,
        next_hops: NextHops,
        counters: Counters,
        leaving: threading.Event,
        policy: KeyPolicy | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._outbox = outbox
        self._next_hops = next_hops
        self._counters = counters
        self._leaving = leaving
        self._policy = policy
        self._server: SpanServer | None = self._server_of(span)
        self.service: SessionService = self._server.service
        self.placed_at = time.time()

    @property
    def server(self) -> SpanServer:
        """Raises SplitnetError while the peer moves to other blocks."""
        if self._server is None:
            raise SplitnetError("this peer is moving to other blocks: try again when it serves them")
        return self._server

    def start(self) -> None:
        """Begins to compute."""
        self.server.start()

    def run_here(self) -> None:
        """See `Engine.run_here`; does nothing while the peer moves."""
        if (server := self._server) is not None:
            server.run_here()

    def remeasure_if_idle(self) -> None:
        """See `SpanServer.remeasure_if_idle`; does nothing while the peer moves."""
        if self._server is not None:
            self._server.remeasure_if_idle()

    def drain(self, timeout_s: float) -> None:
        """See `SpanServer.drain`."""
        if self._server is not None:
            self._server.drain(timeout_s)

    def close(self) -> None:
        """Stops computing and ends all sessions."""
        if self._server is not None:
            self._server.close()

    def change_to(self, start: int, end: int, drain_s: float = MOVE_DRAIN_S) -> bool:
        """Hands the sessions over, then serves blocks `[start, end)`, or the old ones if these cannot be loaded.

        Args:
            start, end: the new blocks.
            drain_s: how long to wait for the sessions to be taken over, in seconds.

        Returns:
            False if the peer ends before it serves.
        """
        server = self.server
        old = server.span.start, server.span.end
        blocks = {"former_blocks": "{}:{}".format(*old), "blocks": f"{start}:{end}"}
        log.warning("moving from blocks %d..%d to %d..%d", old[0], old[1] - 1, start, end - 1, extra=blocks)
        server.drain(drain_s)
        speed = server.speed
        server.close()
        # The memory of the old blocks is needed for the new ones. Until those serve, the old service says so.
        self._server = server = None
        give_back_memory()
        try:
            self._load_and_serve(start, end, speed)
        except IsLeaving:
            return False
        except Exception:
            log.exception("could not load blocks %d..%d, going back", start, end - 1)
            self._load_and_serve(*old, speed)
        else:
            self._counters.moves += 1
        return True

    def _load_and_serve(self, start: int, end: int, speed: ObservedSpeed) -> None:
        def go_on(*_: int) -> None:
            if self._leaving.is_set():
                raise IsLeaving

        options = self._options
        span = Span.load(
            self._checkpoint,
            start,
            end,
            device=options.device,
            dtype=options.dtype,
            weights=options.weights,
            progress=go_on,
        )
        # All blocks of a model are about as fast. To time these takes seconds, so that waits until nobody needs them.
        server = self._server_of(span, speed)
        server.start()
        self._server, self.service = server, server.service
        self.placed_at = time.time()

    def _server_of(self, span: Span, speed: ObservedSpeed | None = None) -> SpanServer:
        options = self._options
        known = KnownSpeeds(options.speeds_file) if options.speeds_file is not None else None
        if speed is None and known is not None:
            speed = known.find(span, self._checkpoint.fingerprint)
        server = SpanServer(
            self._checkpoint,
            span,
            self._outbox,
            self._next_hops,
            kv_memory=options.kv_memory,
            training_memory=options.training_memory,
            idle_s=options.idle_s,
            counters=self._counters,
            policy=self._policy,
            speed=speed,
        )
        if known is not None:
            server.speed.on_measured = lambda: known.keep(span, self._checkpoint.fingerprint, server.speed)
            if speed is None:
                server.speed.on_measured()
        return server


class IsLeaving(Exception):
    """The peer was told to end while it was getting or loading blocks."""
