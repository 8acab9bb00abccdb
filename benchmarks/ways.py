"""The cost of each way to an unreachable peer: round trips of messages over loopback, directly and through a helper.

    python -m benchmarks.ways [--rounds 5]

The caller, the unreachable peer and the helper are three processes. Each round measures all ways, one after another.
Figures are medians.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from splitnet.nat import punch
from splitnet.nat.punch import PathKind
from splitnet.nat.relay import RelayBounds, RelayServer
from splitnet.nat.stream import StreamLoop
from splitnet.nat.tunnel import Tunnels
from splitnet.nat.unreachable import UnreachablePeer
from splitnet.security.identity import Identity, PublicKey
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Destination, Endpoint, Relay
from splitnet.wire.messages import Payload

SMALL, LARGE = 700, 1 << 20
SMALL_TIMES, LARGE_TIMES = 200, 20


def help_others() -> None:
    loop, identity = StreamLoop(), Identity.generate()
    helper = RelayServer(loop, identity, "tcp://127.0.0.1:0", bounds=RelayBounds(bytes_per_s=1 << 40))
    helper.start()
    print(helper.port, identity.public.text, flush=True)
    sys.stdin.read()
    helper.close()
    loop.close()


def hide(port: str, key: str, punches: str) -> None:
    punch.PUNCH_S = float(punches)
    identity = Identity.generate()

    def echo(source: Destination, frames: Sequence[Payload]) -> None:
        transport.send(source, frames)

    tunnels = Tunnels(identity)
    transport = Transport(identity, on_message=echo, listen="tcp://127.0.0.1:0", tunnels=tunnels)
    transport.start()
    inside = f"tcp://127.0.0.1:{transport.port}"
    relay = Relay(f"tcp://127.0.0.1:{port}", PublicKey.parse(key).raw)
    reserved = queue.SimpleQueue[None]()
    hidden = UnreachablePeer(
        tunnels.loop, identity, inside, tunnels.behind, lambda: [relay], lambda: reserved.put(None)
    )
    hidden.start()
    reserved.get(timeout=10)
    print(transport.port, identity.public.text, flush=True)
    sys.stdin.read()
    transport.close()


class Caller:
    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._answers = queue.SimpleQueue[None]()
        identity = Identity.generate()
        self.tunnels = Tunnels(identity)
        self.transport = Transport(
            identity, on_message=lambda *_: self._answers.put(None), max_backlog=None, tunnels=self.tunnels
        )
        self.transport.start()
        self.first_ms = self.round_trip_ms(SMALL)

    def round_trip_ms(self, size: int) -> float:
        began = time.perf_counter()
        self.transport.send(self.endpoint, [bytes(size)])
        self._answers.get(timeout=20)
        return (time.perf_counter() - began) * 1000

    def median_ms(self, size: int, times: int) -> float:
        return statistics.median(self.round_trip_ms(size) for _ in range(times))


def measure(rounds: int) -> None:
    def start(*arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
        command = [sys.executable, "-m", "benchmarks.ways", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, process.stdout.readline().split()

    helper, relay = start("--role", "help")
    plain, (port, key) = start("--role", "hide", *relay, "0")
    punching_peer, (_, punched_key) = start("--role", "hide", *relay, "3")
    relays = (Relay(f"tcp://127.0.0.1:{relay[0]}", PublicKey.parse(relay[1]).raw),)
    nowhere = "tcp://127.0.0.1:9"
    callers = {
        PathKind.DIRECT: Caller(Endpoint(f"tcp://127.0.0.1:{port}", PublicKey.parse(key))),
        PathKind.RELAYED: Caller(Endpoint(nowhere, PublicKey.parse(key), relays)),
        PathKind.PUNCHED: Caller(Endpoint(nowhere, PublicKey.parse(punched_key), relays)),
    }
    until = time.monotonic() + 10
    while callers[PathKind.PUNCHED].tunnels.path_kind(callers[PathKind.PUNCHED].endpoint) is PathKind.RELAYED:
        callers[PathKind.PUNCHED].round_trip_ms(SMALL)
        assert time.monotonic() < until, "no direct way was found"
    small: dict[PathKind, list[float]] = {way: [] for way in callers}
    large: dict[PathKind, list[float]] = {way: [] for way in callers}
    for _ in range(rounds):
        for way, caller in callers.items():
            small[way].append(caller.median_ms(SMALL, SMALL_TIMES))
            large[way].append(caller.median_ms(LARGE, LARGE_TIMES))
    print(f"| way | first message, ms | {SMALL} bytes there and back, ms | 1 MiB there and back, ms |")
    print("|---|---|---|---|")
    for way, caller in callers.items():
        figures = f"{caller.first_ms:.0f} | {statistics.median(small[way]):.2f} | {statistics.median(large[way]):.1f}"
        print(f"| {'straight, after a helper' if way is PathKind.PUNCHED else way.value} | {figures} |")
        caller.transport.close()
    for process in (plain, punching_peer, helper):
        process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--role", nargs="+", default=["measure"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    role, *arguments = options.role
    if role == "help":
        help_others()
    elif role == "hide":
        hide(*arguments)
    else:
        measure(options.rounds)


if __name__ == "__main__":
    main()
