"""The blocks that a peer serves now; it leaves them for others when it moves."""

from __future__ import annotations

import logging
import threading
import time

from peers.counters import Counters
from peers.key_policy import KeyPolicy
from peers.known_speeds import KnownSpeeds
from peers.next_hops import NextHops
from peers.options import PeerOptions
from peers.outbox import Outbox
from peers.session_service import SessionService
from peers.span_server import SpanServer
from peers.speed import ObservedSpeed
from splitnet.errors import SplitnetError
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.memory import give_back_memory
from splitnet.model.span import Span

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
