"""Metrics of a peer for Prometheus: its counters, its state at the moment of a scrape, and the server of both."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from socketserver import ThreadingTCPServer
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from peers.counters import OTHER_CODEC, Counters, Histogram
from peers.server import Peer, SpanServer
from peers.service import SessionService
from peers.sessions import Purpose
from scheduler import facts as swarm
from scheduler.cost import hop_joules
from splitnet.errors import AddressInUse, SplitnetError
from splitnet.version import __version__
from splitnet.wire.codecs import CODECS

log = logging.getLogger(__name__)

PATH = "/metrics"
REQUEST_S = 5.0  # how long a connection lasts at most
MOST_CONNECTIONS = 16  # at the same time: for one more the oldest ends
Label = TypeVar("Label", bound=str)

_CODEC_NAMES = {codec.code: name for name, codec in CODECS.items()} | {OTHER_CODEC: "other"}
_LINKS = {False: "incoming", True: "outgoing"}


@dataclass(frozen=True, slots=True)
class Present:
    """What is true of a peer now."""

    info: dict[str, str]
    serves: bool  # takes new sessions
    blocks: int
    sessions: int
    kv_reserved_bytes: int
    kv_free_bytes: int
    session_bytes: dict[Purpose, int]
    kv_cached_bytes: int
    queued_positions: int
    queued_pass_positions: int
    training_used_bytes: int
    training_free_bytes: int
    refused_connections: int
    ended_connections: Mapping[str, int]
    dropped_messages: int
    buffer_bytes: Mapping[str, int]
    token_joules: float  # of a decoded token in all blocks; 0: not known
    relays: int  # helpers through which it is reached
    tunnelled: int
    helped_peers: int
    helped_streams: int
    helped_bytes: int

    @classmethod
    def of(cls, peer: Peer) -> Present:
        """Of a running peer; while it moves it has no blocks."""
        try:
            server = peer.server
        except SplitnetError:
            server = None
        service, helper, transport = peer.service, peer.ways.helper, peer.transport
        table, memory = service.sessions, service.training_memory
        return cls(
            info={
                "peer": peer.identity.public.text,
                "model": peer.checkpoint.name,
                "blocks": f"{server.span.start}:{server.span.end}" if server is not None else "",
                "weights": server.span.weights.kind if server is not None else "",
                "device": str(server.span.device) if server is not None else "",
                "version": __version__,
            },
            serves=server is not None and not service.leaving,
            blocks=server.span.end - server.span.start if server is not None else 0,
            sessions=len(table),
            kv_reserved_bytes=table.memory.used,
            kv_free_bytes=table.memory.free,
            session_bytes={
                purpose: sum(account.used_for(purpose) for account in (table.memory, service.queue.memory, memory))
                for purpose in Purpose
            },
            kv_cached_bytes=_cached_bytes(service, server),
            queued_positions=service.queue.queued_positions,
            queued_pass_positions=service.queue.pass_positions,
            training_used_bytes=memory.used,
            training_free_bytes=memory.free,
            refused_connections=transport.refused_connections,
            ended_connections=dict(transport.connections.ended),
            dropped_messages=transport.sending.refused,
            buffer_bytes={
                "received": transport.receiving.used,
                "sent": transport.sending.used,
                "received_limit": transport.receiving.limit,
                "sent_limit": transport.sending.limit,
            },
            token_joules=_token_joules(peer, server),
            relays=len(peer.ways.relays),
            tunnelled=peer.ways.hidden.streams.taken,
            helped_peers=helper.reservations if helper is not None else 0,
            helped_streams=helper.streams.taken if helper is not None else 0,
            helped_bytes=helper.passed_bytes if helper is not None else 0,
        )


class PeerMetrics(Collector):
    """Makes metrics of what a peer counts, at each scrape.

    Args:
        counters: of the peer.
        present: what is true now.
    """

    def __init__(self, counters: Counters, present: Callable[[], Present]) -> None:
        self._counters = counters
        self._present = present

    def collect(self) -> Iterable[Metric]:
        counters, now = self._counters, self._present()
        work, passes = counters.work, counters.passes
        yield InfoMetricFamily("splitnet_peer", "What the peer serves.", now.info)
        yield _gauge("serving", "1: takes new sessions; 0: is leaving or moving to other blocks.", now.serves)
        yield _gauge("blocks", "Blocks that it serves.", now.blocks)
        yield _gauge("sessions", "Open sessions.", now.sessions)
        yield _counter("sessions_opened", "Sessions that were admitted.", counters.opened)
        yield _counters("sessions_ended", "Sessions that have ended, by how.", "cause", counters.ended)
        yield _counters(
            "refused",
            "Requests that were answered with a failure, by its code; connections refused or ended; messages not sent.",
            "cause",
            {code.name.lower(): count for code, count in counters.refused.items()}
            | {"not_authorized": now.refused_connections, "not_sent": now.dropped_messages}
            | {f"connection_{cause}": count for cause, count in now.ended_connections.items()},
        )
        yield _counter("moves", "Moves to other blocks.", counters.moves)
        yield _counters(
            "steps",
            "Steps and passes that were computed, by kind of work.",
            "kind",
            {kind: of.steps for kind, of in work.items()},
        )
        yield _counters(
            "tokens",
            "Positions of tokens that were computed, by kind of work.",
            "kind",
            {kind: of.positions for kind, of in work.items()},
        )
        yield _gauges(
            "queue_tokens",
            "Positions that wait for the device or are on it: of steps, and of training passes.",
            "work",
            {"steps": now.queued_positions, "training": now.queued_pass_positions},
        )
        yield _histograms(
            "queue_wait_seconds",
            "From the arrival of a step or pass until it began.",
            "kind",
            {kind: of.waits for kind, of in work.items()},
        )
        yield _histograms(
            "pass_seconds", "Time of a pass on the device.", "work", {kind: of.seconds for kind, of in passes.items()}
        )
        yield _histograms(
            "pass_tokens",
            "Positions that share a pass, over all sessions.",
            "work",
            {kind: of.positions for kind, of in passes.items()},
        )
        yield _histograms(
            "pass_rows",
            "Rows (sequences) that share a pass, over all sessions.",
            "work",
            {kind: of.rows for kind, of in passes.items()},
        )
        yield _gauges(
            "kv_bytes",
            "Memory for KV caches: reserved by sessions, and free for others.",
            "state",
            {"reserved": now.kv_reserved_bytes, "free": now.kv_free_bytes},
        )
        yield _gauge(
            "kv_cached_bytes", "Keys and values that sessions hold of what they reserved.", now.kv_cached_bytes
        )
        yield _gauges(
            "training_bytes",
            "Memory for clients that train.",
            "state",
            {"used": now.training_used_bytes, "free": now.training_free_bytes},
        )
        yield _gauges(
            "session_bytes",
            "Memory that sessions occupy, by what for.",
            "purpose",
            {purpose.value: size for purpose, size in now.session_bytes.items()},
        )
        yield _gauges(
            "buffer_bytes",
            "Messages in sockets: received and not read yet or not complete, not sent yet, and how much that may be.",
            "state",
            now.buffer_bytes,
        )
        yield _gauge("relays", "Helpers through which the peer is reached; 0: it is reached directly.", now.relays)
        yield _gauge("relayed_connections", "Connections that others have made through helpers.", now.tunnelled)
        yield _gauge("helped_peers", "Hidden peers that are reached through this one.", now.helped_peers)
        yield _gauge("helped_streams", "Streams of others that pass through this peer.", now.helped_streams)
        yield _counter("helped_bytes", "Bytes of others that were passed on.", now.helped_bytes)
        sent, received = counters.traffic.totals()
        yield _bytes("sent_bytes", "Bytes of messages that were sent, by link and codec.", sent)
        yield _bytes("received_bytes", "Bytes of messages that came, by link and codec.", received)
        yield _if_known("watts", "What the device draws while it computes.", counters.energy.watts)
        yield _if_known("token_joules", "Energy of a decoded token in all blocks of the peer.", now.token_joules)
        yield _counter(
            "joules", "Energy of steps and of timing the device, as far as it is known.", counters.energy.joules
        )


def registry_of(peer: Peer) -> CollectorRegistry:
    """The metrics of a running peer."""
    registry = CollectorRegistry()
    registry.register(PeerMetrics(peer.counters, lambda: Present.of(peer)))
    return registry


def _cached_bytes(service: SessionService, server: SpanServer | None) -> int:
    """What rows hold; a session may have fewer blocks than the span."""
    if server is None:
        return 0
    span = server.span
    block_bytes = span.kv_bytes_per_position / (span.end - span.start)
    # Lists at once, as other threads add sessions and rows meanwhile.
    return round(
        sum(
            (session.end - session.start) * row.length * block_bytes + row.state_bytes
            for session in list(service.sessions)
            for row in list(session.rows.values())
        )
    )


def _token_joules(peer: Peer, server: SpanServer | None) -> float:
    if server is None:
        return 0.0
    span, (_, batch) = server.span, server.service.load.at(time.monotonic())
    speed = swarm.Speed(server.speed.block_ms)
    facts = swarm.Peer("", span.start, span.end, speed, batch=batch, watts=peer.counters.energy.watts)
    return hop_joules(facts, span.end - span.start) or 0.0


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(f"splitnet_peer_{name}", help, value)


def _if_known(name: str, help: str, value: float) -> Metric:
    """Without a value where it is 0: nobody knows it."""
    return _gauge(name, help, value) if value else GaugeMetricFamily(f"splitnet_peer_{name}", help)


def _gauges(name: str, help: str, label: str, values: Mapping[Label, float]) -> Metric:
    family = GaugeMetricFamily(f"splitnet_peer_{name}", help, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(f"splitnet_peer_{name}", help, value)


def _counters(name: str, help: str, label: str, values: Mapping[Label, int]) -> Metric:
    family = CounterMetricFamily(f"splitnet_peer_{name}", help, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _bytes(name: str, help: str, totals: Counter[tuple[bool, int]]) -> Metric:
    """All links and codecs, also those that were not used: a rate needs the zero before the first byte."""
    known = Counter({(link, name): 0 for link in _LINKS.values() for name in _CODEC_NAMES.values()})
    for (outgoing, code), size in totals.items():
        # What a sender calls a codec may be none.
        known[_LINKS[outgoing], _CODEC_NAMES.get(code, _CODEC_NAMES[OTHER_CODEC])] += size
    family = CounterMetricFamily(f"splitnet_peer_{name}", help, labels=["link", "codec"])
    for key, size in known.items():
        family.add_metric(list(key), size)
    return family


def _histograms(name: str, help: str, label: str, histograms: Mapping[Label, Histogram]) -> Metric:
    family = HistogramMetricFamily(f"splitnet_peer_{name}", help, labels=[label])
    for key, histogram in histograms.items():
        bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(list(histogram.counts)), strict=True))
        family.add_metric([key], buckets, histogram.total)
    return family


class MetricsServer:
    """Listens from the start, answers once it serves. Use it as a context manager.

    Args:
        host, port: where to listen; port 0: any free one.

    Raises:
        AddressInUse: something else listens there.
        SplitnetError: it is not an address of this machine.
    """

    def __init__(self, host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        try:
            self._http = _Server(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"{shown}:{port} is taken: choose another --metrics-port, or 0 for any") from None
            raise SplitnetError(
                f"cannot listen on {shown}:{port} ({error.strerror}): give --metrics-port PORT, or HOST:PORT with a "
                "host of this machine"
            ) from None
        self.url = f"http://{shown}:{self._http.server_address[1]}{PATH}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="splitnet-metrics", daemon=True)

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self, registry: CollectorRegistry) -> None:
        """Answers with the metrics of `registry` from now on."""
        self._http.registry = registry
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        if self._thread.ident is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()


class _Server(ThreadingTCPServer):
    allow_reuse_address = sys.platform != "win32"  # where others could take the port, too
    daemon_threads = True
    registry: CollectorRegistry

    def __init__(self, host: str, port: int) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        """By which requests may name this machine."""
        self._until: dict[socket.socket, float] = {}  # of connections that have not ended, the oldest first
        self._places = threading.BoundedSemaphore(2 * MOST_CONNECTIONS)
        super().__init__(address[:2], _Handler)  # pyright: ignore[reportArgumentType]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.service_actions()
        while len(present := list(self._until)) >= MOST_CONNECTIONS:
            self._end(present[0])
        if not self._places.acquire(timeout=REQUEST_S):
            super().shutdown_request(request)
            return
        self._until[request] = time.monotonic() + REQUEST_S
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def shutdown_request(self, request: Any) -> None:
        self._until.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Ends connections whose time is up; called for each new one, and twice a second."""
        now = time.monotonic()
        for request, until in list(self._until.items()):
            if now >= until:
                self._end(request)

    def _end(self, request: socket.socket) -> None:
        self._until.pop(request, None)
        with suppress(OSError):  # its thread, which waits for it, has closed it just now
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # The client is gone, or does not speak HTTP.
        log.debug("a reader of the metrics was lost", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if not self._names_this_machine():
            self.send_error(403, "this name is not known here: ask by IP address, or give --metrics-port NAME:PORT")
            return
        if self.path.partition("?")[0] != PATH:
            self.send_error(404, f"there is only {PATH}")
            return
        try:
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            body = encode(self.server.registry)
        except Exception:
            log.exception("the metrics could not be collected")
            self.send_error(500, "the metrics could not be collected: see the log")
            return
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _names_this_machine(self) -> bool:
        """False for a name that a page of another site may have been given for this address."""
        host = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
        if "." not in host or host in self.server.names:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)
