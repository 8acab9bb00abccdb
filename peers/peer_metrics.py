"""Metrics of a peer for Prometheus: counters, the state at the time of a scrape, and the HTTP server of both."""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
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

from peers.counters import OTHER_CODEC, Histogram
from peers.running_peer import RunningPeer, SpanServer
from peers.sessions import MemoryPurpose
from scheduler import facts as swarm
from scheduler.cost import hop_joules
from splitnet.errors import SplitnetError, explain_listen_errors
from splitnet.version import __version__
from splitnet.wire.codecs import CODECS

log = logging.getLogger(__name__)

PATH = "/metrics"
REQUEST_S = 5.0  # longest duration of a connection
MOST_CONNECTIONS = 16  # maximum number of open connections; a further connection ends the oldest one
Label = TypeVar("Label", bound=str)
Family = type[GaugeMetricFamily] | type[CounterMetricFamily]

_CODEC_NAMES = {codec.code: name for name, codec in CODECS.items()} | {OTHER_CODEC: "other"}
_LINKS = {False: "incoming", True: "outgoing"}


class PeerMetrics(Collector):
    """Metrics of a peer's counters, and of its state at each scrape. A moving peer has no blocks."""

    def __init__(self, peer: RunningPeer) -> None:
        self._peer = peer

    def collect(self) -> Iterable[Metric]:
        peer = self._peer
        try:
            server = peer.server
        except SplitnetError:
            server = None
        span = server.span if server is not None else None
        info = {
            "peer": peer.identity.public.text,
            "model": peer.checkpoint.name,
            "blocks": f"{span.start}:{span.end}" if span is not None else "",
            "weights": span.weights.kind if span is not None else "",
            "device": str(span.device) if span is not None else "",
            "version": __version__,
        }
        yield InfoMetricFamily("splitnet_peer", "What the peer serves.", info)
        service, counters = peer.service, peer.counters
        help = "1: takes new sessions; 0: is leaving or moving to other blocks."
        yield _gauge("serving", help, span is not None and not service.leaving)
        yield _gauge("blocks", "Blocks that the peer serves.", span.end - span.start if span is not None else 0)
        yield from self._sessions()
        yield _counter("moves", "Moves to other blocks.", counters.moves)
        yield from self._work_metrics()
        yield from self._memory()
        yield from self._traffic()
        yield _if_known("watts", "Power of the device while it computes, in watts.", counters.energy.watts)
        help = "Energy of a decoded token in all blocks of the peer."
        yield _if_known("token_joules", help, _token_joules(peer, server))
        help = "Energy of steps and of measurements of the device's speed, as far as it is known."
        yield _counter("joules", help, counters.energy.joules)

    def _sessions(self) -> Iterator[Metric]:
        counters, transport = self._peer.counters, self._peer.transport
        yield _gauge("sessions", "Open sessions.", len(self._peer.service.sessions))
        yield _counter("sessions_opened", "Sessions that were admitted.", counters.opened)
        yield _counter("sessions_ended", "Sessions that have ended, by cause.", counters.ended, "cause")
        refused = {code.name.lower(): count for code, count in counters.refused.items()}
        refused |= {"not_authorized": transport.refused_connections, "not_sent": transport.sending.refused}
        refused |= {f"connection_{cause}": count for cause, count in dict(transport.connections.ended).items()}
        help = "Requests that were answered with a failure, by its code"
        yield _counter("refused", f"{help}; connections refused or ended; messages not sent.", refused, "cause")

    def _work_metrics(self) -> Iterator[Metric]:
        queue, work, passes = self._peer.service.queue, self._peer.counters.work, self._peer.counters.passes
        help = "Steps and passes that were computed, by kind of work."
        yield _counter("steps", help, {kind: of.steps for kind, of in work.items()}, "kind")
        help = "Positions of tokens that were computed, by kind of work."
        yield _counter("tokens", help, {kind: of.positions for kind, of in work.items()}, "kind")
        help = "Positions that wait for the device or are on it: of steps, and of training passes."
        yield _gauge("queue_tokens", help, {"steps": queue.queued_positions, "training": queue.pass_positions}, "work")
        help = "Time from the arrival of a step or pass until it began."
        yield _histograms("queue_wait_seconds", help, "kind", {kind: of.waits for kind, of in work.items()})
        help = "Time of a pass on the device."
        yield _histograms("pass_seconds", help, "work", {kind: of.seconds for kind, of in passes.items()})
        help = "Positions that share a pass, over all sessions."
        yield _histograms("pass_tokens", help, "work", {kind: of.positions for kind, of in passes.items()})
        help = "Rows (sequences) that share a pass, over all sessions."
        yield _histograms("pass_rows", help, "work", {kind: of.rows for kind, of in passes.items()})

    def _memory(self) -> Iterator[Metric]:
        service = self._peer.service
        training, kv = service.training_memory, service.sessions.memory
        help = "Memory for KV caches: reserved by sessions, and free for others."
        yield _gauge("kv_bytes", help, {"reserved": kv.used, "free": kv.free}, "state")
        help = "Part of the reserved memory that holds keys and values."
        yield _gauge("kv_cached_bytes", help, round(service.rows.cached_bytes))
        store = service.sessions.prefixes
        help = "Keys and values of texts that are stored for later ones that begin alike."
        held = (store.nbytes, store.disk_bytes) if store is not None else (0, 0)
        yield _gauge("prefix_bytes", help, dict(zip(("memory", "disk"), held, strict=True)), "where")
        help = "Pages of 32 positions with stored keys and values, by event; broken: a page could not be used."
        yield _counter("prefix_pages", help, asdict(store.counts) if store is not None else dict[str, int](), "event")
        help = "Memory for clients that train."
        yield _gauge("training_bytes", help, {"used": training.used, "free": training.free}, "state")
        accounts = kv, service.queue.memory, training
        held = {purpose: sum(account.used_for(purpose) for account in accounts) for purpose in MemoryPurpose}
        yield _gauge("session_bytes", "Memory that sessions occupy, by purpose.", held, "purpose")

    def _traffic(self) -> Iterator[Metric]:
        sending, receiving = self._peer.transport.sending, self._peer.transport.receiving
        limits = {"received_limit": receiving.limit, "sent_limit": sending.limit}
        help = "Messages in sockets: received but not read or incomplete, not sent yet, and the limit of both."
        yield _gauge("buffer_bytes", help, {"received": receiving.used, "sent": sending.used} | limits, "state")
        hidden, helper = self._peer.paths.hidden, self._peer.paths.helper
        help = "Helpers through which the peer is reached; 0: it is reached directly."
        yield _gauge("relays", help, len(hidden.relays))
        yield _gauge("relayed_connections", "Connections that others have made through helpers.", hidden.streams.taken)
        peers, streams, nbytes = 0, 0, 0
        if helper is not None:
            peers, streams, nbytes = helper.reservations, helper.streams.taken, helper.passed_bytes
        yield _gauge("helped_peers", "Hidden peers that are reached through this one.", peers)
        yield _gauge("helped_streams", "Streams of others that pass through this peer.", streams)
        yield _counter("helped_bytes", "Bytes of others that were passed on.", nbytes)
        sent, received = self._peer.counters.traffic.totals()
        yield _bytes("sent_bytes", "Bytes of messages that were sent, by link and codec.", sent)
        yield _bytes("received_bytes", "Bytes of messages that were received, by link and codec.", received)


