"""Counts the bytes that a client sends and receives outside its sessions: pings, probes, and the directory.

The count is that of the loopback device, including the headers of TCP and IP. Run the benchmark where no other program
uses the loopback device, such as in a separate network namespace (Linux):

    unshare -rn sh -c 'ip link set lo up; exec python -m benchmarks.client_bytes [--nodes 8] [--peers 100]'

With `--minutes`, the benchmark instead counts the traffic of a whole client in each of this many minutes. There are
`--peers` peers, which only answer; nothing is computed. The client joins through one of them, plans a route, and keeps
its links open as a session does. `--busy`: every record reports another load every 15 s; otherwise loads never change.
"""

from __future__ import annotations

import argparse
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import zmq

from peers.directory_service import DirectoryService
from scheduler.cost import encodings_of
from scheduler.facts import PASS_SIZES
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.record import KEY_PREFIX_BYTES, MAX_SEEN_LINKS, PeerRecord, SeenLink
from splitnet.security.identity import Identity
from splitnet.swarm.plan import Needs
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.transport.addresses import peer_address
from splitnet.transport.prober import PROBE_BYTES, Prober
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.messages import LookUp, Message, Open, Ping, Pong, decode, encode

TIMES = 100
OPEN_S = 20.0
IDLE_S = 30.0
MODEL = "ab" * 32
BLOCKS = 80
STARTED_AT = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8, help="of the DHT")
    parser.add_argument("--peers", type=int, default=100, help="peers that the client has records of")
    parser.add_argument("--minutes", type=int, default=0)
    parser.add_argument("--busy", action="store_true")
    arguments = parser.parse_args()
    if arguments.minutes:
        minutes(arguments.peers, arguments.minutes, busy=arguments.busy)
        return
    pings()
    directory(arguments.nodes, arguments.peers)


def pings() -> None:
    here, there = Identity.generate(), Identity.generate()

    def answer(source: object, frames: object) -> None:
        message = decode(frames)  # pyright: ignore[reportArgumentType]
        if isinstance(message, Ping):
            peer.send(source, encode(Pong(message.nonce, 1.5, 100_000)))  # pyright: ignore[reportArgumentType]

    def take(source: object, frames: object) -> None:
        message = decode(frames)  # pyright: ignore[reportArgumentType]
        if isinstance(message, Pong):
            prober.pong(endpoint, message)

    with ExitStack() as stack:
        peer = stack.enter_context(closing(Transport(there, on_message=answer, listen="tcp://127.0.0.1:0")))
        client = stack.enter_context(closing(Transport(here, on_message=take)))
        peer.start()
        client.start()
        endpoint = Endpoint(f"tcp://127.0.0.1:{peer.port}", there.public)
        prober = Prober(lambda endpoint, ping: client.send(endpoint, encode(ping)))

        def ask(padding: int = 0) -> None:
            prober.ping(endpoint, padding).result(10)

        once = passed(ask)
        ping = passed(lambda: [ask() for _ in range(TIMES)]) / TIMES
        probe = passed(lambda: [ask(PROBE_BYTES) for _ in range(TIMES)]) / TIMES
        open_s = passed(lambda: time.sleep(OPEN_S)) / OPEN_S
    print(
        f"a link: {once - ping:.0f} bytes to open it, {open_s:.0f} bytes/s while it is open; "
        f"a ping and its answer: {ping:.0f}; a probe: {probe:.0f}",
        flush=True,
    )


