"""Which hosts behind routers can connect to each other, and with which methods.

Emulates a network (docs/netlab.md; needs root on Linux) with a public helper and, for every pair of router kinds, two
hosts behind such routers. Each host connects to the helper from a local port. The helper sees the host's public address
and port, and reports them to the other host. Then the two hosts try these methods:

1. the first host calls the second, which listens at its local port;
2. the second host calls the first, which listens at its local port;
3. both hosts call each other at the same time from their local ports (TCP simultaneous open);
4. both hosts call as in 3 and also listen at their local ports: if a router maps a call to a new public port, the other
   host can still accept the call.

    sudo .venv/bin/python -m benchmarks.nat_matrix [--delay 10] [--at-once 8]

Takes about half a minute. A method is a function of the lab, the two hosts and the helper: add yours to WAYS.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from benchmarks.netlab import NAMED, Lab, LabError

Endpoint = tuple[str, int]
Way = Callable[[Lab, str, str, str], bool]
"""Whether two hosts, named in this order, connect with the help of a third."""

HELPER = "helper"
PUBLIC = "public"
WAIT_S = 2.5
"""Lost or filtered SYNs are sent again after 1 s."""
_AGAIN_S = 0.05
_GREETING = b"hello"


@dataclass(frozen=True)
class Side:
    """A host's state after the introduction."""

    host: str
    local: Endpoint
    """Its local address of the connection to the helper."""
    remote: Endpoint
    """The other host's address, as the helper sees it."""
    helper: socket.socket
    """The connection on which the helper signals the start."""


@contextmanager
def introduced(lab: Lab, first: str, second: str, helper: str) -> Iterator[tuple[Side, Side]]:
    """Both hosts after the helper has introduced them to each other and sent "begin"."""
    with ExitStack() as stack:
        with lab.inside(helper):
            server = stack.enter_context(socket.create_server((lab.address(helper), 0)))
        connections: list[socket.socket] = []
        accepted: list[socket.socket] = []
        seen: list[Endpoint] = []
        for host in (first, second):
            with lab.inside(host):
                connections.append(stack.enter_context(reusable((lab.address(host), 0))))
            connections[-1].settimeout(2 * WAIT_S)
            connections[-1].connect(server.getsockname())
            connection, endpoint = server.accept()
            accepted.append(stack.enter_context(connection))
            seen.append(endpoint)
        for connection in accepted:
            connection.send(b"begin")
        yield (
            Side(first, connections[0].getsockname(), seen[1], connections[0]),
            Side(second, connections[1].getsockname(), seen[0], connections[1]),
        )


