"""A peer: directory, transport, service and engine put together around one span."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import splitnet
from peers.admission import SessionTable
from peers.announce import Announcer
from peers.engine import Engine
from peers.load import Load
from peers.neighbours import Neighbours
from peers.placing import ANY_SPAN, SpanWish, choose_blocks, fitting_blocks
from peers.service import Served, Service
from peers.speed import measure_speed
from peers.work_queue import WorkQueue
from splitnet.errors import ProtocolError
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.span import Span
from splitnet.net.codecs import CODECS
from splitnet.net.directory import Directory
from splitnet.net.endpoints import Destination, Endpoint, LinkState
from splitnet.net.identity import AuthorizedKeys, Identity
from splitnet.net.messages import PROTOCOL_VERSION, Message, Payload, Pong, decode, encode
from splitnet.net.prober import Prober
from splitnet.net.records import PeerRecord
from splitnet.net.transport import Transport

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """How a peer serves.

    Attributes:
        wish: which blocks, or how much memory for them.
        initial_peers: multiaddrs of a swarm to join; empty starts a new one.
        listen: `tcp://host:port` for activations, port 0 for any.
        dht_listen: multiaddrs for the DHT; None: the same host as `listen`, any port.
        public_host: host name or address that others reach this machine by, with `:port` if they reach it by another
            port than it listens on; None: found out.
        device, dtype: as torch and the checkpoint name them; None: chosen.
        kv_memory: bytes for KV caches; None: a quarter of the free memory.
        authorized_keys: file with the keys that may connect; None: anyone.
        key_file: file of the peer's own key; None: a new key that lives as long as the peer.
        idle_s: seconds until an idle session is dropped.
    """

    wish: SpanWish = ANY_SPAN
    initial_peers: Sequence[str] = ()
    listen: str = "tcp://0.0.0.0:0"
    dht_listen: Sequence[str] | None = None
    public_host: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    kv_memory: int | None = None
    authorized_keys: Path | None = None
    key_file: Path | None = None
    idle_s: float = 600.0


class Peer:
    """A running peer of one model. Use `Peer.start`, then `close`.

    Raises:
        SplitnetError: any of its kinds, with the fix: the model, the swarm, the address, memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: Directory,
        span: Span,
        options: PeerOptions,
        identity: Identity,
        max_blocks: int,
    ) -> None:
        self.checkpoint = checkpoint
        self.span = span
        self.identity = identity
        self._directory = directory
        self._options = options
        self._max_blocks = max_blocks
        self._speed = measure_speed(span)
        self._load = Load()
        self._placed_at = time.time()
        self._sessions = SessionTable(_kv_capacity(span, options.kv_memory), idle_s=options.idle_s)
        self._queue = WorkQueue()
        served = Served(
            model=checkpoint.fingerprint,
            start=span.start,
            end=span.end,
            num_blocks=checkpoint.num_blocks,
            hidden_size=checkpoint.hidden_size,
            max_positions=checkpoint.max_positions,
        )
        self._service = Service(served, self._sessions, self._queue, self)
        self._engine = Engine(span, self._service, self._queue, self._speed, self._load)
        self._transport = Transport(
            identity,
            on_message=self._receive,
            on_link=self._service.link_changed,
            on_lost=lambda connection: self._service.connection_lost(connection, time.monotonic()),
            on_tick=lambda: self._service.tick(time.monotonic()),
            authorized=AuthorizedKeys.from_file(options.authorized_keys) if options.authorized_keys else None,
            listen=options.listen,
        )
        host = options.public_host or _reachable_host(options.listen)
        has_port = host.rpartition(":")[2].isdecimal() and not host.endswith("]")
        address = f"tcp://{host}" if has_port else f"tcp://{host}:{self._transport.port}"
        self.endpoint = Endpoint(address, identity.public)
        self._prober = Prober(self.send)
        self._neighbours = Neighbours(
            lambda: directory.peers(checkpoint.fingerprint), identity.public.text, self._service, self._prober
        )
        self._announcer = Announcer(directory, identity, self.record, self._neighbours.look_around)

    @classmethod
    def start(cls, model: str | Path, options: PeerOptions, *, progress: Progress | None = None) -> Peer:
        """Joins or starts a swarm, loads blocks and serves them.

        Args:
            model: hub id or checkpoint folder.
            options: how to serve.
            progress: called with what is going on, bytes done and bytes in all.
        """
        report = progress or (lambda stage, done, total: None)
        report("open the checkpoint", 0, 0)
        checkpoint = Checkpoint.open(model)
        # Keys lists are read before anything slow, so that a mistake in them is told at once.
        if options.authorized_keys is not None:
            AuthorizedKeys.from_file(options.authorized_keys)
        identity = Identity.load_or_create(options.key_file) if options.key_file else Identity.generate()
        report("join the swarm" if options.initial_peers else "start a swarm", 0, 0)
        listen = options.dht_listen if options.dht_listen is not None else (_dht_address(options.listen),)
        directory = Directory.start(initial_peers=options.initial_peers, listen=listen)
        try:
            fitting = fitting_blocks(checkpoint, options.wish, device=options.device, dtype=options.dtype)
            start, end = choose_blocks(checkpoint, options.wish, fitting, directory.peers(checkpoint.fingerprint))
            span = Span.load(
                checkpoint,
                start,
                end,
                device=options.device,
                dtype=options.dtype,
                progress=lambda done, total: report(f"load blocks {start}..{end - 1}", done, total),
            )
            report("measure the device", 0, 0)
            peer = cls(checkpoint, directory, span, options, identity, fitting)
        except BaseException:
            directory.close()
            raise
        try:
            peer._serve()
        except BaseException:
            peer.close()
            raise
        return peer

    @property
    def addresses(self) -> list[str]:
        """Multiaddrs that others join the swarm with."""
        return self._directory.addresses

    def record(self) -> PeerRecord:
        """What the peer announces of itself, as of now."""
        wait_ms, batch = self._load.at(time.monotonic())
        coordinate, coordinate_error = self._neighbours.coordinate
        return PeerRecord(
            key=self.identity.public,
            model=self.checkpoint.fingerprint,
            model_name=self.checkpoint.name,
            address=self.endpoint.address,
            start=self.span.start,
            end=self.span.end,
            num_blocks=self.checkpoint.num_blocks,
            protocol=PROTOCOL_VERSION,
            codecs=tuple(CODECS),
            device=str(self.span.device),
            dtype=str(self.span.dtype).removeprefix("torch."),
            block_ms=self._speed.block_ms,
            queue_ms=max(wait_ms, self._service.queue_ms),
            batch=batch,
            kv_free_positions=self._sessions.free_positions,
            sessions=len(self._sessions),
            max_blocks=self._max_blocks,
            placed_at=self._placed_at,
            coordinate=coordinate,
            coordinate_error=coordinate_error,
            bytes_per_ms=self._neighbours.whereabouts.place.bytes_per_ms,
            links=self._neighbours.seen_links,
            version=splitnet.__version__,
            issued_at=time.time(),
        )

    def drain(self, timeout_s: float) -> None:
        """Leaves the DHT and hands running sessions over: their clients replace this peer, which serves until then.

        Returns when no session is in use any more, or after `timeout_s` seconds. The clients of idle ones find out when
        they go on.
        """
        self._announcer.close()
        self._service.leave()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._service.in_use(time.monotonic()):
            self._sessions.wait_for_end(0.2)

    def close(self) -> None:
        """Leaves the DHT, stops serving and frees everything."""
        self._announcer.close()
        self._transport.close()
        self._engine.close()
        self._directory.close()

    def send(self, destination: Destination, message: Message) -> None:
        """Sends a message; the service speaks through this."""
        self._transport.send(destination, encode(message))

    def connect(self, endpoint: Endpoint) -> None:
        """Opens the link to a next hop."""
        self._transport.connect(endpoint)

    def disconnect(self, endpoint: Endpoint) -> None:
        """Closes the link to a next hop."""
        self._transport.disconnect(endpoint)

    def state(self, endpoint: Endpoint) -> LinkState:
        """State of the link to a next hop."""
        return self._transport.state(endpoint)

    def probe(self, endpoint: Endpoint) -> None:
        """Begins to measure the round trip to a next hop."""
        self._prober.ping(endpoint)

    def rtt_ms(self, endpoint: Endpoint) -> float:
        """The round trip to a next hop as measured lately; 0: not measured."""
        return self._prober.rtt_ms(endpoint)

    def _serve(self) -> None:
        self._engine.start()
        self._transport.start()
        self._announcer.start()

    def _receive(self, source: Destination, frames: Sequence[Payload]) -> None:
        try:
            message = decode(frames)
        except ProtocolError as error:
            self._service.reject(source, error)
            return
        if isinstance(message, Pong) and isinstance(source, Endpoint):
            self._prober.pong(source, message)
        else:
            self._service.receive(source, message, time.monotonic())


def _kv_capacity(span: Span, kv_memory: int | None) -> int:
    """Positions of KV cache that fit in the memory set aside for them."""
    if kv_memory is None:
        kv_memory = span.free_memory() // 4
    return max(1, kv_memory // span.kv_bytes_per_position)


def _reachable_host(listen: str) -> str:
    """The host of `listen`; for a wildcard, this machine's address on its default route."""
    host = listen.removeprefix("tcp://").rpartition(":")[0]
    if host not in ("0.0.0.0", "*", "[::]", ""):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # no packet is sent: this only asks the kernel for a route
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _dht_address(listen: str) -> str:
    host = listen.removeprefix("tcp://").rpartition(":")[0]
    if host in ("*", ""):
        host = "0.0.0.0"
    try:
        return f"/ip4/{socket.gethostbyname(host)}/tcp/0"
    except OSError:
        return "/ip4/0.0.0.0/tcp/0"