def directory(nodes: int, peers: int) -> None:
    keys = [Identity.generate() for _ in range(peers)]
    packed = [record_of(key, ttl_s=300.0).pack(key) for key in keys]
    print(f"a record: {sum(map(len, packed)) / peers:.0f} bytes", flush=True)
    with ExitStack() as stack:
        listen = ["/ip4/127.0.0.1/tcp/0"]
        first = stack.enter_context(DhtDirectory.start(listen=listen))
        others = [DhtDirectory.start(listen=listen, initial_peers=first.addresses[:1]) for _ in range(nodes - 1)]
        for node in others:
            stack.enter_context(node)
        workers = [
            threading.Thread(
                target=lambda at=at: [
                    others[at % len(others)].store_record(PeerRecord.unpack(data), data)
                    for data in packed[at :: len(others)]
                ]
            )
            for at in range(len(others))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        without = passed(lambda: time.sleep(IDLE_S)) / IDLE_S
        client = stack.enter_context(DhtDirectory.start(initial_peers=first.addresses[:1]))
        client.peers(MODEL)
        idle = passed(lambda: time.sleep(IDLE_S)) / IDLE_S
        began = time.monotonic()
        found = 0

        def look() -> None:
            nonlocal found
            found = len(client.peers(MODEL))

        times = 5
        read = passed(lambda: [look() for _ in range(times)]) - idle * (time.monotonic() - began)
    print(
        f"a look-up in the DHT of {nodes} nodes: {found} of {peers} records, {read / times / 1e3:.0f} KB, "
        f"{read / times / max(found, 1):.0f} bytes a record; idle {idle:.0f} bytes/s, {without:.0f} without this client"
    )


def minutes(count: int, number: int, *, busy: bool) -> None:
    facts = ModelFacts(MODEL, "a-model-of-some-size", BLOCKS, 4096, None)
    with closing(AnsweringPeers(count, busy=busy)) as peers:
        was = counted()
        with Swarm(facts, [peer_address(peers.endpoints[0])]) as client:
            needs = Needs(1000, encodings_of({"int8": 4096.0}), (0, BLOCKS))
            ends = time.monotonic()
            route = client.plan_route(needs)
            session = IdleSession()
            client.links.register(session)
            for hop in route:
                client.links.send(hop.record.endpoint, Open(session.id, 1, MODEL, 0, 1, 1, 0, b"", b"", ""))
            for minute in range(number):
                ends += 60.0
                time.sleep(max(ends - time.monotonic(), 0.0))
                now = counted()
                asked, told = peers.take_counts()
                print(
                    f"minute {minute + 1} with {count} {'busy' if busy else 'idle'} peers, {len(route)} hops: "
                    f"{(now - was) / 1e3:.0f} KB, of these {asked['LookUp']} questions {told['LookUp'] / 1e3:.0f}, and "
                    f"answers {told['Found'] / 1e3:.0f}; {asked['Ping']} pings, {asked['Probe']} probes; "
                    f"{len(client.peers())} peers known",
                    flush=True,
                )
                was = now


class IdleSession:
    """A session that has a route but does no work."""

    id = bytes(range(16))

    def deliver(self, source: object, message: object) -> None: ...

    def link_failed(self, endpoint: object, error: object) -> None: ...

    def close(self) -> None: ...


class AnsweringPeers:
    """Peers that answer pings and report each other's records, without computation; each has a separate port and
    key.
    """

    def __init__(self, count: int, *, busy: bool) -> None:
        self._busy = busy
        self._identities = [Identity.generate() for _ in range(count)]
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, count + 16)
        self._poller = zmq.Poller()
        self._sockets = [self._listen(identity) for identity in self._identities]
        self.endpoints = [
            Endpoint(str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0"), identity.public)
            for socket, identity in zip(self._sockets, self._identities, strict=True)
        ]
        self._at = {socket: at for at, socket in enumerate(self._sockets)}
        self._spans = [sorted(random.sample(range(BLOCKS + 1), 2)) for _ in range(count)]
        self._spans[:2] = [[0, BLOCKS // 2], [BLOCKS // 2, BLOCKS]]
        self._records: dict[bytes, PeerRecord] = {}
        self._ready: queue.SimpleQueue[tuple[Connection, Message]] = queue.SimpleQueue()
        self._counts = Counter[str](), Counter[str]()
        self._renew(range(count))
        self._service = DirectoryService(self, MODEL, self)  # pyright: ignore[reportArgumentType]
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._serve, self._keep)]
        for thread in self._threads:
            thread.start()

    def records(self, model: str, depth: int) -> list[PeerRecord]:
        """The records of all peers, which every peer knows."""
        return list(self._records.values()) if model else []

    def send(self, destination: Connection, message: Message) -> None:
        """Sends an answer of the directory's service."""
        self._ready.put((destination, message))

    def take_counts(self) -> tuple[Counter[str], Counter[str]]:
        """Received messages, and bytes of messages by kind, since the last call."""
        counts, self._counts = self._counts, (Counter(), Counter())
        return counts

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self._service.close()
        self._context.destroy(linger=0)

    def _listen(self, identity: Identity) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.curve_server, socket.curve_secretkey = True, identity.curve_secret
        socket.heartbeat_ivl = socket.heartbeat_timeout = 10_000  # as in `splitnet.transport.transport`
        socket.bind("tcp://127.0.0.1:*")
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _renew(self, which: range) -> None:
        for at in which:
            identity, (start, end) = self._identities[at], self._spans[at]
            load = {"queue_ms": random.expovariate(1 / 50), "batch": random.expovariate(1 / 4)} if self._busy else {}
            record = record_of(identity, address=self.endpoints[at].address, start=start, end=end, **load)
            self._records[identity.public.raw] = PeerRecord.unpack(record.pack(identity))

    def _keep(self) -> None:
        """Each peer announces its record again every 15 s."""
        at, step = 0, max(len(self._identities) // 15, 1)
        while not self._closing.wait(1.0):
            self._renew(range(at, min(at + step, len(self._identities))))
            at = at + step if at + step < len(self._identities) else 0

    def _serve(self) -> None:
        while not self._closing.is_set():
            for socket, _ in self._poller.poll(1):
                sender, *frames = socket.recv_multipart()
                self._answer(socket, sender, frames)
            while not self._ready.empty():
                connection, message = self._ready.get()
                at = int.from_bytes(connection.curve[:4], "big")
                self._send(self._sockets[at], connection.routing_id, message)

    def _answer(self, socket: zmq.Socket[bytes], sender: bytes, frames: list[bytes]) -> None:
        message = decode(frames)
        kind = "Probe" if isinstance(message, Ping) and message.payload else type(message).__name__
        self._counts[0][kind] += 1
        self._counts[1][kind] += sum(map(len, frames))
        if isinstance(message, Ping):
            self._send(socket, sender, Pong(message.nonce, 0.0, 100_000))
        elif isinstance(message, LookUp):
            curve = self._at[socket].to_bytes(4, "big") + bytes(28)
            self._service.receive_question(Connection(sender, curve), message, time.monotonic())

    def _send(self, socket: zmq.Socket[bytes], receiver: bytes, message: Message) -> None:
        frames = encode(message)
        self._counts[1][type(message).__name__] += sum(map(len, frames))
        socket.send_multipart([receiver, *frames])


def record_of(key: Identity, **facts: object) -> PeerRecord:
    links = (
        SeenLink(random.randbytes(KEY_PREFIX_BYTES), random.random(), random.random()) for _ in range(MAX_SEEN_LINKS)
    )
    usual = {
        "key": key.public,
        "model": MODEL,
        "model_name": "a-model-of-some-size",
        "address": "tcp://203.0.113.17:31331",
        "num_blocks": BLOCKS,
        "codecs": ("none", "int8", "float16"),
        "device": "cuda",
        "dtype": "int8",
        "block_ms": tuple(0.5 + key.public.raw[0] / 256 for _ in PASS_SIZES),
        "queue_ms": 1.5,
        "batch": 0.5,
        "kv_free_positions": 100_000,
        "placed_at": STARTED_AT,
        "serves": True,
        "coordinate": tuple(random.random() for _ in range(4)),
        "coordinate_error": random.random(),
        "bytes_per_ms": random.random(),
        "links": tuple(links),
        "version": "0.2.0",
        "issued_at": time.time(),
        "ttl_s": 60.0,
    }
    return PeerRecord.idle(**usual | facts)


def passed(work: Callable[[], object]) -> float:
    """The number of bytes that pass through the loopback device during `work`."""
    before = counted()
    work()
    time.sleep(0.2)  # late acknowledgements count, too
    return float(counted() - before)


def counted() -> int:
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[1])


if __name__ == "__main__":
    main()