def reusable(address: Endpoint) -> socket.socket:
    """A TCP socket bound to an address that other sockets of the host may share."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    opened.bind(address)
    return opened


def first_calls(lab: Lab, first: str, second: str, helper: str) -> bool:
    """The first host calls; the second listens at the local port whose public address the helper sees."""
    with introduced(lab, first, second, helper) as (caller, listener):
        with lab.inside(second):
            listening = reusable(listener.local)
        with listening:
            listening.listen()
            listening.settimeout(WAIT_S)
            with lab.inside(first):
                calling = reusable((lab.address(first), 0))
            with calling:
                calling.settimeout(WAIT_S)
                try:
                    calling.connect(caller.remote)
                    answering, _ = listening.accept()
                except OSError:
                    return False
                with answering:
                    answering.settimeout(WAIT_S)
                    return greets(calling) and greets(answering) and is_greeted(calling) and is_greeted(answering)


def second_calls(lab: Lab, first: str, second: str, helper: str) -> bool:
    """`first_calls` with exchanged hosts."""
    return first_calls(lab, second, first, helper)


def both_call(lab: Lab, first: str, second: str, helper: str, *, listen: bool = False) -> bool:
    """TCP simultaneous open from the ports that the helper sees."""
    with introduced(lab, first, second, helper) as sides, ThreadPoolExecutor(2) as pool:
        return all(pool.map(lambda side: _call(lab, side, listen), sides))


def both_call_and_listen(lab: Lab, first: str, second: str, helper: str) -> bool:
    """As `both_call`, but both also accept calls from other ports."""
    return both_call(lab, first, second, helper, listen=True)


def _call(lab: Lab, side: Side, listen: bool) -> bool:
    """Calls the other host until the two are connected. Returns whether they exchanged greetings in time."""
    side.helper.recv(len(b"begin"))
    deadline = time.monotonic() + WAIT_S
    with lab.inside(side.host), reusable(side.local) as listening:
        if listen:
            listening.listen()
        while (left_s := deadline - time.monotonic()) > 0:
            with reusable(side.local) as calling:
                calling.setblocking(False)
                called = calling.connect_ex(side.remote) == errno.EINPROGRESS
                awaited = [listening] if listen else []
                arrived, decided, _ = select.select(awaited, [calling][:called], [], left_s if called else _AGAIN_S)
                if arrived:
                    connection, _ = listening.accept()
                elif decided and not calling.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    connection = calling
                else:  # refused: the other host has not begun, or its router refuses the call
                    time.sleep(_AGAIN_S)
                    continue
                with connection:
                    connection.settimeout(WAIT_S)
                    try:
                        return greets(connection) and is_greeted(connection)
                    except OSError:
                        return False
    return False


def greets(connection: socket.socket) -> bool:
    """Sends a greeting."""
    connection.sendall(_GREETING)
    return True


def is_greeted(connection: socket.socket) -> bool:
    """Whether a greeting arrives."""
    return connection.recv(len(_GREETING)) == _GREETING


WAYS: dict[str, Way] = {
    "first calls": first_calls,
    "second calls": second_calls,
    "both at once": both_call,
    "both at once, listening": both_call_and_listen,
}


@contextmanager
def matrix_lab(delay_ms: float) -> Iterator[tuple[Lab, list[tuple[str, str]]]]:
    """A lab with two hosts of every kind and the helper, and the pairs of hosts to try."""
    kinds = [PUBLIC, *NAMED]
    hosts = [f"{kind} {number}" for kind in kinds for number in (1, 2)]
    behind = {host: f"router of {host}" for host in hosts if not host.startswith(PUBLIC)}
    routers = {router: NAMED[host.rpartition(" ")[0]] for host, router in behind.items()}
    pairs = [(f"{a} 1", f"{b} 2") for a, b in itertools.combinations_with_replacement(kinds, 2)]
    for shared, hairpin in (("same router", False), ("same router, hairpin", True)):
        routers[shared] = replace(NAMED["port-restricted"], hairpin=hairpin)
        pairs.append((f"{shared} 1", f"{shared} 2"))
        behind |= dict.fromkeys(pairs[-1], shared)
        hosts += pairs[-1]
    with Lab([*hosts, HELPER], delay_ms=delay_ms, routers=routers, behind=behind) as lab:
        yield lab, pairs


def measure(
    lab: Lab, pairs: list[tuple[str, str]], ways: Mapping[str, Way], at_once: int
) -> Iterator[tuple[str, str, list[bool]]]:
    """Yields both hosts of each pair, and for each method whether the hosts connected."""
    with ThreadPoolExecutor(at_once) as pool:
        tries = [[pool.submit(way, lab, *pair, HELPER) for way in ways.values()] for pair in pairs]
        for (first, second), futures in zip(pairs, tries, strict=True):
            yield first, second, [future.result() for future in futures]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=10.0, metavar="MS", help="one-way, between public addresses")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="pairs that try at the same time")
    arguments = parser.parse_args()
    try:
        with matrix_lab(arguments.delay) as (lab, pairs):
            print(f"| first | second | {' | '.join(WAYS)} |")
            print(f"|---|---|{'---|' * len(WAYS)}")
            for first, second, succeeded in measure(lab, pairs, WAYS, arguments.at_once):
                cells = [name.rpartition(" ")[0] for name in (first, second)]
                print(f"| {' | '.join([*cells, *('yes' if yes else '' for yes in succeeded)])} |", flush=True)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