def registry_of(peer: RunningPeer) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(PeerMetrics(peer))
    return registry


def _token_joules(peer: RunningPeer, server: SpanServer | None) -> float:
    if server is None:
        return 0.0
    span, (_, batch) = server.span, server.service.load.estimate_at(time.monotonic())
    speed = swarm.Speed(server.speed.block_ms)
    facts = swarm.Peer("", span.start, span.end, speed, batch=batch, watts=peer.counters.energy.watts)
    return hop_joules(facts, span.end - span.start) or 0.0


def _metric(family: Family, name: str, help: str, value: float | Mapping[Label, float], label: str = "") -> Metric:
    """A metric with one value, or one for each value of `label`."""
    metric = family(f"splitnet_peer_{name}", help, labels=[label] if label else [])
    for key, one in value.items() if isinstance(value, Mapping) else [("", value)]:
        metric.add_metric([key] if label else [], one)
    return metric


_gauge, _counter = partial(_metric, GaugeMetricFamily), partial(_metric, CounterMetricFamily)


def _if_known(name: str, help: str, value: float) -> Metric:
    """A gauge without a value if `value` is 0, which means unknown."""
    return _gauge(name, help, value or dict[str, float]())


def _bytes(name: str, help: str, totals: Counter[tuple[bool, int]]) -> Metric:
    """Bytes of all links and codecs, used or not: a rate needs the zero before the first byte."""
    known = Counter({(link, name): 0 for link in _LINKS.values() for name in _CODEC_NAMES.values()})
    for (outgoing, code), size in totals.items():
        # A sender may name a codec that does not exist.
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


class MetricsServer(ThreadingTCPServer):
    """Listens from construction on, and answers after `serve`. Use it as a context manager. Port 0: any free port.

    Raises AddressInUse: another program listens there; SplitnetError: the address is not of this machine.
    """

    allow_reuse_address = sys.platform != "win32"  # on Windows other programs could use the port, too
    daemon_threads = True
    registry: CollectorRegistry

    def __init__(self, host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}  # names of this machine in requests
        self._until: dict[socket.socket, float] = {}  # end of the time of open connections, the oldest first
        self._places = threading.BoundedSemaphore(2 * MOST_CONNECTIONS)
        fix = "give --metrics-port PORT, or HOST:PORT with a host of this machine"
        with explain_listen_errors(f"{shown}:{port}", "--metrics-port", fix):
            self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            super().__init__(address[:2], _Handler)  # pyright: ignore[reportArgumentType]
        self.url = f"http://{shown}:{self.server_address[1]}{PATH}"
        self._thread = threading.Thread(target=self.serve_forever, name="splitnet-metrics", daemon=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._thread.start()

    def close(self) -> None:
        if self._thread.ident is not None:
            self.shutdown()
            self._thread.join()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.service_actions()
        while len(present := list(self._until)) >= MOST_CONNECTIONS:
            self._end_request(present[0])
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
        """Ends connections after `REQUEST_S`; called for each new connection, and twice a second."""
        now = time.monotonic()
        for request, until in list(self._until.items()):
            if now >= until:
                self._end_request(request)

    def _end_request(self, request: socket.socket) -> None:
        self._until.pop(request, None)
        with suppress(OSError):  # the connection's thread has closed it already
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # The client has disconnected, or does not use HTTP.
        log.debug("a reader of the metrics was lost", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer  # pyright: ignore[reportIncompatibleVariableOverride]

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
        """Whether the request names this machine; another name may come from a web page that uses DNS rebinding."""
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
