"""How splitnet reaches peers behind routers: by which method, how soon, and at what speed, for all pairs of router
kinds.

    sudo .venv/bin/python -m benchmarks.nat_ways [--delay 10] [--rate 100]

A caller, a peer and a public helper are on an emulated network (docs/netlab.md; needs root on Linux); a peer behind a
router is unreachable without the helper. Pairs are measured one after the other: the round trip of the first message,
which begins through the helper; the time until the best method is in use; then the round trip of 700 bytes (median of
9), and the speed of 8 MiB in one direction. In the last rows, better methods are disabled. Takes a minute and a half.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from benchmarks.nat_matrix import HELPER, PUBLIC
from benchmarks.netlab import NAMED, Lab, LabError
from splitnet.nat import punch
from splitnet.nat.punch import PathKind
from splitnet.nat.relay import RelayServer
from splitnet.nat.stream import StreamLoop
from splitnet.nat.tunnel import Tunnels
from splitnet.nat.unreachable import UnreachablePeer
from splitnet.security.identity import Identity
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Destination, Endpoint
from splitnet.wire.messages import Payload

KINDS = {**NAMED, "symmetric, any port": replace(NAMED["symmetric"], random_ports=True)}
SHARED = ("port-restricted", "symmetric")
SMALL, SMALL_TIMES = 700, 9
LARGE, LARGE_TIMES = 1 << 20, 8
ANSWER = b"x"
WAIT_S = 30.0


@dataclass(frozen=True)
class Reached:
    """How a peer was reached.

    Attributes:
        first_ms: time until the first message has returned.
        best_ms: time until the best method was in use, from the same start.
    """

    way: PathKind
    first_ms: float
    best_ms: float
    round_trip_ms: float
    mbit_per_s: float


def reach(lab: Lab, first: str, second: str, helper: str, *, hidden: bool = True) -> Reached:
    """Measures how the caller, the first of two hosts, reaches the second with the help of a third.

    Args:
        hidden: whether the second host is reached through the helper at first; otherwise it listens at its public
            address.
    """
    with ExitStack() as stack:
        peer = _peer(stack, lab, second)
        endpoint = Endpoint(f"tcp://{lab.public_address(second)}:{peer.port}", peer.identity.public)
        if hidden:
            endpoint = replace(endpoint, relays=_relays(stack, lab, peer, second, helper))
        answers = queue.SimpleQueue[None]()
        with lab.inside(first):
            identity = Identity.generate()
            tunnels = Tunnels(identity)
            caller = Transport(identity, on_message=lambda *_: answers.put(None), max_backlog=None, tunnels=tunnels)
            stack.callback(caller.close)
            caller.start()

        def ask(size: int, times: int = 1) -> float:
            began = time.perf_counter()
            for _ in range(times):
                caller.send(endpoint, [bytes(size)])
            for _ in range(times):
                answers.get(timeout=WAIT_S)
            return (time.perf_counter() - began) * 1000

        began = time.perf_counter()
        first_ms = best_ms = ask(SMALL)
        while tunnels.path_kind(endpoint) is PathKind.RELAYED and best_ms < first_ms + punch.PUNCH_S * 1000:
            ask(SMALL)
            best_ms = (time.perf_counter() - began) * 1000
        way = tunnels.path_kind(endpoint)
        round_trip_ms = statistics.median(ask(SMALL) for _ in range(SMALL_TIMES))
        ask(LARGE, LARGE_TIMES)  # TCP learns the rate of the links
        large_ms = ask(LARGE, LARGE_TIMES)
        mbit_per_s = LARGE * LARGE_TIMES * 8 / 1000 / large_ms
        return Reached(way, first_ms, first_ms if way is PathKind.RELAYED else best_ms, round_trip_ms, mbit_per_s)


@dataclass(frozen=True)
class _Peer:
    identity: Identity
    transport: Transport
    tunnels: Tunnels

    @property
    def port(self) -> int:
        return self.transport.port


def _peer(stack: ExitStack, lab: Lab, host: str) -> _Peer:
    """A peer that answers each message with one byte."""

    def answer(source: Destination, frames: Sequence[Payload]) -> None:
        transport.send(source, [ANSWER])

    identity = Identity.generate()
    with lab.inside(host):  # threads stay in the host where they begin
        tunnels = Tunnels(identity)
        transport = Transport(identity, on_message=answer, listen="tcp://0.0.0.0:0", tunnels=tunnels)
        stack.callback(transport.close)
        transport.start()
    return _Peer(identity, transport, tunnels)


def _relays(stack: ExitStack, lab: Lab, peer: _Peer, host: str, helper: str) -> tuple:
    with lab.inside(helper):
        loop = StreamLoop()
        stack.callback(loop.close)
        helping = RelayServer(loop, Identity.generate(), f"tcp://{lab.address(helper)}:0")
        stack.callback(helping.close)
        helping.start()
    relay = helping.relay_at(lab.address(helper))
    reserved = queue.SimpleQueue[None]()
    tunnels = peer.tunnels
    inside = f"tcp://127.0.0.1:{peer.port}"
    with lab.inside(host):
        hidden = UnreachablePeer(
            tunnels.loop, peer.identity, inside, tunnels.behind, lambda: [relay], lambda: reserved.put(None)
        )
        stack.callback(hidden.stop_relaying)
        hidden.start()
    reserved.get(timeout=WAIT_S)
    return (relay,)


def measure(delay_ms: float, rate_mbit: float) -> Iterator[tuple[str, str, Reached]]:
    """All pairs."""
    kinds = (PUBLIC, *KINDS)
    pairs = [*itertools.combinations_with_replacement(kinds, 2)]
    hosts = [f"{kind} {number}" for kind in kinds for number in (1, 2)]
    routers = {f"router of {host}": KINDS[host[:-2]] for host in hosts if host[:-2] != PUBLIC}
    behind = {router.removeprefix("router of "): router for router in routers}
    for kind, hairpin in itertools.product(SHARED, (False, True)):
        shared = f"one {kind}{', hairpin' if hairpin else ''}"
        routers[shared] = replace(KINDS[kind], hairpin=hairpin)
        pairs.append((shared, shared))
        hosts += [f"{shared} 1", f"{shared} 2"]
        behind |= dict.fromkeys(hosts[-2:], shared)
    with Lab([*hosts, HELPER], delay_ms=delay_ms, rate_mbit=rate_mbit, routers=routers, behind=behind) as lab:
        for first, second in pairs:
            yield first, second, reach(lab, f"{first} 1", f"{second} 2", HELPER, hidden=second != PUBLIC)
        usual, punch.PUNCH_S = punch.PUNCH_S, 0.0
        try:
            for first, second in ((PUBLIC, "port-restricted"), ("port-restricted", "port-restricted")):
                yield first, second, reach(lab, f"{first} 1", f"{second} 2", HELPER)
        finally:
            punch.PUNCH_S = usual


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=10.0, metavar="MS", help="one-way, between public addresses")
    parser.add_argument("--rate", type=float, default=100.0, metavar="MBIT", help="rate of each access link, in Mbit/s")
    arguments = parser.parse_args()
    print("| caller | peer | in the end | first message, ms | best way after, ms | there and back, ms | Mbit/s |")
    print("|---|---|---|---|---|---|---|")
    try:
        for first, second, found in measure(arguments.delay, arguments.rate):
            figures = f"{found.first_ms:.0f} | {found.best_ms:.0f} | {found.round_trip_ms:.1f} | {found.mbit_per_s:.0f}"
            print(f"| {first} | {second} | {found.way.value} | {figures} |", flush=True)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
