"""Bytes on the wire of what a client sends and receives besides its sessions: pings, probes, and the directory.

Counts what passes the loopback device, with the headers of TCP and IP: run it where nothing else uses that, as in a
network of its own (Linux):

    unshare -rn sh -c 'ip link set lo up; exec python benchmarks/client_bytes.py [--nodes 8] [--peers 100]'
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from scheduler.swarm import PASS_SIZES
from splitnet.net.directory import Directory
from splitnet.net.endpoints import Endpoint
from splitnet.net.identity import Identity
from splitnet.net.messages import Ping, Pong, decode, encode
from splitnet.net.prober import PROBE_BYTES, Prober
from splitnet.net.records import KEY_PREFIX_BYTES, MAX_SEEN_LINKS, PeerRecord, SeenLink
from splitnet.net.transport import Transport

TIMES = 100
OPEN_S = 20.0
IDLE_S = 3.0
MODEL = "ab" * 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8, help="of the DHT")
    parser.add_argument("--peers", type=int, default=100, help="that it has records of")
    arguments = parser.parse_args()
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
    packed = [record_of(key).pack(key) for key in keys]
    print(f"a record: {sum(map(len, packed)) / peers:.0f} bytes", flush=True)
    with ExitStack() as stack:
        listen = ["/ip4/127.0.0.1/tcp/0"]
        first = stack.enter_context(Directory.start(listen=listen))
        others = [Directory.start(listen=listen, initial_peers=first.addresses[:1]) for _ in range(nodes - 1)]
        for node in others:
            stack.enter_context(node)
        workers = [
            threading.Thread(
                target=lambda at=at: [
                    others[at % len(others)].store(PeerRecord.unpack(data), data) for data in packed[at :: len(others)]
                ]
            )
            for at in range(len(others))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        client = stack.enter_context(Directory.start(initial_peers=first.addresses[:1]))
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
        f"a look at the DHT of {nodes} nodes: {found} of {peers} records, {read / times / 1e3:.0f} KB, "
        f"{read / times / max(found, 1):.0f} bytes a record; idle {idle:.0f} bytes/s"
    )


def record_of(key: Identity) -> PeerRecord:
    links = (
        SeenLink(random.randbytes(KEY_PREFIX_BYTES), random.random(), random.random()) for _ in range(MAX_SEEN_LINKS)
    )
    return PeerRecord.idle(
        key=key.public,
        model=MODEL,
        model_name="a-model-of-some-size",
        address="tcp://203.0.113.17:31331",
        num_blocks=80,
        codecs=("none", "int8", "float16"),
        device="cuda",
        dtype="int8",
        block_ms=tuple(random.random() for _ in PASS_SIZES),
        queue_ms=random.random(),
        kv_free_positions=100_000,
        placed_at=time.time(),
        serves=True,
        coordinate=tuple(random.random() for _ in range(4)),
        coordinate_error=random.random(),
        bytes_per_ms=random.random(),
        links=tuple(links),
        version="0.2.0",
        issued_at=time.time(),
        ttl_s=300.0,
    )


def passed(work: Callable[[], object]) -> float:
    """Bytes that pass the loopback device meanwhile."""
    before = counted()
    work()
    time.sleep(0.2)  # what is acknowledged late counts too
    return float(counted() - before)


def counted() -> int:
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[1])


if __name__ == "__main__":
    main()
